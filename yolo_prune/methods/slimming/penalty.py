"""Network slimming: a penalty on batch-norm scales, applied where the optimizer steps.

Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017: `grad(gamma) += s *
sign(gamma)`. A channel that several batch norms scale (those of a shortcut) has the group norm of its scales as
penalty: Yuan and Lin, Model selection and estimation in regression with grouped variables, 2006.

A channel without a scale is still the constant that its shift makes of it. Where padding follows, which does not go on
with it, no bias can take its place; so the shifts of silent channels fade while there is still training to answer it.

The penalty belongs between clipping and the step, once per step: added after every `backward()` it would be divided by
the AMP scale, shrunk by the clip and counted once per micro-batch. So it hooks the optimizer itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from yolo_prune.channels import BoolArray, ChannelGraph, IntArray
from yolo_prune.errors import ConfigError
from yolo_prune.importance.base import FloatArray, scale_axes, scales
from yolo_prune.methods.slimming.health import SILENT
from yolo_prune.methods.slimming.strength import Mode
from yolo_prune.methods.steps import skipped

ADAPTIVE = (torch.optim.Adam, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop)
"""Optimizers that divide by the gradient's own size (AdamW is an Adam): a subgradient of any strength moves alike."""

FADE = 20.0
"""How often the shift of a silent channel falls by e while a median scale would go to zero."""

TINY = float(np.finfo(np.float32).tiny)
"""Keeps 0 / 0 from being NaN."""


def penalised_channels(graph: ChannelGraph, groups: Iterable[int] | None = None) -> BoolArray:
    """Return which channels are penalised, shape (channels,): those of free groups that a batch norm scales.

    Args:
        graph: The channel graph.
        groups: Indices of the groups in scope; by default all.
    """
    scaled = np.zeros(graph.channel_count, dtype=bool)
    for name, dim in scale_axes(graph):
        scaled[graph.axes[name, dim].channels] = True
    chosen = np.zeros(graph.channel_count, dtype=bool)
    for index in set(graph.free_groups() if groups is None else groups) & set(graph.free_groups()):
        chosen[graph.groups[index].channels] = True
    return scaled & chosen


@dataclass(frozen=True)
class _Entries:
    """The scales that one optimizer step penalises, laid end to end.

    Attributes:
        tensors: The parameters.
        param_groups: For each, the index of its parameter group in the optimizer.
        sizes: Their lengths.
        channels: For each entry, its penalised channel's number, or the number of channels where it is left alone.
        weights: Square root of the number of scales of each channel; 0 for the last, which stands for no channel.
        shifts: The shifts beside the scales, the `tensors`.
    """

    tensors: list[Tensor]
    param_groups: list[int]
    sizes: list[int]
    channels: Tensor
    weights: Tensor
    shifts: list[Tensor]


