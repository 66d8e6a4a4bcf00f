"""Candidates: widths that meet a budget, by the closed form of the cost.

Source: Li et al., EagleEye, 2020, section 3.1: a ratio for each layer, uniform from 0 to a largest one; candidates that
miss the budget are thrown away. Here layers that are tied share one ratio, as they can be cut in no other way, and a
candidate is thrown away a bounded number of times and then moved onto the budget, so that drawing always ends; how
often that happened is told.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from yolo_prune.allocation import Budget, WidthSolver
from yolo_prune.allocation.budget import meet, require_reachable
from yolo_prune.allocation.paths import Ratios
from yolo_prune.channels import ChannelGraph, IntArray
from yolo_prune.errors import ConfigError
from yolo_prune.importance import FloatArray

BAND = 0.005
"""A candidate meets a budget when it costs at most that, and not less by more than this fraction."""

TRIES = 200
"""Draws before a candidate is moved onto the budget."""

PILOTS = 32
"""Draws that tell what candidates cost on average."""

NARROWINGS = 12
"""Halvings of the interval in which the largest ratio is looked for."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Widths that meet a budget.

    Attributes:
        number: Its number in the search.
        widths: Kept channels of every group, shape (groups,).
        tries: Draws that it took; `TRIES` where random ones all missed the budget, 0 where none was drawn.
        moved: Whether it was moved onto the budget.
    """

    number: int
    widths: IntArray
    tries: int
    moved: bool


class Sampler:
    """Draws candidates; the same number always gives the same one, whoever draws it and in whatever order.

    Args:
        graph: The channel graph.
        solver: What may be built.
        budget: What a candidate may cost.
        largest: Largest fraction of a group that is drawn (0.7 in the paper, for half the MACs of MobileNetV1). None:
            the one at which candidates cost as much as the budget allows, on average.
        seed: Of all draws.

    Raises:
        ConfigError: `largest` is out of range.
        InfeasibleTargetError: The floors do not allow the budget.
    """

    def __init__(
        self, graph: ChannelGraph, solver: WidthSolver, budget: Budget, *, largest: float | None = None, seed: int = 0
    ) -> None:
        if largest is not None and not 0.0 < largest < 1.0:
            raise ConfigError(f"largest ratio {largest:g}", expected="a number above 0 and below 1")
        self.solver, self.seed = solver, seed
        self._graph, self._budget = graph, budget
        self._limit = budget.ratio * budget.cost(graph, graph.widths())
        require_reachable(graph, budget, solver)
        self.largest = self._around_the_budget() if largest is None else largest

    def draw(self, number: int) -> Candidate:
        """Return a random candidate."""
        generator = np.random.default_rng([self.seed, number])
        for tries in range(1, TRIES + 1):
            ratios = self.of_groups(generator.uniform(0.0, self.largest, size=len(self.solver.units)))
            widths = self._cut(ratios)
            cost = self._budget.cost(self._graph, widths)
            if (1.0 - BAND) * self._limit <= cost <= self._limit:
                return Candidate(number=number, widths=widths, tries=tries, moved=False)
        return self.moved(number, ratios, tries=TRIES)

    def moved(self, number: int, ratios: FloatArray, *, tries: int = 0) -> Candidate:
        """Return the candidate on the budget whose groups are cut in proportion to ratios, shape (groups,), above 0."""
        widths = meet(self._graph, self._budget, self.solver, Ratios(self._graph, ratios))
        return Candidate(number=number, widths=widths, tries=tries, moved=True)

    def of_groups(self, ratios: FloatArray) -> FloatArray:
        """Return the ratio of every group, shape (groups,), from those of what is tied, shape (units,).

        Groups that stay whole have one too, which means nothing; none is 0, as `Ratios` asks.
        """
        found = np.full(len(self.solver.widths), np.finfo(float).eps)
        for unit, ratio in zip(self.solver.units, ratios, strict=True):
            found[unit.groups] = max(ratio, np.finfo(float).eps)
        return found

    def _cut(self, ratios: FloatArray) -> IntArray:
        return self.solver.settle(self.solver.widths * (1.0 - ratios))

    def _around_the_budget(self) -> float:
        """Return the largest ratio at which some draws cost as much as the budget allows, on average."""
        shares = np.random.default_rng(self.seed).uniform(size=(PILOTS, len(self.solver.units)))
        low, high = 0.0, 1.0
        for _ in range(NARROWINGS):
            middle = (low + high) / 2
            pilots = np.array([self._cut(self.of_groups(middle * share)) for share in shares])
            if self._budget.costs(self._graph, pilots).mean() > self._limit:
                low = middle
            else:
                high = middle
        return high
