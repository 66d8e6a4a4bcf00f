"""Stripe-wise pruning: a skeleton tells how much each stripe of each filter counts, and learns to be sparse.

Source: Meng et al., Pruning Filter in Filter, NeurIPS 2020. A stripe is what one filter reads at one position of its
kernel, `weight[n, :, i, j]`. The forward is `conv(x, W * FS[:, None])` with a skeleton FS of ones at the start, and
`grad(FS) += alpha * sign(FS)`; stripes whose FS falls to the threshold are dead for good.

The network stays a stock one: `conv.weight` holds `W * FS[:, None]` itself, the skeleton is a further parameter that
the forward does not read, and both gradients follow from that of the product in the hooks of the optimizer.

Two things differ from the paper, for two reasons:
- Behind a convolution stands a batch norm, so the loss does not oppose a filter that shrinks as a whole, and a penalty
  on all of its stripes would drive every filter to zero, needed or not. So a filter's strongest stripe, which sets the
  scale, is not penalised, and the others are measured against it.
- A skeleton starts at one and dies when it comes down to the threshold, so it never gets to be negative: a step that is
  long enough to leap over the interval around zero ends there as well. (A stripe's sign is W's own.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from yolo_prune.errors import ConfigError
from yolo_prune.methods.steps import skipped

SKELETON = "skeleton"
"""Name of the parameter, shape (filters, kernel height, kernel width), that a convolution has beside its weight."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StripedLayer:
    """A convolution with a skeleton, and the batch norm behind it.

    Attributes:
        conv: The convolution; its weight is the product with the skeleton.
        norm: The batch norm that reads it.
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    @property
    def skeleton(self) -> nn.Parameter:
        """The skeleton, shape (filters, kernel height, kernel width); 0 where a stripe is dead."""
        return self.conv.get_parameter(SKELETON)

    def alive(self) -> Tensor:
        """Return which stripes live, bool, the skeleton's shape."""
        return self.skeleton.detach() > 0


def grow_skeleton(conv: nn.Conv2d) -> None:
    """Give a convolution a skeleton: one, and zero for the stripes that are zero already."""
    alive = (conv.weight.detach() != 0).any(dim=1)
    conv.register_parameter(SKELETON, nn.Parameter(alive.to(conv.weight)))


def has_skeleton(module: nn.Module) -> bool:
    """Return whether a module has a skeleton."""
    return SKELETON in module._parameters


@torch.no_grad()
def shed_skeleton(conv: nn.Conv2d) -> None:
    """Take a convolution's skeleton away; its weight is the product, so dead stripes are all that has to be zeroed."""
    conv.weight.mul_((conv.get_parameter(SKELETON) > 0)[:, None])
    delattr(conv, SKELETON)


def strongest_stripes(weight: Tensor) -> Tensor:
    """Return which stripe of each filter has the largest norm, bool, shape (filters, height, width)."""
    norms = weight.detach().square().sum(dim=1)
    return norms == norms.amax(dim=(1, 2), keepdim=True)


class SkeletonSteps:
    """Steps an optimizer through weights and skeletons while the network holds their products.

    Before a step the weight becomes W = product / FS, with the gradients `g * FS` for W and `sum_c g * W + alpha` for
    FS, where g is the gradient of the product; the optimizer steps both; afterwards skeletons at or below the threshold
    die, with their momentum, and the weight becomes the product again. A filter without a living stripe loses the scale
    and the shift of its batch norm: it is silent.

    Args:
        layers: The layers by their path.
        threshold: delta, against a start of one.

    Attributes:
        strength: alpha, to be set at any time.
    """

    def __init__(self, layers: Mapping[str, StripedLayer], *, threshold: float) -> None:
        self.layers, self.threshold, self.strength = dict(layers), threshold, 0.0
        self._split: list[StripedLayer] = []
        self._handles: list[Any] = []

    def attach(self, optimizer: Optimizer) -> None:
        """Hook an optimizer; an earlier one is let go.

        Raises:
            ConfigError: Not SGD: an adaptive optimizer would divide the penalty by its own size.
        """
        require_sgd(optimizer)
        self.detach()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Let the optimizer go."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def kill(self, stripes: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Let further stripes die.

        Args:
            stripes: By path, which ones, bool, the skeleton's shape.
            optimizer: The optimizer, which forgets them.
        """
        for path, dying in stripes.items():
            layer = self.layers[path]
            layer.skeleton.mul_(~dying)
            layer.conv.weight.mul_(layer.alive()[:, None])
            _bury(layer, optimizer)

    @torch.no_grad()
    def carry(self, average: Mapping[str, StripedLayer]) -> None:
        """Let what is dead here be dead in a moving average too, in place: an average of what was is not zero."""
        for path, layer in self.layers.items():
            alive, other = layer.alive(), average[path]
            other.skeleton.mul_(alive)
            other.conv.weight.mul_(alive[:, None])
            silence_dead_filters(other)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._split = []
        if skipped(optimizer):
            return
        for layer in self.layers.values():
            weight, skeleton = layer.conv.weight, layer.skeleton
            if weight.grad is None:
                continue
            alive = layer.alive()
            penalised = alive & ~strongest_stripes(weight)
            weight.div_(torch.where(alive, skeleton, 1.0)[:, None])
            pull = (weight.grad * weight).sum(dim=1)
            skeleton.grad = pull.add_(penalised.to(pull), alpha=self.strength).mul_(alive)
            weight.grad.mul_(skeleton[:, None])
            self._split.append(layer)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for layer in self._split:
            layer.skeleton.mul_(layer.skeleton > self.threshold)
            layer.conv.weight.mul_(layer.skeleton[:, None])
            _bury(layer, optimizer)
        self._split = []


def require_sgd(optimizer: Optimizer) -> None:
    """Refuse any other optimizer.

    Raises:
        ConfigError: It is another one.
    """
    if not isinstance(optimizer, SGD):
        raise ConfigError(
            f"method=stripes with {type(optimizer).__name__}",
            expected="SGD: an adaptive optimizer divides the penalty on skeletons by its own size",
            remedy="optimizer=SGD",
        )


def _bury(layer: StripedLayer, optimizer: Optimizer) -> None:
    """Zero what an optimizer remembers of dead stripes, and silence filters that have no other."""
    alive = layer.alive()
    for tensor, mask in ((layer.skeleton, alive), (layer.conv.weight, alive[:, None])):
        momentum = optimizer.state[tensor].get("momentum_buffer") if tensor in optimizer.state else None
        if momentum is not None:
            momentum.mul_(mask)
    silence_dead_filters(layer)


@torch.no_grad()
def silence_dead_filters(layer: StripedLayer) -> None:
    """Zero the scale and the shift behind filters without a living stripe, in place."""
    heard = layer.alive().flatten(1).any(dim=1)
    layer.norm.weight.mul_(heard)
    layer.norm.bias.mul_(heard)
