"""Timing in turns: its order, what is timed, and the arithmetic of what it found."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_prune.device import timings
from yolo_prune.device.image_to_boxes import ImageToBoxes
from yolo_prune.device.timings import LatencySummary, SpeedUp, time_in_turns, turn_order

milliseconds = st.floats(0.01, 1e4)
rounds = st.integers(1, 30).flatmap(lambda size: st.tuples(*[st.lists(milliseconds, min_size=size, max_size=size)] * 2))
"""Latencies of two contenders over the same rounds."""


def speed_up(entry: list[float], baseline: list[float]) -> SpeedUp:
    return SpeedUp.between("entry", entry, baseline="baseline", baseline_ms=baseline)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Nothing here runs threads that a pause would wait for."""
    monkeypatch.setattr(timings, "PAUSE_S", 0)


class Clock:
    """Stands still unless work moves it."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def work(self, milliseconds: float, value: object = None):
        def stage(given: object) -> object:
            self.now_ns += round(milliseconds * 1e6)
            return given if value is None else value

        return stage


class TestSummary:
    def test_by_hand(self):
        summary = LatencySummary.of([float(value) for value in range(101)])
        assert summary == LatencySummary(median_ms=50, p5_ms=5, p25_ms=25, p75_ms=75, p95_ms=95, min_ms=0)

    @settings(deadline=None)
    @given(st.lists(milliseconds, min_size=1), st.randoms())
    def test_order_statistics(self, latencies_ms, random):
        summary = LatencySummary.of(latencies_ms)
        inside = [summary.min_ms, summary.p5_ms, summary.p25_ms, summary.median_ms, summary.p75_ms, summary.p95_ms]
        assert inside == pytest.approx(sorted(inside))
        assert inside[0] == min(latencies_ms)
        assert inside[-1] <= max(latencies_ms) * (1 + 1e-9)
        shuffled = random.sample(latencies_ms, len(latencies_ms))
        assert LatencySummary.of(shuffled) == summary


class TestSpeedUp:
    def test_ratio_is_paired(self):
        # Every round is slower than the one before; within a round the entry always takes half as long.
        result = speed_up([5, 10, 15, 20, 25], [10, 20, 30, 40, 50])
        assert (result.ratio, result.p25, result.p75) == (2, 2, 2)
        assert not result.faster  # the intervals [20, 40] and [10, 20] touch

    def test_faster_needs_separate_intervals(self):
        dense = [10, 11, 12, 13, 14] * 20
        assert speed_up([5, 6, 7, 8, 9] * 20, dense).faster
        overlapping = speed_up([8, 9, 10, 11.5, 12] * 20, dense)
        assert overlapping.ratio > 1
        assert not overlapping.faster

    def test_faster_needs_rounds(self):
        few, dense = [5, 6, 7] * 33, [10, 11, 12] * 33
        found = speed_up(few, dense)
        assert not found.faster
        assert found.in_words().endswith("), too few rounds to tell: 99")
        assert speed_up([*few, 6], [*dense, 11]).faster

    @settings(deadline=None)
    @given(rounds)
    def test_never_faster_both_ways(self, both):
        first, second = (one * 101 for one in both)
        there, back = speed_up(first, second), speed_up(second, first)
        assert not (there.faster and back.faster)
        assert there.p25 <= there.ratio <= there.p75
        if len(first) % 2:  # the median is a round
            assert there.ratio == pytest.approx(1 / back.ratio)

    @settings(deadline=None)
    @given(rounds)
    def test_faster_means_that_the_medians_are_apart_too(self, both):
        first, second = (one * 101 for one in both)
        if speed_up(first, second).faster:
            assert np.median(first) < np.median(second)

    @settings(deadline=None)
    @given(st.lists(milliseconds, min_size=1), st.floats(0.1, 10))
    def test_a_constant_factor_is_found(self, latencies_ms, factor):
        result = speed_up(latencies_ms, [factor * value for value in latencies_ms])
        assert [result.p25, result.ratio, result.p75] == pytest.approx([factor] * 3)
        itself = speed_up(latencies_ms, latencies_ms)
        assert itself.ratio == 1
        assert not itself.faster

    @pytest.mark.parametrize(
        ("latencies_ms", "words"),
        [([5, 6, 7], "faster"), ([9, 10, 11], "not separable"), ([20, 22, 24], "not faster")],
    )
    def test_words(self, latencies_ms, words):
        assert speed_up(latencies_ms * 34, [10, 11, 12] * 34).in_words().endswith(f"), {words}")


class TestTurns:
    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    def test_places_are_shared(self, size):
        names = "abcdefg"[:size]
        orders = [turn_order(names, turn) for turn in range(2 * size)]
        assert all(sorted(order) == sorted(names) for order in orders)
        places = Counter((name, place) for order in orders for place, name in enumerate(order))
        assert set(places.values()) == {2}
        followers = Counter(pair for order in orders for pair in pairwise(order))
        assert all(followers[a, b] == followers[b, a] for a, b in followers)

    def test_order_and_number_of_calls(self):
        calls: list[str] = []
        contenders = {name: [lambda _, name=name: calls.append(name)] for name in "abc"}
        times = time_in_turns(contenders, None, runs=4, warmup=2, after_round=lambda: calls.append("|"))
        expected = []
        for turn in range(-2, 4):
            expected += [name for name in turn_order("abc", turn) for _ in range(2)]
            expected += ["|"] if turn >= 0 else []
        assert calls == expected
        assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4, "c": 4}

    def test_only_the_second_run_of_a_turn_is_timed(self):
        clock, cost_ms = Clock(), iter([900, 7] * 4)  # the first run of a turn is cold

        def work(_: object) -> None:
            clock.now_ns += next(cost_ms) * 1_000_000

        assert time_in_turns({"a": [work]}, None, runs=3, warmup=1, clock_ns=clock) == {"a": [(7.0,)] * 3}

    def test_each_is_charged_for_its_own_work(self):
        clock = Clock()
        contenders = {"slow": [clock.work(5)], "quick": [clock.work(2)]}
        times = time_in_turns(contenders, None, runs=3, warmup=1, after_round=lambda: clock.work(50)(0), clock_ns=clock)
        assert times == {"slow": [(5.0,)] * 3, "quick": [(2.0,)] * 3}


class TestStages:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, 10**8), min_size=3, max_size=3))
    def test_they_add_up_to_the_whole(self, parts_ns):
        """No look at the clock lies between stages, so nothing is lost or counted twice."""
        clock = Clock()
        parts = [clock.work(part / 1e6) for part in parts_ns]

        def whole(value: object) -> object:
            for part in parts:
                value = part(value)
            return value

        apart = time_in_turns({"a": parts}, None, runs=2, warmup=0, clock_ns=clock)["a"]
        together = time_in_turns({"a": [whole]}, None, runs=2, warmup=0, clock_ns=clock)["a"]
        assert apart == [tuple(part / 1e6 for part in parts_ns)] * 2
        found = ImageToBoxes(*map(tuple, zip(*apart, strict=True))).latencies_ms
        assert found == pytest.approx([one for (one,) in together], abs=1e-6)  # a nanosecond

    def test_each_takes_what_the_one_before_returned(self):
        seen: list[object] = []
        contenders = {"a": [lambda value: value + 1, lambda value: value * 10, seen.append]}
        time_in_turns(contenders, 4, runs=1, warmup=0)
        assert seen == [50, 50]
