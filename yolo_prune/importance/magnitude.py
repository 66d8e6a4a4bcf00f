"""Filter norms: how much weight a channel's filters carry (Li et al., Pruning Filters for Efficient ConvNets, 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from yolo_prune.channels import AxisKey, ChannelGraph
from yolo_prune.importance.base import FloatArray, Normalization, filters
from yolo_prune.importance.evidence import Evidence, Need


@dataclass(frozen=True)
class FilterNorm:
    """The p-norm of each filter.

    Attributes:
        name: What the user types.
        order: p of the norm.
        needs: Nothing but weights.
        normalization: Norms depend on the fan-in, so they are divided by their group's mean.
    """

    name: str
    order: int
    normalization: Normalization = "mean"
    needs: frozenset[Need] = frozenset()

    def score(self, graph: ChannelGraph, evidence: Evidence) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield the norm of every filter."""
        for key, matrix in filters(graph, evidence.tensors):
            yield key, torch.linalg.vector_norm(matrix, self.order, dim=1).double().numpy()


L1 = FilterNorm("l1", 1)
L2 = FilterNorm("l2", 2)
