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
    """Step k is k states down: each the one that loses least importance for the cost that it saves.

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
        at = np.zeros(len(self._stairs), dtype=np.int64)
        while open_ := [number for number, one in enumerate(self._stairs) if at[number] + 1 < len(one.kept)]:
            best = self._cheapest(at, open_, costs)
            at[best] += 1
            widths = self._widths[-1].copy()
            widths[self._stairs[best].groups] = self._stairs[best].kept[at[best]]
            self._widths.append(widths)
        self.steps = len(self._widths) - 1

    def wish(self, step: int) -> FloatArray:
        """Return the widths after so many states."""
        return self._widths[step].astype(np.float64)

    def _cheapest(self, at: IntArray, numbers: list[int], costs: Callable[[IntArray], FloatArray]) -> int:
        """Return the set of groups whose next state loses least for what it saves."""
        now = self._widths[-1]
        candidates = np.repeat(now[None], len(numbers) + 1, axis=0)
        for row, number in enumerate(numbers, start=1):
            one = self._stairs[number]
            candidates[row, one.groups] = one.kept[at[number] + 1]
        found = costs(candidates)
        lost = np.array([np.diff(self._stairs[number].lost)[at[number]] for number in numbers])
        saved = np.maximum(found[0] - found[1:], np.finfo(float).tiny)
        return numbers[int(np.argmin(lost / saved))]


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
    states = [np.zeros_like(widths)]
    for rung in range(1, RUNGS + 1):
        state = unit.nearest((widths * (rung / RUNGS)).astype(np.float64))
        if (state >= states[-1]).all() and (state > states[-1]).any():
            states.append(state)
    return np.array(states)
