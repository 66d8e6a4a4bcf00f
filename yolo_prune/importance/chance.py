"""Scores by chance: what a criterion has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from yolo_prune.channels import AxisKey, ChannelGraph
from yolo_prune.importance.base import Criterion, FloatArray, Normalization, filters
from yolo_prune.importance.evidence import Evidence, Need


@dataclass(frozen=True)
class Chance:
    """Uniform random numbers from 0 to 1, the same for the same graph and seed.

    Attributes:
        name: What the user types.
        normalization: They are alike in all layers.
        needs: Nothing but the shapes of weights.
        seed: Of the numbers.
    """

    name: str = "random"
    normalization: Normalization = "none"
    needs: frozenset[Need] = frozenset()
    seed: int = 0

    def score(self, graph: ChannelGraph, evidence: Evidence) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield a number for every filter; all producers of a channel draw the same one."""
        numbers = np.random.default_rng(self.seed).uniform(size=graph.channel_count)
        for key, _ in filters(graph, evidence.tensors):
            yield key, numbers[graph.axes[key].channels]


RANDOM = Chance()


def seeded(criterion: Criterion, seed: int) -> Criterion:
    """Return a criterion whose numbers come of a seed; one that draws none is returned as it is."""
    return replace(criterion, seed=seed) if isinstance(criterion, Chance) else criterion
