"""What a set of tied groups loses on its way from whole to smallest, whatever it is chosen by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from yolo_prune.allocation.coupled import Coupled
from yolo_prune.allocation.ladders import Ladder
from yolo_prune.channels import ChannelGraph, IntArray
from yolo_prune.importance import FloatArray

RUNGS = 16
"""States of a set of groups whose states cannot be listed."""


@dataclass(frozen=True, kw_only=True)
class Stairs:
    """The states of a set of tied groups, from whole to smallest.

    Attributes:
        groups: Indices of the groups, shape (members,).
        kept: Their widths in each state, shape (states, members).
        lost: Importance that each state lacks, shape (states,).
    """

    groups: IntArray
    kept: IntArray
    lost: FloatArray


def stairs_of(graph: ChannelGraph, scores: FloatArray, unit: Ladder | Coupled) -> Stairs:
    """Return the states of a set with what each loses.

    Args:
        graph: The channel graph.
        scores: One score per channel, shape (channels,); the lowest of each group go first.
        unit: One of `WidthSolver.units`.
    """
    widths = graph.widths()
    removed = _removed(unit, widths[unit.groups])
    lost = np.zeros(len(removed))
    for column, index in enumerate(unit.groups):
        ascending = np.sort(scores[graph.groups[index].channels])
        lost += np.concatenate([[0.0], np.cumsum(ascending)])[removed[:, column]]
    return Stairs(groups=unit.groups, kept=widths[unit.groups] - removed, lost=lost)


def _removed(unit: Ladder | Coupled, widths: IntArray) -> IntArray:
    """Return removed channels of each group of a set in states that only lose, shape (states, members)."""
    if isinstance(unit, Ladder):
        return unit.removed
    wishes = [unit.nearest((widths * (rung / RUNGS)).astype(np.float64)) for rung in range(RUNGS + 1)]
    states = [wishes[-1]]  # the smallest, below which nothing may be missed
    for state in reversed(wishes[:-1]):
        if (state <= states[-1]).all() and (state < states[-1]).any():
            states.append(state)
    if states[-1].any():
        states.append(np.zeros_like(widths))
    return np.array(states[::-1])
