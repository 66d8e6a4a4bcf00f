"""Pruning in steps inside one training: when, down to what, and how an optimizer goes on with fewer channels.

The soft variant follows He et al., Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, 2018: the
channels that would go are zeroed after every epoch and may come back; what is zero at the end is removed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from yolo_prune.channels import BoolArray, ChannelGraph, Role
from yolo_prune.channels.tensors import named_tensors
from yolo_prune.errors import ConfigError
from yolo_prune.surgery.apply import selected


@dataclass(frozen=True, kw_only=True)
class PruningSchedule:
    """When how much goes.

    Attributes:
        every: Epochs between steps; the first step comes after as many.
        steps: Number of steps.
        target: Fraction of the start's MACs that is kept in the end.

    Raises:
        ConfigError: A number that is out of range.
    """

    every: int
    steps: int
    target: float

    def __post_init__(self) -> None:
        if self.every < 1 or self.steps < 1:
            raise ConfigError(
                f"prune_every={self.every} prune_steps={self.steps}", expected="whole numbers, at least 1"
            )
        if not 0.0 < self.target < 1.0:
            raise ConfigError(f"target_macs={self.target}", expected="a number above 0 and below 1")

    def require_room(self, epochs: int) -> None:
        """Refuse a training that ends before, or with, the last step.

        Raises:
            ConfigError: No epoch would be left to recover in.
        """
        if self.every * self.steps >= epochs:
            raise ConfigError(
                f"the last of {self.steps} pruning steps, one every {self.every} epochs, comes after epoch "
                f"{self.every * self.steps} of {epochs}",
                expected="epochs after the last step, in which the network recovers",
                remedy=f"epochs={2 * self.every * self.steps}, or fewer steps",
            )

    def steps_due(self, epochs_done: int) -> int:
        """Return how many steps shall have been taken after some epochs."""
        return min(epochs_done // self.every, self.steps)

    def kept_after(self, step: int) -> float:
        """Return the fraction of the start's MACs that is kept after a step: as much goes in each."""
        return 1.0 - (1.0 - self.target) * step / self.steps


def carry_optimizer(
    optimizer: Optimizer,
    before: Mapping[str, Tensor],
    after: Mapping[str, nn.Parameter],
    graph: ChannelGraph,
    keep: BoolArray,
) -> None:
    """Make an optimizer go on with the parameters of a slim model, in place.

    What it remembers of kept entries (momentum, squared gradients) stays; its hooks, its groups and whoever holds it,
    such as a scheduler or a gradient scaler, notice nothing.

    Args:
        optimizer: The optimizer of the dense model's parameters.
        before: The dense model's parameters by name.
        after: The slim model's, of the same names.
        graph: Channel graph of the dense model.
        keep: Keep mask of shape (channels,).
    """
    names = {id(tensor): name for name, tensor in before.items()}
    plain = dataclasses.replace(graph, rescales=())  # gradients do not grow where values do
    state = dict(optimizer.state)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        old = list(group["params"])
        group["params"] = [after[names[id(tensor)]] for tensor in old]
        for tensor, new in zip(old, group["params"], strict=True):
            if tensor in state:
                optimizer.state[new] = {
                    key: _sliced(plain, keep, names[id(tensor)], value, tensor) for key, value in state[tensor].items()
                }


def _sliced(graph: ChannelGraph, keep: BoolArray, name: str, value: object, parameter: Tensor) -> object:
    """Return the kept entries of what is remembered of a parameter; what has another shape is of no channel."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return selected(graph, keep, name, value.cpu()).to(value.device)


@torch.no_grad()
def silence_softly(model: nn.Module, graph: ChannelGraph, keep: BoolArray) -> None:
    """Zero, in place, what makes removed channels heard, and leave alone what lets them come back.

    Where a batch norm follows, its scale and shift are zeroed and the filters kept: zero filters would get no gradient.
    The scale gets one only where the activation behind it has a slope at zero, as SiLU has and ReLU has not.

    Args:
        model: The traced model, on any device.
        graph: Its channel graph.
        keep: Keep mask of shape (channels,).
    """
    tensors = named_tensors(model)
    for (name, dim), axis in graph.axes.items():
        normed = name.rpartition(".")[0] in graph.norms
        if axis.role is not Role.PRODUCER or normed or axis.groups > 1:
            continue
        removed = torch.from_numpy(~keep[axis.channels]).nonzero()[:, 0]
        tensors[name].index_fill_(dim, removed.to(tensors[name].device), 0.0)
