"""From scores of single tensors to one score per channel.

A criterion looks at tensors one at a time and scores the entries of their axes; this module reduces those scores over
everything that a channel is made of and makes layers comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from yolo_prune.channels import Axis, AxisKey, ChannelGraph, Role
from yolo_prune.errors import ConfigError
from yolo_prune.importance.evidence import Evidence, Need

FloatArray: TypeAlias = npt.NDArray[np.float64]
Reduction: TypeAlias = Literal["sum", "mean", "max"]
Normalization: TypeAlias = Literal["none", "mean"]


class Criterion(Protocol):
    """Scores entries of axes; a larger score matters more.

    Attributes:
        name: What the user types.
        normalization: What makes its scores comparable between layers.
        needs: What it wants to know of training batches; empty if weights are enough.
    """

    @property
    def name(self) -> str: ...  # noqa: D102  # described above

    @property
    def normalization(self) -> Normalization: ...  # noqa: D102

    @property
    def needs(self) -> frozenset[Need]: ...  # noqa: D102

    def score(self, graph: ChannelGraph, evidence: Evidence) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield, for each axis that the criterion looks at, one score per entry, shape (entries of the axis,)."""
        ...


@dataclass(frozen=True)
class FilterCriterion:
    """A criterion that looks at the filters of one weight at a time, and at nothing else.

    Attributes:
        name: What the user types.
        value: From a float32 matrix of shape (filters, numbers per filter) to one score per filter.
        normalization: What makes the scores of different weights comparable.
        needs: Nothing but weights.
        by_filters: Whether it scores slices of weights, so that it can score those that read a channel as well.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    normalization: Normalization = "mean"
    needs: frozenset[Need] = frozenset()
    by_filters: bool = True

    def score(self, graph: ChannelGraph, evidence: Evidence) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield the scores of the filters of every weight."""
        for key, matrix in filters(graph, evidence.tensors):
            yield key, self.value(matrix).double().numpy()


def filters(graph: ChannelGraph, tensors: Mapping[str, Tensor]) -> Iterator[tuple[AxisKey, Tensor]]:
    """Yield each weight that produces channels, as (axis, float32 matrix of shape (filters, numbers per filter))."""
    for (name, dim), axis in graph.axes.items():
        if axis.role is Role.PRODUCER and name in tensors and tensors[name].dim() > 1:
            yield (name, dim), as_rows(tensors[name], dim, axis)


def as_rows(weight: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return a weight as one row for each entry of an axis, on the CPU; see `Axis.groups`. A view, where it can be."""
    blocks = [block.movedim(dim, 0).flatten(1) for block in weight.detach().cpu().float().chunk(axis.groups)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def scale_axes(graph: ChannelGraph) -> Iterator[AxisKey]:
    """Yield the axis of each batch-norm scale."""
    for name, dim in graph.axes:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and (f"{module}.running_mean", 0) in graph.axes:
            yield name, dim


def scales(graph: ChannelGraph, tensors: Mapping[str, Tensor]) -> Iterator[tuple[AxisKey, Tensor]]:
    """Yield each batch-norm scale, as (axis, vector of shape (channels,))."""
    for key in scale_axes(graph):
        if key[0] in tensors:
            yield key, tensors[key[0]].detach().cpu().double()


def score_channels(
    graph: ChannelGraph,
    evidence: Evidence,
    criterion: Criterion,
    *,
    reduction: Reduction = "mean",
    normalization: Normalization | None = None,
    consumers: bool = False,
) -> FloatArray:
    """Return one score per channel.

    Args:
        graph: The channel graph.
        evidence: Weights, and what the criterion needs of training batches.
        criterion: Scores the entries of axes.
        reduction: How the scores of everything that a channel is made of are combined.
        normalization: `mean` divides by the mean of the channel's group, so that groups compare in a global ranking;
            `none` compares raw scores. Default: the criterion's own.
        consumers: The slices of weights that read a channel count as well, each like a filter.

    Returns:
        Shape (channels,). Channels that the criterion cannot score get infinity: they are the last to go.

    Raises:
        ConfigError: A score is not finite (NaN weights).
    """
    total = np.zeros(graph.channel_count)
    largest = np.full(graph.channel_count, -np.inf)
    members = np.zeros(graph.channel_count)
    for key, scores in criterion.score(_with_consumers(graph) if consumers else graph, evidence):
        channels = graph.axes[key].channels
        if not np.isfinite(scores).all():
            raise ConfigError(f"'{key[0]}' has scores that are not finite", expected="finite weights")
        np.add.at(total, channels, scores)
        np.add.at(members, channels, 1)
        np.maximum.at(largest, channels, scores)
    with np.errstate(invalid="ignore", divide="ignore"):
        combined = {"sum": total, "mean": total / members, "max": largest}[reduction]
    combined = np.where(members > 0, combined, np.inf)
    return _normalized(graph, combined) if (normalization or criterion.normalization) == "mean" else combined


def _with_consumers(graph: ChannelGraph) -> ChannelGraph:
    """Return a graph whose consumers are called producers: so criteria look at them in the same way."""
    axes = {
        key: replace(axis, role=Role.PRODUCER) if axis.role is Role.CONSUMER else axis
        for key, axis in graph.axes.items()
    }
    return replace(graph, axes=axes)


def _normalized(graph: ChannelGraph, scores: FloatArray) -> FloatArray:
    """Divide by the mean of each group; a group of zeros stays zero."""
    result = scores.copy()
    for group in graph.groups:
        mean = scores[group.channels].mean()
        if np.isfinite(mean) and mean > 0:
            result[group.channels] /= mean
    return result