class ScalePenalty:
    """The penalty of one training.

    `proximal` shrinks after each step, `norm <- max(norm - lr * s * sqrt(n), 0)` over the n scales of a channel: true
    zeros, whatever AMP, momentum, clipping or the optimizer do. `subgradient` adds `s * sqrt(n) * gamma / norm` to the
    gradients before each step, which for one scale is the paper's `s * sign(gamma)`.

    Args:
        graph: Channel graph of the model that is trained.
        parameters: Its parameters by name.
        chosen: Which channels are penalised, shape (channels,); those with a frozen scale are left out.
        mode: See above.

    Attributes:
        strength: s, to be set at any time.
        typical: Median scale of the network before all; shifts of channels below `SILENT` of it fade. None: none does.
        steps: Optimizer steps since the last `forget`.
        lr_sum: Sum of their learning rates for scales, averaged over the scales.

    Raises:
        ConfigError: No channel is penalised.
    """

    def __init__(
        self, graph: ChannelGraph, parameters: Mapping[str, Tensor], chosen: BoolArray, *, mode: Mode = "proximal"
    ) -> None:
        self.mode, self.strength = mode, 0.0
        self.typical: float | None = None
        self.graph, self.chosen = graph, chosen.copy()
        axes = {name: graph.axes[name, dim].channels for name, dim in scale_axes(graph)}
        for name, channels in axes.items():
            if not parameters[name].requires_grad:
                self.chosen[channels] = False  # a frozen scale cannot move, so its channel cannot fall silent
        self._parameters = {name: parameters[name] for name in axes if self.chosen[axes[name]].any()}
        if not self._parameters:
            raise ConfigError(
                "no batch-norm scale may be penalised",
                expected="free channels with a trainable batch norm in the scope",
                remedy="widen sparsity_scope, or freeze less",
            )
        self._shifts = {name: parameters[shift_of(name)] for name in self._parameters}
        self._numbers: IntArray = np.cumsum(self.chosen) - 1
        self._entries: _Entries | None = None
        self._handles: list[Any] = []
        self.forget()

    def attach(self, optimizer: Optimizer) -> None:
        """Hook an optimizer; an earlier one is let go.

        Raises:
            ConfigError: A subgradient with an adaptive optimizer, or the optimizer trains none of the scales.
        """
        self.detach()
        if self.mode == "subgradient" and isinstance(optimizer, ADAPTIVE):
            raise ConfigError(
                f"sparsity_mode=subgradient with {type(optimizer).__name__}",
                expected="SGD: an adaptive optimizer divides the penalty by its own size, so its strength is lost",
                remedy="optimizer=SGD, or sparsity_mode=proximal, which works with any optimizer",
            )
        self._entries, self._optimizer = self._collect(optimizer), optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def mean_setting(self, key: str) -> float:
        """Return a setting of the optimizer, such as "lr", averaged over the scales; 0 where it has none."""
        entries = self._known_entries()
        values = [self._optimizer.param_groups[index].get(key, 0.0) for index in entries.param_groups]
        return float(np.average(values, weights=entries.sizes))

    def momentum_gain(self) -> float:
        """Return by what momentum multiplies a gradient in the long run; the proximal step is behind it."""
        if self.mode == "proximal":
            return 1.0
        return 1.0 / (1.0 - min(self.mean_setting("momentum"), 0.999))

    def detach(self) -> None:
        """Let the optimizer go."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def forget(self) -> None:
        """Begin new sums."""
        self.steps, self.lr_sum = 0, 0.0
        self._gradients: Tensor | None = None

    def _collect(self, optimizer: Optimizer) -> _Entries:
        place = {id(tensor): index for index, group in enumerate(optimizer.param_groups) for tensor in group["params"]}
        tensors = {name: tensor for name, tensor in self._parameters.items() if id(tensor) in place}
        if not tensors:
            raise ConfigError("the optimizer trains no penalised scale", expected="one over this model's parameters")
        none = int(self.chosen.sum())
        axes = [self.graph.axes[name, 0].channels for name in tensors]
        numbers = np.concatenate([np.where(self.chosen[channels], self._numbers[channels], none) for channels in axes])
        weights = np.sqrt(np.bincount(numbers, minlength=none + 1)).astype(np.float32)
        weights[none] = 0.0
        device = next(iter(tensors.values())).device
        return _Entries(
            tensors=list(tensors.values()),
            param_groups=[place[id(tensor)] for tensor in tensors.values()],
            sizes=[len(tensor) for tensor in tensors.values()],
            channels=torch.from_numpy(numbers).to(device),
            weights=torch.from_numpy(weights).to(device),
            shifts=[self._shifts[name] for name in tensors],
        )

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if skipped(optimizer):
            return
        entries = self._known_entries()
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in entries.tensors]
        total = torch.cat(gradients).abs()
        self._gradients = total if self._gradients is None else self._gradients + total
        self.steps += 1
        self.lr_sum += self.mean_setting("lr")
        if self.mode == "subgradient" and self.strength:
            gamma, norms = self._norms(entries)
            directions = gamma / norms.clamp_min(TINY)[entries.channels]  # of one scale: its sign, to the last bit
            penalty = self.strength * entries.weights[entries.channels] * directions
            for tensor, gradient, part in zip(entries.tensors, gradients, penalty.split(entries.sizes), strict=True):
                tensor.grad = gradient.add_(part)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if not self.strength or skipped(optimizer):
            return
        entries = self._known_entries()
        _, norms = self._norms(entries)
        rates = [optimizer.param_groups[index]["lr"] for index in entries.param_groups]
        # A channel whose scales learn at different rates shrinks by their mean.
        lr = torch.repeat_interleave(norms.new_tensor(rates), torch.tensor(entries.sizes, device=norms.device))
        lr_sums = torch.zeros_like(norms).index_add_(0, entries.channels, lr)
        mean_lr = lr_sums / entries.weights.square().clamp_min(1.0)
        if self.mode == "proximal":
            step = self.strength * entries.weights * mean_lr
            factors = (1.0 - step / norms.clamp_min(TINY)).clamp_min(0.0)
            factors[-1] = 1.0  # what is left alone
            torch._foreach_mul_(entries.tensors, list(factors[entries.channels].split(entries.sizes)))
            norms = norms * factors
        if self.typical:
            silent = norms <= SILENT * self.typical * entries.weights
            fading = torch.where(silent, torch.exp(-FADE * self.strength * mean_lr / self.typical), 1.0)
            fading[-1] = 1.0
            torch._foreach_mul_(entries.shifts, list(fading[entries.channels].split(entries.sizes)))

    def _known_entries(self) -> _Entries:
        assert self._entries is not None  # hooks run on an attached optimizer only
        return self._entries

    def _norms(self, entries: _Entries) -> tuple[Tensor, Tensor]:
        """Return all scales, and the norm over the scales of each channel."""
        gamma = torch.cat([tensor.detach() for tensor in entries.tensors])
        squares = torch.zeros_like(entries.weights).index_add_(0, entries.channels, gamma.square())
        return gamma, squares.sqrt()

    def mean_gradient(self) -> FloatArray:
        """Return the mean |task gradient| of each channel's scales since the last `forget`, shape (channels,).

        NaN for channels that are not penalised, or before the first step.
        """
        entries, result = self._known_entries(), np.full(len(self.chosen), np.nan)
        if self._gradients is None:
            return result
        sums = torch.zeros_like(entries.weights).index_add_(0, entries.channels, self._gradients)
        counts = entries.weights.square()[:-1].clamp_min(1.0)
        result[self.chosen] = (sums[:-1] / counts / self.steps).cpu().double().numpy()  # Apple's GPU has no float64
        return result


@torch.no_grad()
def carry_zeros(graph: ChannelGraph, current: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
    """Make scales of a moving average zero, in place, where those of the network are, and their shifts the network's.

    The average of a scale that became zero late is not zero for long, and checkpoints hold the average.

    Args:
        graph: Channel graph of the network.
        current: The network's parameters by name.
        average: The average's.
    """
    for name, _ in scale_axes(graph):
        zero, shift = current[name] == 0, shift_of(name)
        average[name].masked_fill_(zero, 0.0)
        average[shift].copy_(torch.where(zero, current[shift], average[shift]))


def shift_of(scale: str) -> str:
    """Return the name of the shift beside a batch-norm scale."""
    return f"{scale.removesuffix('weight')}bias"


def channel_scales(graph: ChannelGraph, tensors: Mapping[str, Tensor]) -> FloatArray:
    """Return the root mean square over the batch-norm scales of each channel, shape (channels,); NaN where none is.

    For a channel with one scale this is |gamma|.
    """
    squares, members = np.zeros(graph.channel_count), np.zeros(graph.channel_count)
    for key, gamma in scales(graph, tensors):
        channels = graph.axes[key].channels
        np.add.at(squares, channels, gamma.cpu().numpy() ** 2)
        np.add.at(members, channels, 1)
    with np.errstate(invalid="ignore"):
        return np.sqrt(squares / members)
