"""What criteria look at: weights, and what some training batches did with them, gathered once for all criteria."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from yolo_prune.channels import AxisKey, ChannelGraph, Role
from yolo_prune.channels.tensors import named_tensors
from yolo_prune.errors import ConfigError

Need: TypeAlias = Literal["gradients", "activations"]
"""What a criterion may want to know beside the weights."""

QUIET = 0.1
"""An activation is quiet when it is not larger than this fraction of its layer's root mean square."""

RANKED_IMAGES = 4
"""Images of a batch whose feature maps are decomposed: a decomposition for each map is slow."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a convolution's filters put out, behind norm and activation, on average over images.

    Attributes:
        quiet: Share of a channel's values that are quiet, see `QUIET`; shape (channels,).
        rank: Effective rank of its feature map, `exp(entropy of the normalised singular values)` (Roy and Vetterli, The
            Effective Rank, 2007): from 1, or 0 for a map of zeros, to the map's side; shape (channels,).
    """

    quiet: Tensor
    rank: Tensor


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What criteria look at.

    Attributes:
        tensors: Parameters and buffers by state-dict name.
        gradients: Mean over batches of |gradient|, by parameter name, of the parameter's shape.
        squares: Mean over batches of the squared gradient, likewise.
        activations: By the axis of the filters.
    """

    tensors: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[AxisKey, Activations] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Evidence:
        """Return what can be known of a model without data: its weights, on the CPU."""
        return cls(tensors={name: tensor.detach().cpu() for name, tensor in named_tensors(model).items()})


def collect(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    needs: Collection[Need],
) -> Evidence:
    """Run training batches once and gather what criteria need of them.

    Args:
        model: The traced model, in the mode in which it shall run; it is left as it is.
        graph: Its channel graph.
        batches: What `loss` takes.
        loss: Runs the model on a batch and returns the training loss.
        needs: What is gathered.

    Raises:
        ConfigError: No batch, or a loss that is not finite.
    """
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = _Gradients(model, graph) if "gradients" in needs else None
    activations = _ActivationHooks(model, graph) if "activations" in needs else None
    count = 0
    try:
        for count, batch in enumerate(batches, start=1):
            model.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(gradients is not None):
                value = loss(model, batch).sum()
            if not value.isfinite():
                raise ConfigError(f"the loss of batch {count} is {value.item()}", expected="a finite one")
            if gradients is not None:
                value.backward()
                gradients.add()
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, was in trained.items():
            parameter.requires_grad_(was)
        if activations is not None:
            activations.remove()
    if not count:
        raise ConfigError("no batch to learn importance from", expected="training images")
    return Evidence(
        tensors=Evidence.of(model).tensors,
        gradients=gradients.means(count) if gradients else {},
        squares=gradients.mean_squares(count) if gradients else {},
        activations=activations.result() if activations else {},
    )


class _Gradients:
    """Sums of |gradient| and of its square, for every parameter that produces or reads channels."""

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        wanted = {name for name, _ in graph.axes}
        self._parameters = {name: tensor for name, tensor in model.named_parameters() if name in wanted}
        for tensor in self._parameters.values():
            tensor.requires_grad_(True)
        self._sums = {name: torch.zeros_like(tensor) for name, tensor in self._parameters.items()}
        self._squares = {name: torch.zeros_like(tensor) for name, tensor in self._parameters.items()}

    def add(self) -> None:
        """Add those of one batch."""
        for name, tensor in self._parameters.items():
            if tensor.grad is not None:
                self._sums[name] += tensor.grad.abs()
                self._squares[name] += tensor.grad.square()

    def means(self, count: int) -> dict[str, Tensor]:
        """Return the mean of |gradient| over so many batches."""
        return {name: value / count for name, value in self._sums.items()}

    def mean_squares(self, count: int) -> dict[str, Tensor]:
        """Return the mean of the squares."""
        return {name: value / count for name, value in self._squares.items()}


class _ActivationHooks:
    """Forward hooks behind the activation of every convolution that produces channels."""

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self._quiet: dict[AxisKey, list[Tensor]] = {}
        self._ranks: dict[AxisKey, list[Tensor]] = {}
        self._handles = []
        for path, module in model.named_modules():
            if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                continue
            key = (f"{path}.weight", 1 if isinstance(module, nn.ConvTranspose2d) else 0)
            if key in graph.axes and graph.axes[key].role is Role.PRODUCER:
                watched = model.get_submodule(activated(model, graph, path))
                self._handles.append(watched.register_forward_hook(self._hook(key, module.out_channels)))

    def _hook(self, key: AxisKey, channels: int) -> Callable[..., None]:
        @torch.no_grad()
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[1] != channels:
                raise ConfigError(f"'{key[0]}' puts out no feature maps", expected="(images, channels, height, width)")
            values = output.detach().float()
            if not values.isfinite().all():
                raise ConfigError(f"activations behind '{key[0]}' are not finite", expected="finite weights and images")
            limit = QUIET * values.square().mean().sqrt()
            self._quiet.setdefault(key, []).append((values.abs() <= limit).float().mean(dim=(0, 2, 3)))
            self._ranks.setdefault(key, []).append(effective_rank(values[:RANKED_IMAGES]).mean(dim=0))

        return hook

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def result(self) -> dict[AxisKey, Activations]:
        """Return the means over the batches; a layer that a training forward does not run is absent."""
        return {
            key: Activations(quiet=torch.stack(quiet).mean(dim=0), rank=torch.stack(self._ranks[key]).mean(dim=0))
            for key, quiet in self._quiet.items()
        }


def activated(model: nn.Module, graph: ChannelGraph, conv: str) -> str:
    """Return the path of the module whose output is a convolution's, behind norm and activation.

    That is the module that owns it, if it owns no other convolution, as the `Conv` blocks of all YOLOs do. Otherwise
    the norm behind it, or the convolution itself: their values are those before an activation that cannot be told.
    """
    owner = conv.rpartition(".")[0]
    last = graph.norms.get(conv, conv)
    if not owner or last == conv:
        return last
    children = model.get_submodule(owner).children()
    return owner if sum(isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)) for child in children) == 1 else last


def effective_rank(maps: Tensor) -> Tensor:
    """Return the effective rank of matrices, of shape (..., height, width), as shape (...); 0 for a matrix of zeros."""
    values = torch.linalg.svdvals(maps)
    shares = values / values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=-1)
    return torch.where(values.sum(dim=-1) > 0, entropy.exp(), 0.0)
