"""Filters that others can stand in for (He et al., Filter Pruning via Geometric Median, 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from yolo_prune.channels import AxisKey, ChannelGraph
from yolo_prune.importance.base import FloatArray, Normalization, filters
from yolo_prune.importance.evidence import Evidence, Need


@dataclass(frozen=True)
class GeometricMedian:
    """The sum of a filter's distances to the other filters of its layer, eq. 4 of the paper.

    A filter near the geometric median of its layer is replaceable, however large it is.

    Attributes:
        name: What the user types.
        normalization: Distances depend on fan-in and width, so they are divided by their group's mean.
        needs: Nothing but weights.
    """

    name: str = "fpgm"
    normalization: Normalization = "mean"
    needs: frozenset[Need] = frozenset()

    def score(self, graph: ChannelGraph, evidence: Evidence) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield the sum of distances of every filter."""
        for key, matrix in filters(graph, evidence.tensors):
            # Not by matrix products, which lose the digits of small distances.
            distances = torch.cdist(matrix, matrix, compute_mode="donot_use_mm_for_euclid_dist")
            yield key, distances.double().sum(dim=1).numpy()


FPGM = GeometricMedian()
