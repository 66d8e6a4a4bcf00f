"""From the settings of `train` to the options of each method of training, refusing what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from yolo_prune.allocation import Constraints
from yolo_prune.configuration import changed, require_choice
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.ultralytics.gradual import GradualOptions
from yolo_prune.hosts.ultralytics.grafting import GraftingOptions
from yolo_prune.hosts.ultralytics.sparsity import SCOPES, SparsityOptions
from yolo_prune.hosts.ultralytics.unstructured import UnstructuredOptions
from yolo_prune.methods.gradual import PruningSchedule
from yolo_prune.methods.resrep.options import ResRepOptions
from yolo_prune.methods.slimming.strength import MODES, SCHEDULES, strength_of
from yolo_prune.methods.stripes.options import StripeOptions
from yolo_prune.methods.stripes.ranking import StripeFloors
from yolo_prune.methods.unstructured import n_of_m
from yolo_prune.pipeline.train_config import TrainConfig


def sparsity_options(config: TrainConfig) -> SparsityOptions | None:
    """Return how scales are penalised; None if they are not.

    Raises:
        ConfigError: A value that is unknown or out of range.
    """
    if config.sparsity is None:
        _require_unset(config, ("sparsity_mode", "sparsity_schedule", "sparsity_scope", "sparsity_share"), "sparsity=")
        return None
    require_choice("sparsity_mode", config.sparsity_mode, MODES)
    require_choice("sparsity_schedule", config.sparsity_schedule, SCHEDULES)
    for part in config.sparsity_scope:
        require_choice("sparsity_scope", part, SCOPES)
    return SparsityOptions(
        strength=strength_of(config.sparsity),
        mode=config.sparsity_mode,  # type: ignore[arg-type]  # checked above, like the next two
        schedule=config.sparsity_schedule,  # type: ignore[arg-type]
        scope=tuple(config.sparsity_scope),  # type: ignore[arg-type]
        share=config.sparsity_share,
    )


FLOORS = ("min_channels", "max_fraction", "round_to")
"""Settings that every method with a target in MACs may have."""

STEPS = ("prune_steps", "prune_soft", "prune_batches", "criterion", "allocation")
"""Those of pruning in steps alone."""


def gradual_options(config: TrainConfig) -> GradualOptions | None:
    """Return how the network is pruned in steps while it is trained; None if it is not.

    Raises:
        ConfigError: A value that is unknown or out of range, or only one of prune_every= and target_macs=.
    """
    if config.prune_every is None and (config.target_macs is None or config.method is not None):
        _require_unset(config, STEPS if config.method is not None else (*STEPS, *FLOORS), "prune_every=")
        return None  # a method that is named has a target and floors of its own
    if config.prune_every is None or config.target_macs is None:
        missing = "prune_every" if config.prune_every is None else "target_macs"
        raise ConfigError(
            f"'{missing}=' is required to prune while training",
            expected="prune_every= and target_macs=",
            remedy="prune_every=5 prune_steps=3 target_macs=0.5",
        )
    return GradualOptions(
        schedule=PruningSchedule(every=config.prune_every, steps=config.prune_steps, target=config.target_macs),
        soft=config.prune_soft,
        batches=config.prune_batches,
        criterion=config.criterion,
        allocation=config.allocation,
        constraints=_constraints(config),
    )


GRAFTING_SETTINGS = {
    "external": ("nets", "models", "amplitude", "sharpness"),
    "internal": ("threshold",),
    "noise": ("noise_base", "threshold"),
}
"""What each mode of grafting reads."""


def grafting_options(config: TrainConfig) -> GraftingOptions | None:
    """Return how filters are revived; None if they are not.

    Raises:
        ConfigError: A value that is unknown or out of range, or distillation beside several networks.
    """
    own = config.grafting
    if not _asked(config, "grafting"):
        return None
    if config.prune_every is None:
        _require_unset(config, ("target_macs", *FLOORS), "prune_every=")
    require_choice("grafting.mode", own.mode, GRAFTING_SETTINGS)
    read = ("mode", *GRAFTING_SETTINGS[own.mode])
    for word in changed(own, [name for name in vars(own) if name not in read]):
        raise ConfigError(f"grafting.{word} with grafting.mode={own.mode}", expected="a setting that this mode reads")
    options = GraftingOptions(**{**vars(own), "models": tuple(own.models)})
    if options.side_by_side and config.distill is not None:
        raise ConfigError(
            "distill= with grafting.mode=external",
            expected="networks that learn from each other alone",
            remedy="distill into the best of them afterwards",
        )
    return options


def resrep_options(config: TrainConfig) -> ResRepOptions | None:
    """Return how rows of compactors are made to forget; None if there are none.

    Raises:
        ConfigError: A value that is unknown or out of range, or no target.
    """
    if not _asked(config, "resrep"):
        return None
    if config.target_macs is None:
        raise ConfigError(
            "'target_macs=' is required with method=resrep",
            expected="the fraction of the MACs that is left in the end",
            remedy="method=resrep target_macs=0.5",
        )
    return ResRepOptions(
        target=config.target_macs,
        strength=_number_or_auto("resrep.strength", config.resrep.strength),
        momentum=_number_or_auto("resrep.momentum", config.resrep.momentum),
        interval=config.resrep.interval,
        constraints=_constraints(config),
    )


def stripe_options(config: TrainConfig) -> StripeOptions | None:
    """Return how stripes are pruned; None if they are not.

    Raises:
        ConfigError: A value that is out of range, or a setting that has nothing to do with it.
    """
    if not _asked(config, "stripes"):
        return None
    _require_unset(config, ["round_to"], "prune_every=")  # filters die one by one
    if config.target_macs is None:
        _require_unset(config, ["min_channels", "max_fraction"], "target_macs=")
    # They refuse what is out of range.
    Constraints(min_channels=config.min_channels, max_fraction=config.max_fraction)
    return StripeOptions(
        strength=_number_or_auto("stripes.strength", config.stripes.strength),
        threshold=config.stripes.threshold,
        target=config.target_macs,
        floors=StripeFloors(min_channels=config.min_channels, max_fraction=config.max_fraction),
    )


def unstructured_options(config: TrainConfig) -> UnstructuredOptions | None:
    """Return which weights become zero; None if none do.

    Raises:
        ConfigError: A value that is out of range, or a setting that has nothing to do with it.
    """
    own = config.unstructured
    if not _asked(config, "unstructured"):
        return None
    _require_unset(config, FLOORS, "prune_every=")
    if config.target_macs is not None:
        raise ConfigError(
            f"target_macs={config.target_macs} with method=unstructured",
            expected="unstructured.amount=: zeros among weights save no MACs",
        )
    if n_of_m(own.pattern) is not None and changed(own, ["amount"]):
        raise ConfigError(
            f"unstructured.amount={own.amount:g} with unstructured.pattern={own.pattern}",
            expected="one of them: the pattern says what is left",
        )
    return UnstructuredOptions(pattern=own.pattern, amount=own.amount, targets=tuple(own.targets))


def _number_or_auto(key: str, word: str) -> float | None:
    """Return the number that a user typed; None for `auto`."""
    try:
        return None if word == "auto" else float(word)
    except ValueError:
        raise ConfigError(f"{key}={word}", expected="a number, or auto") from None


def _constraints(config: TrainConfig) -> Constraints:
    return Constraints(**{name: getattr(config, name) for name in FLOORS})


def _asked(config: TrainConfig, name: str) -> bool:
    """Return whether a method is asked for by its name.

    Raises:
        ConfigError: It is not, but a setting of it is given.
    """
    if config.method == name:
        return True
    own: Any = getattr(config, name)
    for word in changed(own, [field.name for field in fields(own)]):
        _refuse(config, f"{name}.{word}", f"method={name}")
    return False


def _require_unset(config: TrainConfig, names: Sequence[str], needed: str) -> None:
    """Refuse settings that would do nothing without another one.

    Raises:
        ConfigError: One of them is not at its default.
    """
    for word in changed(config, names):
        _refuse(config, word, needed)


def _refuse(config: TrainConfig, word: str, needed: str) -> None:
    raise ConfigError(
        f"{word} without {needed}",
        expected=f"{needed} beside it, or neither",
        remedy="a resumed run reads its settings from its folder" if config.resume else "",
    )
