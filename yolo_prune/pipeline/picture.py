"""The channel graph as plain records, in the order of the model: what `report.picture` draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from torch import Tensor, nn

from yolo_prune.channels import ChannelGraph, Role
from yolo_prune.channels.graph import AxisKey, IntArray
from yolo_prune.report.groups import GroupRow
from yolo_prune.report.picture import Bar, Box, Layer, Picture, Segments

Bars: TypeAlias = dict[tuple[bool, Segments], list[AxisKey]]
"""Axes by whether they read their channels, and by their segments: those that are cut alike are one bar."""


def picture_of(
    model: nn.Module, graph: ChannelGraph, groups: tuple[GroupRow, ...], *, title: str, summary: str
) -> Picture:
    """Return the records of a picture.

    Args:
        model: The model that was traced; only names, classes and shapes are read.
        graph: Its channel graph.
        groups: One record per group of the graph, in its order.
        title: What the model is called.
        summary: A line about the whole model.
    """
    tensors = dict(_tensors(model))
    boxes: dict[str, list[Box]] = defaultdict(list)
    for path, bars in _bars(graph, tensors).items():
        boxes[_layer(model, path)].append(_box(path, bars, tensors))
    layers = tuple(
        Layer(name=name or "the model", kind=type(model.get_submodule(name)).__name__, boxes=tuple(found))
        for name, found in boxes.items()
    )
    return Picture(title=title, summary=summary, layers=layers, groups=groups)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers module by module, so that a layer's stand together."""
    for path, module in model.named_modules():
        yield from module.named_parameters(path, recurse=False)
        yield from module.named_buffers(path, recurse=False)


def _bars(graph: ChannelGraph, tensors: dict[str, Tensor]) -> dict[str, Bars]:
    """Return the bars of each layer by its module path; a norm's vectors go to the layer that feeds it."""
    feeders = {norm: feeder for feeder, norm in graph.norms.items()}
    group_of = np.empty(graph.channel_count, dtype=np.int64)
    for index, group in enumerate(graph.groups):
        group_of[group.channels] = index
    boxes: dict[str, Bars] = defaultdict(lambda: defaultdict(list))
    for name, tensor in tensors.items():
        path = name.rpartition(".")[0] or name
        for key in ((name, dim) for dim in range(tensor.dim()) if (name, dim) in graph.axes):
            axis = graph.axes[key]
            segments = _segments(group_of[axis.channels])
            boxes[feeders.get(path, path)][axis.role is Role.CONSUMER, segments].append(key)
    return boxes


def _segments(groups: IntArray) -> Segments:
    """Run-length encode the groups of an axis' entries, shape (entries,)."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    lengths = np.diff(starts, append=len(groups))
    return tuple(zip(groups[starts].tolist(), lengths.tolist(), strict=True))


def _layer(model: nn.Module, path: str) -> str:
    """Return the path of the top-level layer: a child of the model, or of the container in which it keeps them all."""
    first, _, rest = path.partition(".")
    child = dict(model.named_children()).get(first)
    if child is None:  # a tensor of the model itself
        return ""
    if rest and isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return f"{first}.{rest.partition('.')[0]}"
    return first


def _box(path: str, bars: Bars, tensors: dict[str, Tensor]) -> Box:
    """Return a layer's box, with what it writes before what it reads."""
    ordered = sorted(bars.items(), key=lambda bar: bar[0][0])
    drawn = tuple(
        Bar(kind=_kind(reads, tensors[axes[0][0]]), axes=tuple(axes), segments=segments)
        for (reads, segments), axes in ordered
    )
    first_name = next(iter(bars.values()))[0][0]
    return Box(name=path, shape=tuple(tensors[first_name].shape), bars=drawn)


def _kind(reads: bool, tensor: Tensor) -> str:
    """Return how a bar is called: what a layer reads or writes, or entries of a vector."""
    return "in" if reads else "out" if tensor.dim() > 1 else "vector"
