"""Which candidates a search draws: within the budget, one ratio for what is tied, the same whoever draws them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from models import lively

from yolo_prune.allocation import Budget, Constraints, WidthSolver
from yolo_prune.allocation.budget import lowest_go
from yolo_prune.allocation.paths import Ratios
from yolo_prune.channels import ChannelGraph
from yolo_prune.errors import ConfigError, InfeasibleTargetError, MissingDependencyError
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.search.sampling import BAND, TRIES, Sampler
from yolo_prune.search.strategies import STRATEGIES, UNINFORMED, InformedSearch


def sampler_of(name: str = "yolov8n", ratio: float = 0.5, **more: Any) -> tuple[ChannelGraph, Sampler, float]:
    """A sampler, and what a candidate may cost."""
    graph = trace_model(lively(name))
    budget = Budget(unit="macs", ratio=ratio, imgsz_px=320)
    sampler = Sampler(graph, WidthSolver(graph, Constraints()), budget, **more)
    return graph, sampler, ratio * budget.cost(graph, graph.widths())


class TestSampler:
    @pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
    @pytest.mark.parametrize("ratio", [0.7, 0.5, 0.3])
    def test_candidates_meet_the_budget_and_can_be_built(self, name, ratio):
        graph, sampler, limit = sampler_of(name, ratio)
        for number in range(20):
            candidate = sampler.draw(number)
            cost = float(graph.cost.macs(candidate.widths, imgsz_px=320))
            assert cost <= limit
            assert candidate.moved or cost >= (1 - BAND) * limit
            assert cost >= 0.95 * limit  # one that was moved comes near, too
            graph.check_keep(lowest_go(graph, np.arange(graph.channel_count, dtype=float), candidate.widths))

    @pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
    @pytest.mark.parametrize("ratio", [0.7, 0.5, 0.3])
    def test_most_of_them_are_drawn_and_not_moved(self, name, ratio):
        """What the largest ratio is for: by the paper's 0.7, no draw ever keeps 70% or 30%."""
        _, sampler, _ = sampler_of(name, ratio)
        moved = [sampler.draw(number).moved for number in range(20)]
        assert sum(moved) <= 8

    def test_what_is_tied_shares_one_ratio(self):
        graph = trace_model(lively("yolo11n"))
        solver = WidthSolver(graph, Constraints(round_to=1, min_channels=1))
        sampler = Sampler(graph, solver, Budget(unit="macs", ratio=0.5))
        tied = [unit.groups for unit in solver.units if len(unit.groups) > 1]
        assert tied
        for number in range(5):
            gone = 1.0 - sampler.draw(number).widths / graph.widths()
            for groups in tied:
                np.testing.assert_allclose(gone[groups], gone[groups[0]])

    def test_smaller_budgets_draw_larger_ratios(self):
        largest = [sampler_of(ratio=ratio)[1].largest for ratio in (0.7, 0.5, 0.3)]
        assert 0.1 < largest[0] < largest[1] < largest[2] < 1.0

    def test_a_number_is_a_candidate_whatever_was_drawn_before(self):
        _, first, _ = sampler_of(seed=3)
        _, second, _ = sampler_of(seed=3)
        forwards = [first.draw(number).widths.tolist() for number in range(6)]
        backwards = [second.draw(number).widths.tolist() for number in reversed(range(6))]
        assert forwards == backwards[::-1]
        assert len({str(widths) for widths in forwards}) == 6
        _, other, _ = sampler_of(seed=4)
        assert other.draw(0).widths.tolist() != forwards[0]

    def test_what_is_never_met_is_moved_after_a_bounded_number_of_draws(self):
        """A known bug of a fork: to draw for ever."""
        graph, sampler, limit = sampler_of(ratio=0.3, largest=0.05)
        candidate = sampler.draw(0)
        assert candidate.moved
        assert candidate.tries == TRIES
        assert 0.95 * limit <= float(graph.cost.macs(candidate.widths, imgsz_px=320)) <= limit

    def test_bad_input(self):
        with pytest.raises(InfeasibleTargetError):
            sampler_of(ratio=0.001)
        for largest in (0.0, 1.0, -0.5):
            with pytest.raises(ConfigError, match="largest ratio"):
                sampler_of(largest=largest)


class TestStrategies:
    def scored(self, strategy: Any, count: int, worth: Any) -> dict[int, tuple[np.ndarray, float]]:
        """Candidates and what they are worth, round by round."""
        lines: dict[int, tuple[np.ndarray, float]] = {}
        for numbers in strategy.rounds(count):
            proposed = strategy.propose(numbers, lines)
            assert [candidate.number for candidate in proposed] == list(numbers)
            lines |= {candidate.number: (candidate.widths, worth(candidate.widths)) for candidate in proposed}
        assert list(lines) == list(range(count))
        return lines

    @pytest.mark.parametrize("name", list(STRATEGIES))
    def test_more_candidates_begin_with_the_same_ones(self, name):
        def worth(widths: np.ndarray) -> float:
            return float(widths[3])

        short, long = (self.scored(STRATEGIES[name](sampler_of()[1]), count, worth) for count in (19, 26))
        for number, (widths, _) in short.items():
            np.testing.assert_array_equal(widths, long[number][0])

    def test_informed_ones_are_within_the_budget_and_learn(self):
        """The worth is the width of one group: random candidates stay near the middle, informed ones go up."""
        graph, sampler, limit = sampler_of()
        lines = self.scored(InformedSearch(sampler), 48, lambda widths: float(widths[5]))
        assert all(float(graph.cost.macs(widths, imgsz_px=320)) <= limit for widths, _ in lines.values())
        worths = np.array([worth for _, worth in lines.values()])
        assert worths[32:].mean() > worths[:UNINFORMED].mean()

    def test_the_informed_one_begins_as_the_random_one(self):
        random, informed = (
            self.scored(STRATEGIES[name](sampler_of()[1]), UNINFORMED, lambda _: 0.0) for name in STRATEGIES
        )
        assert all((random[number][0] == informed[number][0]).all() for number in random)

    def test_optuna_is_asked_for(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "optuna", None)
        with pytest.raises(MissingDependencyError, match="optuna"):
            InformedSearch(sampler_of()[1])


class TestRatios:
    def test_groups_shrink_in_proportion_and_to_nothing(self):
        graph = trace_model(lively("yolov8n"))
        ratios = np.random.default_rng(0).uniform(0.1, 0.7, size=len(graph.groups))
        path = Ratios(graph, ratios)
        wishes = np.array([path.wish(step) for step in range(0, path.steps + 1, 50)])
        assert (np.diff(wishes, axis=0) <= 0).all()
        np.testing.assert_allclose(wishes[0], graph.widths())
        np.testing.assert_allclose(wishes[-1], 0.0, atol=1e-9)
        early = 1.0 - wishes[1] / graph.widths()
        np.testing.assert_allclose(early / early.max(), ratios / ratios.max(), rtol=1e-6)
