"""Random keep masks that respect locks and ties."""

from __future__ import annotations

import numpy as np

from yolo_prune.allocation import Constraints, WidthSolver
from yolo_prune.channels import BoolArray, ChannelGraph


def random_keep(
    graph: ChannelGraph, seed: int, *, low: float = 0.05, high: float = 0.9, heads: bool = False
) -> BoolArray:
    """Remove a random fraction in [low, high] of every free group, random channels of it.

    Args:
        graph: The channel graph.
        seed: Of the fractions and of the channels.
        low: Smallest fraction that is wished to go; ties and the last channel may forbid it.
        high: Largest one.
        heads: Attention loses whole heads instead of the same width of each.
    """
    rng = np.random.default_rng(seed)
    limits = Constraints(min_channels=1, max_fraction=0.95, round_to=1, attention="heads" if heads else "width")
    solver = WidthSolver(graph, limits, scores=rng.random(graph.channel_count) if heads else None)
    kept = solver.settle(graph.widths() * (1.0 - rng.uniform(low, high, len(graph.groups))))
    keep = np.ones(graph.channel_count, dtype=bool)
    for group, width in zip(graph.groups, kept, strict=True):
        keep[rng.permutation(group.channels)[width:]] = False
    return keep
