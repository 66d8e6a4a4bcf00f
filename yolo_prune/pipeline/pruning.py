"""Pruning, whatever the host: checkpoint -> graph -> plan -> slim model -> proof -> checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from yolo_prune.allocation import ATTENTION, PATHS, Allocation, Budget, Constraints, allocate
from yolo_prune.allocation.budget import require_ratio
from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.configuration import changed, json_setting, read_mapping, require_choice, require_least, setting
from yolo_prune.errors import ConfigError
from yolo_prune.export.profile import Profile
from yolo_prune.files import require_new_outputs
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.importance import BY_FILTERS, CRITERIA, Evidence, score_channels
from yolo_prune.importance.evidence import Need
from yolo_prune.pipeline.latency import LatencyOutcome, Timing, keep_for_latency
from yolo_prune.plan import PrunePlan, plan_from_keep
from yolo_prune.report import quantity, render
from yolo_prune.search.sensitivities import Sensitivities
from yolo_prune.surgery import Folding, Verification, Verifier, fold_constants


@dataclass(kw_only=True)
class PruneConfig:
    """Settings of `prune`."""

    model: str = setting(help="trained checkpoint (.pt) to prune")
    out: str = setting(help="where the slim checkpoint shall stand; must not exist")
    target_macs: float | None = setting(None, help="fraction of the MACs that is kept, e.g. 0.5")
    target_params: float | None = setting(None, help="fraction of the parameters that is kept, instead of target_macs")
    target_latency: float | None = setting(
        None, help="fraction of the dense model's latency, measured; instead of target_macs, with profile="
    )
    profile: str | None = setting(None, help="what `profile` wrote: how latency depends on widths, on the device")
    confirm: bool = setting(True, help="time the slim model before target_latency is promised")
    criterion: str = setting("l2", help=f"which channels matter: {', '.join(CRITERIA)}")
    allocation: str = setting("global", help=f"how many go where: {', '.join(PATHS)}")
    reduction: str = setting("mean", help="how a channel's scores are combined: sum, mean, max")
    readers: bool = setting(False, help="slices of weights that read a channel count in its score, like its filters")
    normalization: str | None = setting(
        None, help="none or mean (divide by the group's mean); default: the criterion's"
    )
    min_channels: int = setting(8, help="fewest that a group keeps", unit="channels")
    max_fraction: float = setting(0.9, help="largest fraction of a group that may go")
    round_to: int | None = setting(
        None, help="kept widths are multiples of this; default: 8, or what the profile says", unit="channels"
    )
    ratios: str | None = setting(None, help="YAML file of layer: fraction that goes, instead of allocation")
    sensitivity: str | None = setting(None, help="what `sensitivity` wrote, instead of allocation")
    data: str | None = setting(None, help="data yaml, for criteria that look at training images, and for recalibrate")
    batches: int = setting(16, help="batches that criteria look at")
    batch: int = setting(16, help="images of a batch")
    workers: int = setting(2, help="loader processes")
    attention: str = setting("width", help="what attention loses: width (of every head alike), heads (whole), none")
    imgsz: int = setting(640, help="image side at which MACs are counted", unit="px")
    recalibrate: int = setting(
        0, help="measure batch-norm statistics anew on so many batches of data=, after the proof", unit="batches"
    )
    fold: bool = setting(False, help="fold the constants of removed channels into their readers")
    plan: str | None = setting(None, help="apply this plan (JSON) instead of choosing")
    save_plan: str | None = setting(None, help="also write the plan to this JSON file; must not exist")
    json: str | None = json_setting("the table")


ROUND_TO = 8
"""Widths are multiples of this unless something else is known; most kernels like it."""

CHOICES = ("target_macs", "target_params", "target_latency", "profile", "criterion", "allocation", "reduction",
           "readers", "normalization", "min_channels", "max_fraction", "round_to", "attention", "batches", "ratios",
           "sensitivity")  # fmt: skip
"""Settings that choose channels, which a plan has done already."""


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
        exact, border, skipped = (len(paths) for paths in vars(self.folding).values())
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
    out = Path(config.out)
    require_new_outputs({"out": config.out, "save_plan": config.save_plan, "json": config.json})
    chosen = None if config.plan else choices(config)
    require_settings(host, config)
    source = host.read(Path(config.model))
    graph = host.trace(source.model)
    plan, latency = make_plan(host, source, graph, config, *chosen) if chosen else (_known_plan(config), None)
    plan.require_source(source.sha256)
    keep = plan.keep_mask(graph)
    slim = host.cut(source.model, graph, keep)
    proof = host.verifier(source.model, graph).verify(slim, keep).require()
    folding = None
    if config.fold:
        folding = fold_constants(source.model, slim, graph, keep, _fold_example(graph, source.model))
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
    budget: Budget | None,
    allocation: Allocation,
) -> tuple[PrunePlan, LatencyOutcome | None]:
    """Choose the channels to keep; with a target for it, by latency."""
    known = None
    if config.target_latency is not None:
        known = Profile.load(Path(str(config.profile)))
        if config.round_to is None:  # what the device was seen to like, not folklore
            allocation = replace(allocation, constraints=replace(allocation.constraints, round_to=known.fit.multiple))
    if config.sensitivity:
        measured = Sensitivities.load(Path(config.sensitivity))
        measured.require(source_sha256=source.sha256, criterion=config.criterion)
        allocation = replace(allocation, drops=measured.drops)
    criterion = CRITERIA[config.criterion]
    scores = score_channels(
        graph,
        host.collect(source.model, graph, criterion.needs, config)
        if criterion.needs and host.collect  # `require_data` saw to it
        else Evidence.of(source.model),
        criterion,
        reduction=config.reduction,  # type: ignore[arg-type]  # checked by `choices`
        normalization=config.normalization,  # type: ignore[arg-type]
        readers=config.readers,
    )
    outcome = None
    if known is not None:
        keep, outcome = keep_for_latency(
            source, graph, scores, allocation,
            target=float(config.target_latency or 0.0), profile=known, timing=host.timing if config.confirm else None,
        )  # fmt: skip
    else:
        keep = allocate(graph, scores, budget, allocation)
    choice = {
        "criterion": config.criterion,
        "reduction": config.reduction,
        "readers": config.readers,
        "normalization": config.normalization or CRITERIA[config.criterion].normalization,
        "allocation": config.allocation,
        **asdict(allocation.constraints),
    }
    if budget is not None:
        choice[f"target_{budget.unit}"] = budget.ratio
    if allocation.ratios is not None:
        choice |= {"allocation": "ratios", "ratios": dict(allocation.ratios)}
    if allocation.drops is not None:
        choice["allocation"] = "sensitivity"
    if outcome is not None:
        choice |= outcome.to_json()
    if criterion.needs:
        choice |= {"data": Path(str(config.data)).name, "batches": config.batches, "batch": config.batch}
    imgsz_px = config.imgsz if known is None else known.imgsz_px
    return plan_from_keep(graph, keep, source_sha256=source.sha256, imgsz_px=imgsz_px, choice=choice), outcome


def choices(config: PruneConfig) -> tuple[Budget | None, Allocation]:
    """Check everything that can be checked before the checkpoint is read.

    Raises:
        ConfigError: No target or two, an unknown name, or a number that is out of range.
    """
    require_choice("criterion", config.criterion, CRITERIA)
    require_choice("allocation", config.allocation, PATHS)
    require_choice("reduction", config.reduction, ("sum", "mean", "max"))
    require_choice("normalization", config.normalization or "none", ("none", "mean"))
    if config.readers and config.criterion not in BY_FILTERS:
        raise ConfigError(
            f"readers=true with criterion={config.criterion}, which looks at no filters",
            expected=f"one that does: {', '.join(sorted(BY_FILTERS))}",
        )
    require_choice("attention", config.attention, ATTENTION)
    targets = {"macs": config.target_macs, "params": config.target_params, "latency": config.target_latency}
    given = {unit: ratio for unit, ratio in targets.items() if ratio is not None}
    if len(given) > 1 or not (given or config.ratios):
        raise ConfigError(
            f"{len(given)} targets given",
            expected="one of target_macs=, target_params=, target_latency= (or ratios= or plan=)",
            remedy="target_macs=0.5",
        )
    files = [f"{name}=" for name in ("ratios", "sensitivity") if getattr(config, name)]
    ways = [*changed(config, ("allocation",)), *files]
    if len(ways) > 1:
        raise ConfigError(" together with ".join(ways), expected="one of them: each says how many channels go where")
    _require_profile(config)
    require_imgsz(config.imgsz)
    for unit, ratio in given.items():
        require_ratio(unit, ratio)
    budgets = [
        Budget(unit=unit, ratio=ratio, imgsz_px=config.imgsz)  # type: ignore[arg-type]
        for unit, ratio in given.items()
        if unit != "latency"  # the profile makes that one
    ]
    constraints = Constraints(
        min_channels=config.min_channels,
        max_fraction=config.max_fraction,
        round_to=ROUND_TO if config.round_to is None else config.round_to,
        attention=config.attention,  # type: ignore[arg-type]  # checked above
    )
    ratios = read_mapping(Path(config.ratios), what="layer: fraction that goes") if config.ratios else None
    return next(iter(budgets), None), Allocation(path=config.allocation, constraints=constraints, ratios=ratios)


def _require_profile(config: PruneConfig) -> None:
    """Refuse a latency without a profile, a profile without a latency, and settings that the profile has decided.

    Raises:
        ConfigError: One of them, or a profile that cannot be read.
    """
    if config.target_latency is None:
        for word in changed(config, ("profile", "confirm")):
            raise ConfigError(f"{word} without target_latency=", expected="both, or neither")
        return
    if config.profile is None:
        raise ConfigError(
            f"target_latency={config.target_latency} without profile=",
            expected="profile: what `yolo-prune profile` measured on the device",
            remedy="yolo-prune profile model=... backend=... out=profile",
        )
    known = Profile.load(Path(config.profile))
    if config.imgsz != known.imgsz_px:
        raise ConfigError(
            f"imgsz={config.imgsz}",
            expected=f"{known.imgsz_px}, at which the profile was measured",
            remedy=f"imgsz={known.imgsz_px}, or another profile",
        )


def _fold_example(graph: ChannelGraph, model: nn.Module) -> torch.Tensor:
    """Return a random image four times the traced one's side, so that most positions lie away from borders."""
    side = 4 * graph.cost.imgsz_px
    channels = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels
    return torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0))


