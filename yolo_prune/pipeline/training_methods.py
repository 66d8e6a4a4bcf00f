"""What a training can do to a network beside training it. A new method is a new row of `METHODS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from yolo_prune.allocation import Constraints
from yolo_prune.configuration import changed, require_choice
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.ultralytics.gradual import GradualOptions, GradualPruning, gradual_options_of
from yolo_prune.hosts.ultralytics.resrep import ResRepTraining, resrep_options_of
from yolo_prune.hosts.ultralytics.resrep_conversion import finish_run
from yolo_prune.hosts.ultralytics.sparsity import SCOPES, SparsityOptions, SparsityTraining, options_of
from yolo_prune.methods.gradual import PruningSchedule
from yolo_prune.methods.resrep.options import ResRepOptions
from yolo_prune.methods.slimming.strength import MODES, SCHEDULES, strength_of
from yolo_prune.pipeline.train_config import TrainConfig
from yolo_prune.report.scales import draw_scales


class Callbacks(Protocol):
    """What a method does during a training."""

    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        """Return what the host's trainer calls, by event. Picklable before training begins."""
        ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way in which training changes a network.

    Attributes:
        asked: From the settings to its options; None where it is not asked for. Refuses settings that do not fit.
        known: From the folder of an interrupted run to the options that it had; None where it had none.
        training: From its options to its callbacks.
        needs_sgd: Whether these options need plain SGD, so that the host must not choose another optimizer by itself.
        alone: Whether no other method can act in the same training.
        named: Whether it is asked for by `method=`, with its name.
        finish: From the folder of a run that was killed after its last epoch, while its network still had the method's
            structures, to the best checkpoint without them; None where no method has any.
    """

    asked: Callable[[TrainConfig], Any]
    known: Callable[[Path], Any]
    training: Callable[[Any], Callbacks]
    needs_sgd: Callable[[Any], bool] = lambda _: False
    alone: bool = False
    named: bool = False
    finish: Callable[[Path], Path] | None = None


def sparsity_options(config: TrainConfig) -> SparsityOptions | None:
    """Return how scales are penalised; None if they are not.

    Raises:
        ConfigError: A value that is unknown or out of range.
    """
    if config.sparsity is None:
        _require_unset(config, ("sparsity_mode", "sparsity_schedule", "sparsity_scope", "sparsity_share"), "sparsity")
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


STEP_SETTINGS = ("prune_steps", "prune_soft", "prune_batches", "criterion", "allocation", "min_channels",
                 "max_fraction", "round_to")  # fmt: skip
"""Settings of pruning in steps."""

FLOORS = ("min_channels", "max_fraction", "round_to")
"""Those of them that every method with a target in MACs has."""


def gradual_options(config: TrainConfig) -> GradualOptions | None:
    """Return how the network is pruned while it is trained; None if it is not.

    Raises:
        ConfigError: A value that is unknown or out of range, or only one of prune_every= and target_macs=.
    """
    if config.method is not None and config.prune_every is None:  # target_macs and floors are that method's
        _require_unset(config, [name for name in STEP_SETTINGS if name not in FLOORS], "prune_every")
        return None
    if config.prune_every is None and config.target_macs is None:
        _require_unset(config, STEP_SETTINGS, "prune_every")
        return None
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


def resrep_options(config: TrainConfig) -> ResRepOptions | None:
    """Return how rows of compactors are made to forget; None if there are none.

    Raises:
        ConfigError: A value that is unknown or out of range, or no target.
    """
    if config.method != "resrep":
        for word in changed(config.resrep, [field.name for field in dataclasses.fields(config.resrep)]):
            raise ConfigError(f"resrep.{word} without method=resrep", expected="method=resrep beside it, or neither")
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


def _number_or_auto(key: str, word: str) -> float | None:
    """Return the number that a user typed; None for `auto`."""
    try:
        return None if word == "auto" else float(word)
    except ValueError:
        raise ConfigError(f"{key}={word}", expected="a number, or auto") from None


def _constraints(config: TrainConfig) -> Constraints:
    return Constraints(**{name: getattr(config, name) for name in FLOORS})


def _require_unset(config: TrainConfig, names: Sequence[str], needed: str) -> None:
    """Refuse settings that would do nothing without another one.

    Raises:
        ConfigError: One of them is not at its default.
    """
    for word in changed(config, names):
        raise ConfigError(
            f"{word} without {needed}=",
            expected=f"{needed}= beside it, or neither",
            remedy="a resumed run reads its settings from its folder" if config.resume else "",
        )


METHODS: dict[str, Method] = {
    "pruning": Method(asked=gradual_options, known=gradual_options_of, training=GradualPruning),
    "sparsity": Method(
        asked=sparsity_options,
        known=options_of,
        training=lambda options: SparsityTraining(options, draw=draw_scales),
        needs_sgd=lambda options: options.mode == "subgradient",
    ),
    "resrep": Method(
        asked=resrep_options,
        known=resrep_options_of,
        training=ResRepTraining,
        needs_sgd=lambda _: True,
        alone=True,
        named=True,
        finish=finish_run,
    ),
}
"""Every method by the name that messages have for its settings, in the order in which they act: pruning comes first,
since the penalty looks at what is left."""


def asked_of(config: TrainConfig) -> dict[str, Any]:
    """Return the options of every method that is asked for, by its name.

    Raises:
        ConfigError: A value that is unknown or out of range, a setting of a method that is not asked for, or methods
            that cannot act together.
    """
    if config.method is not None:
        require_choice("method", config.method, [name for name, method in METHODS.items() if method.named])
    options = {name: method.asked(config) for name, method in METHODS.items()}
    chosen = {name: found for name, found in options.items() if found is not None}
    for name in chosen:
        if METHODS[name].alone and len(chosen) > 1:
            raise ConfigError(
                f"{' and '.join(chosen)} in one training",
                expected=f"{name} alone",
                remedy="one after the other, each from the checkpoint that the one before left",
            )
    return chosen
