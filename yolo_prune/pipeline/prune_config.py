"""Settings of `prune`, and what they mean: everything that can be said of them before the checkpoint is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yolo_prune.allocation import ATTENTION, PATHS, Allocation, Budget, Constraints
from yolo_prune.allocation.budget import require_ratio
from yolo_prune.configuration import changed, json_setting, read_mapping, require_choice, require_least, setting
from yolo_prune.errors import ConfigError
from yolo_prune.export.profile import Profile
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.importance.chance import RANDOM
from yolo_prune.importance.plugged import BY_FILTERS, CRITERIA
from yolo_prune.search.sensitivities import Sensitivities

AUTO = "auto"
"""A criterion and an allocation that are chosen by what is known of them."""

WITH_DATA, WITHOUT_DATA = "fisher", "l2"
"""What `criterion=auto` stands for: the best of those measured (README, "Which channels matter"), and the best known of
those that look at weights alone, none of which was better than chance there."""


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
    criterion: str = setting(
        AUTO, help=f"which channels matter: {', '.join(CRITERIA)}; auto: {WITH_DATA} with data=, {WITHOUT_DATA} without"
    )
    allocation: str = setting(
        AUTO,
        help=f"how many go where: {', '.join(PATHS)}; auto: global where the criterion's scores compare between "
        "layers, uniform otherwise",
    )
    reduction: str = setting("mean", help="how a channel's scores are combined: sum, mean, max")
    consumers: bool = setting(False, help="slices of weights that read a channel count in its score, like its filters")
    normalization: str | None = setting(
        None, help="none or mean (divide by the group's mean); default: the criterion's"
    )
    seed: int = setting(0, help="seed of criterion=random")
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
    fold: bool = setting(False, help="fold the constants of removed channels into their consumers")
    plan: str | None = setting(None, help="apply this plan (JSON) instead of choosing")
    save_plan: str | None = setting(None, help="also write the plan to this JSON file; must not exist")
    json: str | None = json_setting("the table")


ROUND_TO = 8
"""Widths are multiples of this unless something else is known; most kernels like it."""

UNITS = ("macs", "params", "latency")
"""What `target_macs=` and its siblings are fractions of."""

CHOICES = ("target_macs", "target_params", "target_latency", "profile", "criterion", "allocation", "reduction",
           "consumers", "normalization", "seed", "min_channels", "max_fraction", "round_to", "attention", "batches",
           "ratios", "sensitivity")  # fmt: skip
"""Settings that choose channels, which a plan has done already."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How channels are chosen.

    Attributes:
        budget: What the slim model may cost; None with a latency, or with ratios alone.
        allocation: How that is met.
        latency: Fraction of the dense model's latency that is wanted instead.
        profile: What predicts it.
        sensitivities: What groups cost, if that decides how many channels go where.
    """

    budget: Budget | None
    allocation: Allocation
    latency: float | None = None
    profile: Profile | None = None
    sensitivities: Sensitivities | None = None

    def allocation_of(self, source_sha256: str, criterion: str) -> Allocation:
        """Return the allocation for a checkpoint.

        Raises:
            ConfigError: The sensitivities are of another one, or of another criterion.
        """
        if self.sensitivities is None:
            return self.allocation
        self.sensitivities.require(source_sha256=source_sha256, criterion=criterion)
        return replace(self.allocation, drops=self.sensitivities.drops)


def decided(config: PruneConfig) -> PruneConfig:
    """Return the settings with the criterion that `auto` stands for; those of a plan have none.

    Raises:
        ConfigError: Sensitivities, which are of one criterion, that cannot be read, or something beside them that says
            how many channels go where as well.
    """
    if config.criterion != AUTO or config.plan:
        return config
    _require_one_way(config)  # before any of them is read
    if config.sensitivity:
        return replace(config, criterion=Sensitivities.load(Path(config.sensitivity)).criterion)
    return replace(config, criterion=WITH_DATA if config.data else WITHOUT_DATA)


def _path(config: PruneConfig) -> str:
    """Return the allocation that is asked for.

    Scores that are divided by the mean of their group say nothing of the group itself: ranked together, they take most
    where scores happen to spread, and leave less mAP than as much of every group (README, "What recipes are worth").
    """
    if config.allocation != AUTO:
        return config.allocation
    return "uniform" if (config.normalization or CRITERIA[config.criterion].normalization) == "mean" else "global"


def choices(config: PruneConfig) -> Choices:
    """Check everything that can be checked before the checkpoint is read.

    Args:
        config: Settings that are `decided`.

    Raises:
        ConfigError: No target or two, an unknown name, or a number that is out of range.
    """
    require_choice("criterion", config.criterion, CRITERIA)
    require_choice("allocation", config.allocation, [AUTO, *PATHS])
    require_choice("reduction", config.reduction, ("sum", "mean", "max"))
    require_choice("normalization", config.normalization or "none", ("none", "mean"))
    if config.consumers and config.criterion not in BY_FILTERS:
        raise ConfigError(
            f"consumers=true with criterion={config.criterion}, which looks at no filters",
            expected=f"one that does: {', '.join(sorted(BY_FILTERS))}",
        )
    if config.seed and config.criterion != RANDOM.name:
        raise ConfigError(
            f"seed={config.seed} with criterion={config.criterion}, which draws nothing",
            expected=f"criterion={RANDOM.name}",
        )
    require_least(config, seed=0)
    require_choice("attention", config.attention, ATTENTION)
    given = target_of(config, UNITS, instead=("ratios", "plan"))
    _require_one_way(config)
    profile = _profile(config)
    require_imgsz(config.imgsz)
    budgets = [
        Budget(unit=unit, ratio=ratio, imgsz_px=config.imgsz)  # type: ignore[arg-type]
        for unit, ratio in given.items()
        if unit != "latency"  # the profile makes that one
    ]
    constraints = Constraints(
        min_channels=config.min_channels,
        max_fraction=config.max_fraction,
        round_to=multiple_of(config.round_to, profile),
        attention=config.attention,  # type: ignore[arg-type]  # checked above
    )
    ratios = read_mapping(Path(config.ratios), what="layer: fraction that goes") if config.ratios else None
    return Choices(
        budget=next(iter(budgets), None),
        allocation=Allocation(path=_path(config), constraints=constraints, ratios=ratios),
        latency=config.target_latency,
        profile=profile,
        sensitivities=Sensitivities.load(Path(config.sensitivity)) if config.sensitivity else None,
    )


def _require_one_way(config: PruneConfig) -> None:
    files = [f"{name}=" for name in ("ratios", "sensitivity") if getattr(config, name)]
    ways = [*changed(config, ("allocation",)), *files]
    if len(ways) > 1:
        raise ConfigError(" together with ".join(ways), expected="one of them: each says how many channels go where")


def _profile(config: PruneConfig) -> Profile | None:
    """Return what predicts latencies; refuse a latency without a profile, and a profile without a latency.

    Raises:
        ConfigError: One of them, or a profile that cannot be read.
    """
    if config.target_latency is None:
        for word in changed(config, ("profile", "confirm")):
            raise ConfigError(f"{word} without target_latency=", expected="both, or neither")
        return None
    return loaded_profile(config.profile, target_latency=config.target_latency, imgsz_px=config.imgsz)


def target_of(config: Any, units: Sequence[str], *, instead: Sequence[str] = ()) -> dict[str, float]:
    """Return the target that settings give, a fraction by its unit; none where other settings say enough.

    Args:
        config: Settings with a field `target_UNIT` for each unit.
        units: Some of `UNITS`.
        instead: Names of settings that may stand in the place of a target.

    Raises:
        ConfigError: Several targets, none, or one that is no fraction.
    """
    ratios = {unit: getattr(config, f"target_{unit}") for unit in units}
    given = {unit: ratio for unit, ratio in ratios.items() if ratio is not None}
    if len(given) > 1 or not (given or any(getattr(config, name) for name in instead)):
        others = f" (or {' or '.join(f'{name}=' for name in instead)})" if instead else ""
        raise ConfigError(
            f"{len(given)} targets given",
            expected=f"one of {', '.join(f'target_{unit}=' for unit in units)}{others}",
            remedy="target_macs=0.5",
        )
    for unit, ratio in given.items():
        require_ratio(unit, ratio)
    return given


def loaded_profile(path: str | None, *, target_latency: float | None, imgsz_px: int) -> Profile | None:
    """Return what predicts latencies; None where nothing asks for it.

    Args:
        path: Of what `profile` wrote.
        target_latency: The target that needs it, if there is one.
        imgsz_px: Image side at which it has to predict.

    Raises:
        ConfigError: The target has none, or it cannot be read or is of another image side.
    """
    if path is None:
        if target_latency is not None:
            raise ConfigError(
                f"target_latency={target_latency} without profile=",
                expected="profile: what `yolo-prune profile` measured on the device",
                remedy="yolo-prune profile model=... backend=... out=profile",
            )
        return None
    known = Profile.load(Path(path))
    known.require_side(imgsz_px)
    return known


def multiple_of(round_to: int | None, profile: Profile | None) -> int:
    """Return what was asked for, or what the device was seen to like, which is no folklore."""
    if round_to is not None:
        return round_to
    return ROUND_TO if profile is None else profile.fit.multiple


def require_settings(config: PruneConfig, *, collects: bool, recalibrates: bool, times: bool) -> None:
    """Refuse settings that contradict each other, lack their data, or ask for what the host cannot do.

    Args:
        config: The settings.
        collects: Whether the host runs training images for criteria.
        recalibrates: Whether it measures batch norms anew.
        times: Whether it exports and times networks.

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
    if config.target_latency is not None and config.confirm and not times:
        raise ConfigError("target_latency= on this host", expected="confirm=false: its networks cannot be timed here")
    wishes: dict[str, bool] = {}
    if not config.plan and CRITERIA[config.criterion].needs:
        wishes[f"criterion={config.criterion}"] = collects
    if config.recalibrate:
        wishes[f"recalibrate={config.recalibrate}"] = recalibrates
    for wish, possible in wishes.items():
        if not possible:
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
