"""Zeros that stay zeros: what an optimizer's step, or the momentum behind it, would revive is zeroed again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from yolo_prune.errors import VerificationError
from yolo_prune.methods.steps import skipped


class KeptZeros:
    """Keeps the exact zeros of some parameters through a training, whatever its optimizer.

    The masks are read off the values themselves, so a training that is resumed finds the zeros where it left them.

    Args:
        parameters: The parameters by name; what is exactly zero in them stays zero.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._masks = {name: tensor.detach() != 0 for name, tensor in parameters.items()}
        self._handle: Any = None

    def count(self) -> int:
        """Return how many zeros are kept."""
        return sum(int((~mask).sum()) for mask in self._masks.values())

    def attach(self, optimizer: Optimizer) -> None:
        """Hook an optimizer: after each of its steps the zeros are put back, in place."""
        self.detach()
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        """Let the optimizer go."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    @torch.no_grad()
    def carry(self, average: Mapping[str, Tensor]) -> None:
        """Put the zeros into the parameters of a moving average, by their names, in place."""
        for name, mask in self._masks.items():
            average[name].masked_fill_(~mask, 0.0)  # NaN too, which the host recovers from

    def require(self, parameters: Mapping[str, Tensor], when: str) -> None:
        """Assert that the zeros are there.

        Args:
            parameters: Parameters of the network, or of its average, by name.
            when: When that is, for the message.

        Raises:
            VerificationError: A value that was zero is not.
        """
        revived = {name: int((parameters[name].detach()[~mask] != 0).sum()) for name, mask in self._masks.items()}
        wrong = {name: count for name, count in revived.items() if count}
        if wrong:
            name, count = next(iter(wrong.items()))
            raise VerificationError(
                f"{when}: {sum(wrong.values())} zeros were revived, first {count} in '{name}'",
                expected="every zero kept",
                remedy="nothing else may write into these weights while they are trained",
            )

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if skipped(optimizer):
            return
        for name, mask in self._masks.items():
            self._parameters[name].masked_fill_(~mask, 0.0)
