"""What a training can do to a network beside training it. A new method is a new row of `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from yolo_prune.configuration import require_choice
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.slim import require_no_zeros
from yolo_prune.hosts.ultralytics import resrep_conversion, stripes_finish
from yolo_prune.hosts.ultralytics.gradual import GradualPruning, gradual_options_of
from yolo_prune.hosts.ultralytics.grafting import GraftingTraining, grafting_options_of
from yolo_prune.hosts.ultralytics.grafting_nets import train_nets
from yolo_prune.hosts.ultralytics.resrep import ResRepTraining, resrep_options_of
from yolo_prune.hosts.ultralytics.sparsity import SparsityTraining, sparsity_options_of
from yolo_prune.hosts.ultralytics.stripe_layers import striped_paths
from yolo_prune.hosts.ultralytics.stripes import StripeTraining, stripe_options_of
from yolo_prune.hosts.ultralytics.unstructured import UnstructuredPruning, target_layers, unstructured_options_of
from yolo_prune.pipeline.train_config import TrainConfig
from yolo_prune.pipeline.training_options import (
    gradual_options,
    grafting_options,
    resrep_options,
    sparsity_options,
    stripe_options,
    unstructured_options,
)
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
        named: Whether `method=` asks for it, with its name; no other method acts in the same training then.
        prunes: Whether the network that a training leaves has fewer channels than the one that it began with.
        needs_sgd: Whether these options need plain SGD, so that the host must not choose another optimizer by itself.
        fits: Refuses, by its options, a network that the method can do nothing with, before anything is written.
        fits_epochs: Refuses, by its options, a number of epochs that is too small for them. What the data decide, too,
            its callbacks refuse when they see these.
        train: From its options to what trains in the place of the host's `train`, with the same arguments; None where
            that does.
        finish: From the folder of a run that was killed after its last epoch, while its network still had the method's
            structures, to the best checkpoint without them; None where no method has any.
    """

    asked: Callable[[TrainConfig], Any]
    known: Callable[[Path], Any]
    training: Callable[[Any], Callbacks]
    named: bool = False
    prunes: bool = False
    needs_sgd: Callable[[Any], bool] = lambda _: False
    fits: Callable[[Any, nn.Module], object] = lambda _options, _network: None
    fits_epochs: Callable[[Any, int], object] = lambda _options, _epochs: None
    train: Callable[[Any], Callable[..., Path] | None] = lambda _: None
    finish: Callable[[Path], Path] | None = None


METHODS: dict[str, Method] = {
    "pruning": Method(
        asked=gradual_options,
        known=gradual_options_of,
        training=GradualPruning,
        prunes=True,
        fits_epochs=lambda options, epochs: options.schedule.require_room(epochs),
    ),
    "sparsity": Method(
        asked=sparsity_options,
        known=sparsity_options_of,
        training=lambda options: SparsityTraining(options, draw=draw_scales),
        needs_sgd=lambda options: options.mode == "subgradient",
    ),
    "resrep": Method(
        asked=resrep_options,
        known=resrep_options_of,
        training=ResRepTraining,
        named=True,
        prunes=True,
        needs_sgd=lambda _: True,
        fits=lambda _, network: require_no_zeros(network, "method=resrep"),
        finish=resrep_conversion.finish_killed_run,
    ),
    "stripes": Method(
        asked=stripe_options,
        known=stripe_options_of,
        training=StripeTraining,
        named=True,
        prunes=True,
        needs_sgd=lambda _: True,
        fits=lambda _, network: striped_paths(network),
        finish=stripes_finish.finish_killed_run,
    ),
    "grafting": Method(
        asked=grafting_options,
        known=grafting_options_of,
        training=GraftingTraining,
        named=True,
        fits=lambda _, network: require_no_zeros(network, "method=grafting"),
        train=lambda options: partial(train_nets, options) if options.side_by_side else None,
    ),
    "unstructured": Method(
        asked=unstructured_options,
        known=unstructured_options_of,
        training=UnstructuredPruning,
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
        if METHODS[name].named and len(chosen) > 1:
            raise ConfigError(
                f"{' and '.join(chosen)} in one training",
                expected=f"{name} alone",
                remedy="one after the other, each from the checkpoint that the one before left",
            )
    return chosen
