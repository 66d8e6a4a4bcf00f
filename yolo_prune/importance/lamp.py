"""Magnitude that compares between layers.

Source: Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from yolo_prune.channels import AxisKey, ChannelGraph
from yolo_prune.importance.base import FloatArray, Normalization, filters
from yolo_prune.importance.evidence import Evidence, Need


@dataclass(frozen=True)
class LayerAdaptiveMagnitude:
    """A filter's squared norm over the sum of those of its layer that are not smaller, eq. 2 with filters as weights.

    The largest filter of each layer scores 1, so that no layer is emptied by a global ranking.

    Attributes:
        name: What the user types.
        normalization: The score is made to be compared between layers.
        needs: Nothing but weights.
    """

    name: str = "lamp"
    normalization: Normalization = "none"
    needs: frozenset[Need] = frozenset()

    def score(self, graph: ChannelGraph, evidence: Evidence) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield the score of every filter."""
        for key, matrix in filters(graph, evidence.tensors):
            yield key, lamp(matrix.double().square().sum(dim=1).numpy())


def lamp(squares: FloatArray) -> FloatArray:
    """Return each value over the sum of those that are not smaller, itself included; 0 for 0. Shape (n,)."""
    ascending = np.sort(squares)
    sums = np.cumsum(ascending[::-1])[::-1]  # at i: of the values from i on
    not_smaller = sums[np.searchsorted(ascending, squares, side="left")]
    return np.divide(squares, not_smaller, out=np.zeros_like(squares), where=squares > 0)


LAMP = LayerAdaptiveMagnitude()
