"""Zeros of a checkpoint that pruning put there, weight by weight or stripe by stripe: later trainings keep them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from ultralytics.utils import LOGGER, RANK

from yolo_prune.hosts.slim import MARKER, ZEROS
from yolo_prune.hosts.ultralytics.networks import network_of
from yolo_prune.methods.zeros import KeptZeros


def kept_zeros_of(network: nn.Module) -> dict[str, Tensor]:
    """Return, by name, the parameters whose zeros a network's marker says to keep; surgery may have taken some."""
    names = set(getattr(network, MARKER, {}).get(ZEROS, ()))
    return {name: parameter for name, parameter in network.named_parameters() if name in names}


@dataclass
class ZeroKeeping:
    """The callbacks that keep the zeros of a network through a training; they do nothing where there are none."""

    _zeros: KeptZeros | None = field(default=None, init=False)
    _network: Any = field(default=None, init=False)

    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        """Return what the host's trainer calls, by event. Picklable before training begins."""
        return {
            "on_pretrain_routine_end": self.begin,
            "on_train_epoch_start": self.begin_epoch,
            "on_train_epoch_end": self.end_epoch,
        }

    def begin(self, trainer: Any) -> None:
        """Read the masks off the network's own zeros and hook the optimizer."""
        self._attach(trainer)
        if self._zeros is not None and RANK in {-1, 0}:
            LOGGER.info(f"keeping {self._zeros.count():,} pruned weights of this network at zero")

    def begin_epoch(self, trainer: Any) -> None:
        """Look anew at a network that lost channels since."""
        if self._network is not network_of(trainer.model):
            self._attach(trainer)

    def end_epoch(self, trainer: Any) -> None:
        """Carry the zeros into the average, and assert that the network has them.

        Raises:
            VerificationError: It has not.
        """
        if self._zeros is None:
            return
        self._zeros.require(dict(self._network.named_parameters()), f"after epoch {trainer.epoch + 1}")
        if trainer.ema is not None:
            self._zeros.carry(dict(network_of(trainer.ema.ema).named_parameters()))

    def _attach(self, trainer: Any) -> None:
        if self._zeros is not None:
            self._zeros.detach()
        self._network = network_of(trainer.model)
        parameters = kept_zeros_of(self._network)
        self._zeros = KeptZeros(parameters) if parameters else None
        if self._zeros is not None:
            self._zeros.attach(trainer.optimizer)
