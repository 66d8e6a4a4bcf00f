"""Slice a model to its kept channels: one vectorised rule for every axis, then each module re-reads its sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.channels.tensors import named_tensors
from yolo_prune.surgery.copying import copied

KeptEntries: TypeAlias = Callable[[str, int], BoolArray]
"""(parameter name relative to a module, dim) -> which of its entries were kept."""

Reread: TypeAlias = Callable[[nn.Module, KeptEntries], None]
"""Makes a sliced module's attributes agree with its weights."""


def apply(model: nn.Module, graph: ChannelGraph, keep: BoolArray, *, reread: Sequence[Reread] = ()) -> nn.Module:
    """Return a slim copy of a model; the model itself is untouched.

    Args:
        model: The traced model.
        graph: Its channel graph.
        keep: Keep mask of shape (channels,).
        reread: What hosts add to the re-reading of sizes, called for every module.

    Raises:
        PlanError: The mask breaks a lock or a tie.
    """
    graph.check_keep(keep)
    # Sliced tensors stand in for the dense ones while the modules are copied: no dense copy is ever made.
    slim = copied(model, {name: selected(graph, keep, name, tensor) for name, tensor in named_tensors(model).items()})
    modules = list(slim.named_modules())
    for function in (_reread_torch, *reread):  # torch's layers first: blocks read their children
        for path, module in modules:

            def kept(name: str, dim: int, prefix: str = f"{path}." if path else "") -> BoolArray:
                return keep[graph.axes[prefix + name, dim].channels]

            function(module, kept)
    return slim


def selected(graph: ChannelGraph, keep: BoolArray, name: str, tensor: Tensor) -> Tensor:
    """Return the kept entries of a parameter or buffer: the one rule of surgery.

    Where the forward divides by the root of a number of entries (`Rescale`), the kept ones grow by as much.
    """
    value = rescaled(graph, keep, name, tensor.detach())
    axes = [(dim, graph.axes[name, dim]) for dim in range(tensor.dim()) if (name, dim) in graph.axes]
    cuts: list[tuple[int, Tensor]] = []
    # A grouped axis differs from block to block of rows, so it is cut while the blocks are whole.
    for dim, axis in sorted(axes, key=lambda item: item[1].groups == 1):
        kept = torch.from_numpy(keep[axis.channels])
        if kept.all():
            continue
        if axis.groups > 1:
            blocks = zip(value.chunk(axis.groups), kept.chunk(axis.groups), strict=True)
            value = torch.cat([block.index_select(dim, part.nonzero()[:, 0]) for block, part in blocks])
        else:
            cuts.append((dim, kept.nonzero()[:, 0]))
    if [dim for dim, _ in cuts] == [0, 1]:  # both at once: what is cut along one axis only would be memory for nothing
        return value[cuts[0][1][:, None], cuts[1][1]].contiguous()
    for dim, entries in cuts:
        value = value.index_select(dim, entries)
    return value


def rescaled(graph: ChannelGraph, keep: BoolArray, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor whose values grew with the number of their kept entries; see `channels.Rescale`."""
    for rescale in graph.rescales:
        if (name, 0) in rescale.axes:
            kept = keep[graph.axes[name, 0].channels[rescale.entries]].mean()
            if 0.0 < kept < 1.0:
                tensor = tensor.clone()
                tensor[torch.from_numpy(rescale.entries)] *= float(kept) ** 0.5
    return tensor


def _reread_torch(module: nn.Module, kept: KeptEntries) -> None:  # noqa: ARG001
    """Re-read the sizes that torch's own layers remember."""
    if isinstance(module, _ConvNd):
        _reread_convolution(module)
    elif isinstance(module, _BatchNorm) and module.weight is not None:
        module.num_features = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _reread_convolution(module: _ConvNd) -> None:
    first, second = module.weight.shape[:2]
    depthwise = module.groups > 1 and module.groups == module.in_channels  # a group is a channel
    if isinstance(module, _ConvTransposeNd):
        module.groups = first if depthwise else module.groups
        module.in_channels, module.out_channels = first, second * module.groups
        return
    if depthwise:
        module.groups = first // (module.out_channels // module.in_channels)
    module.in_channels, module.out_channels = second * module.groups, first