def require_settings(host: PruningHost, config: PruneConfig) -> None:
    """Refuse settings that contradict each other, lack their data, or ask for what the host cannot do.

    Raises:
        ConfigError: One of them, or a number out of range.
    """
    for word in changed(config, CHOICES) if config.plan else ():
        raise ConfigError(f"plan= together with {word}", expected="one of them: a plan holds every choice already")
    if config.fold and config.recalibrate:
        raise ConfigError(
            "fold=true together with recalibrate=",
            expected="one of them: recalibration measures anew the means into which constants are folded",
        )
    if config.target_latency is not None and config.confirm and host.timing is None:
        raise ConfigError("target_latency= on this host", expected="confirm=false: its networks cannot be timed here")
    wishes: dict[str, Any] = {}
    if not config.plan and CRITERIA[config.criterion].needs:
        wishes[f"criterion={config.criterion}"] = host.collect
    if config.recalibrate:
        wishes[f"recalibrate={config.recalibrate}"] = host.recalibrate
    for wish, way in wishes.items():
        if way is None:
            raise ConfigError(f"{wish} on this host", expected="what needs no training images", remedy=_without_data())
        if config.data is None:
            raise ConfigError(
                f"{wish} without data=",
                expected="data: a data yaml, whose training images it looks at",
                remedy=f"data=data.yaml, or {_without_data()}",
            )
    for word in changed(config, ("data", "batches", "batch", "workers")) if not wishes else ():
        raise ConfigError(f"{word}, which nothing looks at", expected="criterion= or recalibrate= that needs it")
    require_least(config, batches=1, batch=1, workers=0, recalibrate=0)


def _without_data() -> str:
    names = [name for name, criterion in CRITERIA.items() if not criterion.needs]
    return f"a criterion that looks at weights only: {', '.join(names)}"
