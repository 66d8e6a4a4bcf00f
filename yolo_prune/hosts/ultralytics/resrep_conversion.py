"""From the network with compactors to a slim one of stock layers: merge, cut, prove, write.

Everything that is needed lies in the run's folder, so a run that was killed on its way here is finished from its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER

from yolo_prune.errors import ConfigError, VerificationError
from yolo_prune.files import new_file, read_record, sha256, write_json
from yolo_prune.hosts.slim import MARKER, Checkpoint, mark_cut, require_widths, unfinished, write_checkpoint
from yolo_prune.hosts.ultralytics.blocks import host_for
from yolo_prune.hosts.ultralytics.checkpoints import unpickle
from yolo_prune.hosts.ultralytics.compactors import compactor_behind, merged
from yolo_prune.hosts.ultralytics.networks import bare_copy, network_of, random_image
from yolo_prune.hosts.ultralytics.records import FILES
from yolo_prune.hosts.ultralytics.run_files import stripped
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, verifier
from yolo_prune.methods.resrep.forgetting import masked_channels, row_norms
from yolo_prune.methods.resrep.schedule import GONE
from yolo_prune.plan import PrunePlan, plan_from_keep
from yolo_prune.surgery.copying import copied
from yolo_prune.surgery.verify import max_abs_error, outputs

NAME = "resrep"
"""Name of the method: in settings, in the marker of a network that has compactors, and there the key of its masks."""

RECORD, PLAN, COMPACTORS = FILES[NAME]
"""What a run leaves in its folder: its state, the plan of the slim network, and what was converted."""

LOSSLESS = 1e-5
"""Largest |converted - before| as a fraction of the largest output."""


def convert_run(folder: Path) -> None:
    """Replace a run's best and last checkpoint by slim ones; nothing happens where that was done before.

    The last one is written last: as long as it has compactors, there is something to do. A best one of an earlier
    stage, which only a kill between the host's two files can leave, becomes the last one.

    Args:
        folder: The run's folder.

    Raises:
        ConfigError: The folder has no record.
        VerificationError: Masked rows that are not gone, or a proof that failed; the checkpoints stay as they are.
    """
    last, best = (folder / "weights" / name for name in ("last.pt", "best.pt"))
    if unfinished(_network(unpickle(last))) != NAME:
        return
    record = read_record(folder / RECORD)
    if record is None:
        raise ConfigError(f"no '{RECORD}' in '{folder}'", expected="the folder of a training with method=resrep")
    kept = folder / COMPACTORS
    with new_file(kept, replace=True) as temporary:
        temporary.write_bytes(last.read_bytes())
    conversion = Conversion(record, kept)
    contents = {last: conversion.convert(unpickle(last))}
    if best.is_file():
        content = unpickle(best)
        earlier = unfinished(_network(content)) == NAME and not _state(_network(content))["gone"]
        if earlier or best.read_bytes() == last.read_bytes():
            contents[best] = contents[last]
        elif unfinished(_network(content)) == NAME:
            contents[best] = conversion.convert(content)
    write_json(folder / PLAN, conversion.plan.to_json(), replace=True)
    write_json(folder / RECORD, {**record, "converted": conversion.figures}, replace=True)
    for path in (best, last):
        if path in contents:
            write_checkpoint(path, contents[path], replace=True)


def finish_killed_run(folder: Path) -> Path:
    """Do what a run that was killed after its last epoch left undone, and return its best checkpoint.

    Args:
        folder: The run's folder.

    Raises:
        YoloPruneError: As in `convert_run`.
    """
    convert_run(folder)
    return stripped(folder)


class Conversion:
    """Converts the checkpoints of one run, all by the same masks.

    Args:
        record: The run's record.
        source: The checkpoint that the slim ones come from.

    Attributes:
        figures: What the last conversion found, as plain values.
    """

    def __init__(self, record: Mapping[str, Any], source: Path) -> None:
        self._record, self._source, self._digest = record, source, sha256(source)
        self.figures: dict[str, Any] = {}
        self._plan: PrunePlan | None = None

    @property
    def plan(self) -> PrunePlan:
        """The plan of the last conversion."""
        assert self._plan is not None  # something was converted before
        return self._plan

    def convert(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's content with a slim network, and without the optimizer of the other one."""
        trained = content.get("ema") or content["model"]
        network = bare_copy(trained).double()
        dtype = next(network_of(trained).parameters()).dtype
        slim = self._slim(network)
        return {**content, "ema": slim.to(dtype), "model": None, "optimizer": None}

    def _slim(self, network: Any) -> nn.Module:
        """Return the slim network of one with compactors, both in fp64."""
        state = _state(network)
        _require_gone(network, state["masked"])
        plain: Any = merged(copied(network))
        graph = trace_model(bare_copy(plain))
        targets = {path: graph.axes[f"{path}.weight", 0].channels for path in state["masked"]}
        keep = ~masked_channels(graph, targets, state["masked"])
        self._plan = plan = plan_from_keep(
            graph, keep, source_sha256=self._digest, imgsz_px=self._record["imgsz_px"], choice=self._choice()
        )
        slim = slim_copy(plain, graph, keep)
        proof = verifier(plain, graph).verify(slim, keep).require()
        image = random_image(network, 2 * graph.cost.imgsz_px)
        before, after = (outputs(model, image, host_for(model), training=False) for model in (network, slim))
        difference, largest = max_abs_error(before, after), max(float(output.abs().max()) for output in before)
        if not difference <= LOSSLESS * largest:  # also catches NaN
            raise VerificationError(
                f"max |converted - before| = {difference:.1e}, at outputs up to {largest:.1e}",
                expected=f"at most {LOSSLESS:g} of them: only rows that make nothing may go",
                remedy=f"nothing was converted; '{self._source}' has the trained network",
            )
        source = Checkpoint(
            path=self._source, sha256=self._digest, model=plain, stored_dtype=torch.float16, train_args={}
        )
        mark_cut(slim, source, plan, max_abs_error=proof.max_abs_error)
        require_widths(slim, "after conversion")
        self.figures = {
            "macs": plan.after.macs / plan.before.macs,
            "difference": difference,
            "largest_output": largest,
            "max_abs_error": proof.max_abs_error,
        }
        LOGGER.info(
            f"resrep: {plan.after.macs / plan.before.macs:.1%} of the MACs and {plan.after.params:,} parameters are "
            f"left; max |converted - before| = {difference:.1e}, max |silenced - sliced| = {proof.max_abs_error:.1e} "
            "in fp64"
        )
        return slim

    def _choice(self) -> dict[str, Any]:
        options = self._record["options"]
        pull = {key: self._record[key] for key in ("strength", "momentum")}
        return {"method": NAME, "target_macs": options["target"], **pull, **options["constraints"]}


def _network(content: Any) -> Any:
    return network_of(content.get("ema") or content["model"])


def _state(network: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = getattr(network, MARKER)[NAME]
    return state


def _require_gone(network: nn.Module, masked: Mapping[str, list[int]]) -> None:
    """Refuse masked rows that still make something."""
    norms = [row_norms(compactor_behind(network, path).weight)[rows] for path, rows in masked.items() if rows]
    largest = float(torch.cat(norms).max()) if norms else 0.0
    if not largest < GONE:  # also catches NaN
        raise VerificationError(
            f"the largest masked row has norm {largest:.1e}",
            expected=f"below {GONE:g} at the end of the training",
            remedy="train anew for more epochs or with a higher resrep.strength; nothing was converted",
        )
