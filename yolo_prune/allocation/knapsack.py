"""Keep the importance that a budget has room for: what matters least for what it costs goes first.

Source: Shen et al., Structural Pruning via Latency-Saliency Knapsack (HALP), 2022, whose knapsack over independent
layers becomes a greedy descent here, since what a layer costs depends on the widths of its neighbours: after every step
all prices are asked anew. Scores are summed, so they have to compare between layers (taylor, fisher).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from yolo_prune.allocation.constraints import WidthSolver
from yolo_prune.allocation.stairs import stairs_of
from yolo_prune.channels import ChannelGraph, IntArray
from yolo_prune.importance import FloatArray

AHEAD = 4
"""States that are looked at below the present one: where widths count as padded, the next may save nothing."""


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
        self._stairs = [stairs_of(graph, scores, unit) for unit in solver.units]
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
