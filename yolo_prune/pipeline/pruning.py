"""Pruning, whatever the host: checkpoint -> graph -> plan -> slim model -> proof -> checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from yolo_prune.allocation import allocate
from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.files import require_new_outputs, sha256
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.importance import Evidence, score_channels
from yolo_prune.importance.chance import RANDOM, seeded
from yolo_prune.importance.evidence import Need
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.pipeline.latency import LatencyOutcome, Timing, keep_for_latency
from yolo_prune.pipeline.prune_config import Choices, PruneConfig, choices, decided, require_settings
from yolo_prune.plan import PrunePlan, plan_from_keep
from yolo_prune.report import quantity, render
from yolo_prune.surgery import Folding, Verification, Verifier, fold_constants


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What `prune` did."""

    out: Path
    plan: PrunePlan
    verification: Verification
    widths: list[tuple[str, int, int]]
    folding: Folding | None = None
    recalibrated: int = 0
    latency: LatencyOutcome | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plan, proof and costs as plain values."""
        folding = asdict(self.folding) if self.folding else None
        proof = asdict(self.verification)
        return {
            "out": str(self.out),
            "verification": proof,
            "plan": self.plan.to_json(),
            "folding": folding,
            "recalibrated_batches": self.recalibrated,
            "latency": self.latency.to_json() if self.latency else None,
        }

    def table(self) -> str:
        """Return costs before and after, and what was proven."""
        before, after, proof = self.plan.before, self.plan.after, self.verification
        rows = [
            [name, quantity(dense), quantity(slim), f"{slim / dense:.1%}"]
            for name, dense, slim in (
                (f"MACs at {self.plan.imgsz_px} px", before.macs, after.macs),
                ("parameters", before.params, after.params),
            )
        ]
        narrowed = sum(kept < width for _, width, kept in self.widths)
        return (
            render(["", "dense", "slim", "kept"], rows)
            + f"{narrowed} of {len(self.widths)} channel groups narrowed\n"
            + f"verified: max |silenced - sliced| = {proof.max_abs_error:.1e} in fp64, "
            + f"{proof.macs_counted:,} MACs counted = predicted (at {proof.imgsz_px} px)\n"
            + self._folded()
            + self._recalibrated()
            + (self.latency.in_words() if self.latency else "")
            + f"slim checkpoint: {self.out}\n"
        )

    def _recalibrated(self) -> str:
        batches = self.recalibrated
        return f"batch norms recalibrated on {batches} batches after the proof\n" if batches else ""

    def _folded(self) -> str:
        """Say what folding did, after the proof, and where it is an approximation."""
        if self.folding is None:
            return ""
        fold = self.folding
        exact, border, skipped = len(fold.exact), len(fold.at_border), len(fold.skipped)
        return (
            f"folded constants of removed channels into {exact + border} layers after the proof: exact in {exact}, "
            f"inexact at the border of {border} padded ones; {skipped} could not take them\n"
        )


class Writer(Protocol):
    """Writes a slim checkpoint; see `hosts.ultralytics.checkpoints.write_slim`."""

    def __call__(
        self,
        path: Path,
        slim: nn.Module,
        source: Checkpoint,
        plan: PrunePlan,
        *,
        dtype: torch.dtype,
        folded: bool,
        recalibrated: int,
    ) -> None:
        """Write it."""
        ...


@dataclass(frozen=True, kw_only=True)
class PruningHost:
    """What pruning has to know of a host.

    Attributes:
        read: Reads a checkpoint without running its code.
        trace: Returns the channel graph of its model.
        cut: Returns a slim copy of a model by a keep mask.
        verifier: Returns what proves slim copies of a model.
        write: Writes a slim checkpoint that the host loads.
        collect: Gathers what criteria need of training batches; None where the host cannot.
        recalibrate: Measures batch-norm statistics anew, in place, at a side of images in px, and returns the number of
            batches; None where the host cannot.
        timing: Opens what times slim networks; None where the host cannot. Refuses a profile of another machine.
    """

    read: Callable[[Path], Checkpoint]
    trace: Callable[[nn.Module], ChannelGraph]
    cut: Callable[[nn.Module, ChannelGraph, BoolArray], nn.Module]
    verifier: Callable[[nn.Module, ChannelGraph], Verifier]
    write: Writer
    collect: Callable[[nn.Module, ChannelGraph, Collection[Need], PruneConfig], Evidence] | None = None
    recalibrate: Callable[[nn.Module, PruneConfig, int], int] | None = None
    timing: Timing | None = None


def prune_with(host: PruningHost, config: PruneConfig) -> PruneResult:
    """Prune a checkpoint of a host, prove the result, then write it.

    Raises:
        YoloPruneError: Bad input (nothing is written), or a proof that failed (nothing is written).
    """
    config, out = decided(config), Path(config.out)
    require_new_outputs({"out": config.out, "save_plan": config.save_plan, "json": config.json})
    chosen = None if config.plan else choices(config)
    require_settings(
        config,
        collects=host.collect is not None,
        recalibrates=host.recalibrate is not None,
        times=host.timing is not None,
    )
    source = host.read(Path(config.model))
    graph = host.trace(source.model)
    plan, latency = make_plan(host, source, graph, config, chosen) if chosen else (_known_plan(config), None)
    plan.require_source(source.sha256)
    keep = plan.keep_mask(graph)
    slim = host.cut(source.model, graph, keep)
    proof = host.verifier(source.model, graph).verify(slim, keep).require()
    folding = None
    if config.fold:
        folding = fold_constants(source.model, slim, graph, keep, _fold_example(graph))
    batches = host.recalibrate(slim, config, plan.imgsz_px) if config.recalibrate and host.recalibrate else 0
    # Selected weights keep their type; folded ones are new numbers and would lose digits in half precision.
    dtype = torch.float32 if config.fold else source.stored_dtype
    if config.save_plan:
        plan.save(Path(config.save_plan))
    host.write(out, slim, source, plan, dtype=dtype, folded=config.fold, recalibrated=batches)
    kept = graph.kept_widths(keep)
    widths = [(group.name, group.width, int(size)) for group, size in zip(graph.groups, kept, strict=True)]
    return PruneResult(
        out=out, plan=plan, verification=proof, widths=widths, folding=folding, recalibrated=batches, latency=latency
    )


def _known_plan(config: PruneConfig) -> PrunePlan:
    return PrunePlan.load(Path(str(config.plan)))


def make_plan(
    host: PruningHost,
    source: Checkpoint,
    graph: ChannelGraph,
    config: PruneConfig,
    chosen: Choices,
) -> tuple[PrunePlan, LatencyOutcome | None]:
    """Choose the channels to keep; with a target for it, by latency."""
    allocation = chosen.allocation_of(source.sha256, config.criterion)
    criterion = seeded(CRITERIA[config.criterion], config.seed)
    scores = score_channels(
        graph,
        host.collect(source.model, graph, criterion.needs, config)
        if criterion.needs and host.collect  # `require_settings` saw to it
        else Evidence.of(source.model),
        criterion,
        reduction=config.reduction,  # type: ignore[arg-type]  # checked by `choices`
        normalization=config.normalization,  # type: ignore[arg-type]
        consumers=config.consumers,
    )
    outcome = None
    if chosen.latency is not None and chosen.profile is not None:
        keep, outcome = keep_for_latency(
            source, graph, scores, allocation,
            target=chosen.latency, profile=chosen.profile, timing=host.timing if config.confirm else None,
        )  # fmt: skip
    else:
        keep = allocate(graph, scores, chosen.budget, allocation)
    choice = {
        "criterion": config.criterion,
        "reduction": config.reduction,
        "consumers": config.consumers,
        "normalization": config.normalization or CRITERIA[config.criterion].normalization,
        "allocation": allocation.path,
        **asdict(allocation.constraints),
    }
    if chosen.budget is not None:
        choice[f"target_{chosen.budget.unit}"] = chosen.budget.ratio
    if allocation.ratios is not None:
        choice |= {"allocation": "ratios", "ratios": dict(allocation.ratios)}
    if allocation.drops is not None:
        choice |= {"allocation": "sensitivity", "sensitivity_sha256": sha256(Path(str(config.sensitivity)))}
    if outcome is not None:
        choice |= outcome.to_json()
    if config.criterion == RANDOM.name:
        choice["seed"] = config.seed
    if criterion.needs:
        choice |= {"data": Path(str(config.data)).name, "batches": config.batches, "batch": config.batch}
    return plan_from_keep(graph, keep, source_sha256=source.sha256, imgsz_px=config.imgsz, choice=choice), outcome


def _fold_example(graph: ChannelGraph) -> torch.Tensor:
    """Return a random image four times the traced one's side, so that most positions lie away from borders."""
    side = 4 * graph.cost.imgsz_px
    return torch.rand(1, graph.image_channels, side, side, generator=torch.Generator().manual_seed(0))
