"""Keep the importance that a budget has room for: what matters least for what it costs goes first.

Source: Shen et al., Structural Pruning via Latency-Saliency Knapsack (HALP), 2022, whose knapsack over independent
layers becomes a greedy descent here, since what a layer costs depends on the widths of its neighbours: after every step
all prices are asked anew. Scores are summed, so they have to compare between layers (taylor, fisher).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from yolo_prune.allocation.constraints import WidthSolver
from yolo_prune.allocation.coupled import Coupled
from yolo_prune.allocation.ladders import Ladder
from yolo_prune.channels import ChannelGraph, IntArray
from yolo_prune.importance import FloatArray

AHEAD = 4
"""States that are looked at below the present one: where widths count as padded, the next may save nothing."""

RUNGS = 16
"""States of a set of groups whose states cannot be listed."""


@dataclass(frozen=True, kw_only=True)
class _Stairs:
    """The states of a set of tied groups, from whole to smallest.

    Attributes:
        groups: Indices of the groups, shape (members,).
        kept: Their widths in each state, shape (states, members).
        lost: Importance that each state lacks, shape (states,).
    """

    groups: IntArray
    kept: IntArray
    lost: FloatArray


class Knapsack:
    """Each step goes some states down in one set: the way that loses least importance for the cost that it saves.

    Args:
        graph: The channel graph.
        scores: One score per channel, shape (channels,); the lowest of each group go first.
        solver: What can be built.
        costs: From kept widths, shape (candidates, groups), to costs, shape (candidates,).
    """

    def __init__(
        self, graph: ChannelGraph, scores: FloatArray, solver: WidthSolver, costs: Callable[[IntArray], FloatArray]
    ) -> None:
        self._stairs = [_stairs(graph, scores, unit, graph.widths()) for unit in solver.units]
        self._widths = [graph.widths()]
        at = [0] * len(self._stairs)
        while ways := [
            (number, state)
            for number, one in enumerate(self._stairs)
            for state in range(at[number] + 1, min(at[number] + 1 + AHEAD, len(one.kept)))
        ]:
            number, at[number] = self._best(at, ways, costs)
            widths = self._widths[-1].copy()
            widths[self._stairs[number].groups] = self._stairs[number].kept[at[number]]
            self._widths.append(widths)
        self.steps = len(self._widths) - 1

    def wish(self, step: int) -> FloatArray:
        """Return the widths after so many steps."""
        return self._widths[step].astype(np.float64)

    def _best(
        self, at: list[int], ways: list[tuple[int, int]], costs: Callable[[IntArray], FloatArray]
    ) -> tuple[int, int]:
        """Return the set of groups, and the state of it, that loses least for what it saves; if none saves, least."""
        candidates = np.repeat(self._widths[-1][None], len(ways) + 1, axis=0)
        for row, (number, state) in enumerate(ways, start=1):
            candidates[row, self._stairs[number].groups] = self._stairs[number].kept[state]
        found = costs(candidates)
        lost = np.array(
            [self._stairs[number].lost[state] - self._stairs[number].lost[at[number]] for number, state in ways]
        )
        saved = found[0] - found[1:]
        price = np.divide(lost, saved, out=np.full(len(ways), np.inf), where=saved > 1e-12 * found[0])
        return ways[int(np.lexsort((lost, price))[0])]


def _stairs(graph: ChannelGraph, scores: FloatArray, unit: Ladder | Coupled, widths: IntArray) -> _Stairs:
    removed = _removed(unit, widths[unit.groups])
    lost = np.zeros(len(removed))
    for column, index in enumerate(unit.groups):
        ascending = np.sort(scores[graph.groups[index].channels])
        lost += np.concatenate([[0.0], np.cumsum(ascending)])[removed[:, column]]
    return _Stairs(groups=unit.groups, kept=widths[unit.groups] - removed, lost=lost)


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
