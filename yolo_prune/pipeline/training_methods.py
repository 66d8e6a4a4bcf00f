"""What a training can do to a network beside training it. A new method is a new row of `METHODS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from yolo_prune.allocation import Constraints
from yolo_prune.configuration import changed, require_choice
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.ultralytics.gradual import GradualOptions, GradualPruning, gradual_options_of
from yolo_prune.hosts.ultralytics.sparsity import SCOPES, SparsityOptions, SparsityTraining, options_of
from yolo_prune.hosts.ultralytics.stripe_layers import striped_paths
from yolo_prune.hosts.ultralytics.stripes import StripeTraining, stripe_options_of
from yolo_prune.hosts.ultralytics.stripes_finish import finish_killed_run
from yolo_prune.hosts.ultralytics.unstructured import (
    UnstructuredOptions,
    UnstructuredPruning,
    target_layers,
    unstructured_options_of,
)
from yolo_prune.methods.gradual import PruningSchedule
from yolo_prune.methods.slimming.strength import MODES, SCHEDULES, strength_of
from yolo_prune.methods.stripes.options import StripeOptions
from yolo_prune.methods.stripes.ranking import StripeFloors
from yolo_prune.methods.unstructured import n_of_m
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
        fits: Refuses, by its options, a network that the method can do nothing with, before anything is written.
        finish: From the folder of a run that was killed after its last epoch, while its network still had the method's
            structures, to the best checkpoint without them; None where no method has any.
    """

    asked: Callable[[TrainConfig], Any]
    known: Callable[[Path], Any]
    training: Callable[[Any], Callbacks]
    needs_sgd: Callable[[Any], bool] = lambda _: False
    alone: bool = False
    named: bool = False
    fits: Callable[[Any, nn.Module], object] = lambda _options, _network: None
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
        constraints=Constraints(
            min_channels=config.min_channels, max_fraction=config.max_fraction, round_to=config.round_to
        ),
    )


STRIPES, UNSTRUCTURED = "stripes", "unstructured"


def stripe_options(config: TrainConfig) -> StripeOptions | None:
    """Return how stripes are pruned; None if they are not.

    Raises:
        ConfigError: A value that is out of range, or a setting that has nothing to do with it.
    """
    if config.method != STRIPES:
        _require_part_unset(config.stripes, STRIPES)
        return None
    _require_unset(config, ["round_to"], "prune_every")  # filters die one by one
    if config.target_macs is None:
        _require_unset(config, ["min_channels", "max_fraction"], "target_macs")
    # They refuse what is out of range.
    Constraints(min_channels=config.min_channels, max_fraction=config.max_fraction)
    return StripeOptions(
        strength=strength_of(config.stripes.strength),
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
    if config.method != UNSTRUCTURED:
        _require_part_unset(own, UNSTRUCTURED)
        return None
    _require_unset(config, FLOORS, "prune_every")
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


def _require_part_unset(part: Any, name: str) -> None:
    """Refuse settings of a method that is not asked for.

    Raises:
        ConfigError: One of them is not at its default.
    """
    for word in changed(part, [field.name for field in dataclasses.fields(part)]):
        raise ConfigError(
            f"{name}.{word} without method={name}",
            expected=f"method={name} beside it, or neither",
            remedy="a resumed run reads its settings from its folder",
        )


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
    STRIPES: Method(
        asked=stripe_options,
        known=stripe_options_of,
        training=StripeTraining,
        needs_sgd=lambda _: True,
        alone=True,
        named=True,
        fits=lambda _, network: striped_paths(network),
        finish=finish_killed_run,
    ),
    UNSTRUCTURED: Method(
        asked=unstructured_options,
        known=unstructured_options_of,
        training=UnstructuredPruning,
        alone=True,
        named=True,
        fits=lambda options, network: target_layers(network, options),
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
