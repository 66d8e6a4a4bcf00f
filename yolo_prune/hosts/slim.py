"""Slim checkpoints, whatever the host: what is read, the marker that a slim model carries, and complete writing."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo_prune import __version__
from yolo_prune.errors import CheckpointError, VerificationError
from yolo_prune.files import new_file
from yolo_prune.plan import PrunePlan
from yolo_prune.surgery.copying import copied

MARKER = "yolo_prune"
"""Attribute of a slim model that carries its provenance: plain values only, so that it pickles no class of ours."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        path: Where it was read from.
        sha256: Hash of the file.
        model: The model, float32, on the CPU, in evaluation mode.
        stored_dtype: Type of the stored weights.
        train_args: The host's training arguments that the file carries.
    """

    path: Path
    sha256: str
    model: nn.Module
    stored_dtype: torch.dtype
    train_args: dict[str, Any]


def write_checkpoint(path: Path, content: Mapping[str, Any], *, replace: bool = False) -> None:
    """Write a checkpoint, completely or not at all.

    It is serialised in memory first: on a full disk `torch.save` ends in an internal error of its archive writer.

    Raises:
        OutputError: `path` exists and `replace` is false, or it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    with new_file(path, replace=replace) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def slim_content(
    slim: nn.Module, source: Checkpoint, plan: PrunePlan, *, dtype: torch.dtype, folded: bool, recalibrated: int
) -> dict[str, Any]:
    """Return what the checkpoints of both hosts hold of a slim model; each adds its own keys.

    Args:
        slim: The slim model; it is left as it is.
        source: The checkpoint that it was cut from.
        plan: The plan that was applied.
        dtype: Type of the stored weights; the source's own loses nothing if weights were only selected.
        folded: Whether constants of removed channels were folded in, for the record.
        recalibrated: Batches on which batch norms were recalibrated, for the record.
    """
    model = copied(slim).to(dtype)
    setattr(model, MARKER, {**provenance(slim, source, plan), "folded": folded, "recalibrated": recalibrated})
    return checkpoint_content(model)


def checkpoint_content(model: nn.Module) -> dict[str, Any]:
    """Return what a checkpoint holds of a model that is not being trained, whatever the host."""
    nothing = dict.fromkeys(("best_fitness", "ema", "updates", "optimizer"))
    return {"epoch": -1, "model": model, "date": datetime.now(timezone.utc).isoformat(), **nothing}


def provenance(slim: nn.Module, source: Checkpoint, plan: PrunePlan) -> dict[str, Any]:
    """Return where a slim model comes from, as plain values."""
    return {
        "version": __version__,
        "source_sha256": source.sha256,
        "plan": plan.to_json(),
        "before": vars(plan.before).copy(),
        "after": vars(plan.after).copy(),
        "widths": widths(slim),
        "lineage": lineage(source),
        **{key: value for key, value in getattr(source.model, MARKER, {}).items() if key == ZEROS},
    }


def mark_cut(slim: nn.Module, source: Checkpoint, plan: PrunePlan, *, max_abs_error: float) -> None:
    """Mark a network from which a training removed channels, with what the proof found."""
    shown = {PROOF: max_abs_error, "folded": False, "recalibrated": 0}
    setattr(slim, MARKER, {**provenance(slim, source, plan), **shown})


def lineage(source: Checkpoint) -> list[str]:
    """Return the hashes of the checkpoints that a source was made from, the oldest first."""
    earlier = getattr(source.model, MARKER, {})
    return [*earlier["lineage"], earlier["source_sha256"]] if "lineage" in earlier else []


def is_slim(model: nn.Module) -> bool:
    """Return whether a model carries our marker: no yaml describes its network, so it is never built anew."""
    return isinstance(getattr(model, MARKER, None), dict)


def mark(model: nn.Module, **values: Any) -> None:
    """Begin the marker of a model, or renew its widths, and add plain values to it."""
    setattr(model, MARKER, {"version": __version__, **getattr(model, MARKER, {}), "widths": widths(model), **values})


PROOF = "max_abs_error"
"""Key of the marker: the largest max |silenced - sliced| of the steps in which a training removed channels."""

UNFINISHED = "unfinished"
"""Key of the marker that names the method whose structures a network has while it is trained."""


ZEROS = "zeros"
"""Key of the marker that names the parameters whose zeros were pruned one by one: training keeps them."""


def require_no_zeros(model: nn.Module, what: str) -> None:
    """Refuse a network whose zeros were pruned one by one.

    Raises:
        CheckpointError: It has such zeros, which `what` would fill.
    """
    if getattr(model, MARKER, {}).get(ZEROS):
        raise CheckpointError(
            f"{what} with a checkpoint whose zeros are kept (method=unstructured or stripes made them)",
            expected="a network without them: it would fill them",
            remedy="do this first, and prune weights or stripes of the result",
        )


def unfinished(model: nn.Module) -> str | None:
    """Return the name of the method whose structures are still in a network; None if none are."""
    name = getattr(model, MARKER, {}).get(UNFINISHED)
    return None if name is None else str(name)


def widths(model: nn.Module) -> dict[str, list[int]]:
    """Return [output, input per group] channels of every convolution by its path."""
    return {
        path: list(module.weight.shape[:2])
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
    }


def require_widths(model: nn.Module, when: str) -> None:
    """Assert that a slim model still has the widths that its plan gave it; the classes' last layers may differ.

    Raises:
        VerificationError: A width changed.
    """
    planned, found = getattr(model, MARKER)["widths"], widths(model)
    wrong = {path: found.get(path) for path, size in planned.items() if found.get(path) != size}
    if wrong:
        path, size = next(iter(wrong.items()))
        raise VerificationError(
            f"{when}: {len(wrong)} layers changed their width, first '{path}': {size}",
            expected=f"{planned[path]}, as pruned",
            remedy="train slim checkpoints with yolo-prune: stock training rebuilds the dense network",
        )
