"""Timing in turns: every round times every contender once, so that all of them share the machine's weather.

A single mean hides who had the bad minute. Here ratios are taken within rounds, and order statistics over them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np

PAUSE_S = 0.05
"""Longer than any runtime's threads were seen spinning for more work."""

LEAST_ROUNDS = 100
"""Fewer tell nothing about which of two is faster."""

Stage = Callable[[Any], Any]
"""A step of the work that is timed: takes what the step before it returned."""

Times = Dict[str, List[Tuple[float, ...]]]
"""Milliseconds by name: one tuple a round, of one time a stage."""


@dataclass(frozen=True)
class LatencySummary:
    """Order statistics of latencies in milliseconds; p5 to p95 is the spread, p25 to p75 the interquartile interval."""

    median_ms: float
    p5_ms: float
    p25_ms: float
    p75_ms: float
    p95_ms: float
    min_ms: float

    @classmethod
    def of(cls, latencies_ms: Sequence[float]) -> LatencySummary:
        """Summarise one latency a round."""
        low, p5, p25, median, p75, p95 = (float(value) for value in np.percentile(latencies_ms, [0, 5, 25, 50, 75, 95]))
        return cls(median_ms=median, p5_ms=p5, p25_ms=p25, p75_ms=p75, p95_ms=p95, min_ms=low)


@dataclass(frozen=True)
class SpeedUp:
    """A contender against a baseline.

    Attributes:
        name: The contender.
        baseline: What it is compared with.
        ratio: Median over rounds of (baseline's latency / contender's latency); above 1 it takes less time.
        p25: Lower quartile of these ratios.
        p75: Upper quartile of these ratios.
        faster: The contender's upper quartile lies below the baseline's lower quartile, in at least `LEAST_ROUNDS`
            rounds. The only licence for the word.
        rounds: How many there were; None in records that are older than this figure.
    """

    name: str
    baseline: str
    ratio: float
    p25: float
    p75: float
    faster: bool
    rounds: int | None = None

    @classmethod
    def between(
        cls, name: str, latencies_ms: Sequence[float], *, baseline: str, baseline_ms: Sequence[float]
    ) -> SpeedUp:
        """Compare latencies of the same rounds."""
        ratios = np.asarray(baseline_ms) / np.asarray(latencies_ms)
        p25, ratio, p75 = (float(value) for value in np.percentile(ratios, [25, 50, 75]))
        apart = LatencySummary.of(latencies_ms).p75_ms < LatencySummary.of(baseline_ms).p25_ms
        faster = apart and len(ratios) >= LEAST_ROUNDS
        return cls(name=name, baseline=baseline, ratio=ratio, p25=p25, p75=p75, faster=faster, rounds=len(ratios))

    def in_words(self) -> str:
        """Return the ratio with its quartiles and what may be said of it; "faster" only where the intervals part."""
        words = "faster" if self.faster else "not faster" if self.ratio < 1 else "not separable"
        if self.rounds is not None and self.rounds < LEAST_ROUNDS:
            words = f"too few rounds to tell: {self.rounds}"
        return f"{self.ratio:.2f}x ({self.p25:.2f}..{self.p75:.2f}), {words}"


def time_in_turns(
    contenders: Mapping[str, Sequence[Stage]],
    given: object,
    *,
    runs: int,
    warmup: int,
    after_round: Callable[[], object] = lambda: None,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> Times:
    """Time every contender once a round.

    Each turn is a pause, an untimed run and then the timed one. The threads of a runtime keep spinning after their work
    and caches hold the previous model: timed cold on two cores, NCNN's median rose from 23 to 44 ms because of who ran
    before, and without the pause a third of its runs still did. A deployed model follows itself, as the timed run does.

    Args:
        contenders: Stages by name; the first takes `given`, each other one what the one before it returned.
        given: What the work starts from.
        runs: Timed rounds.
        warmup: Untimed rounds before them.
        after_round: Called right after the last timed run of every timed round, while clocks are still up.
        clock_ns: Monotonic clock in nanoseconds.

    Returns:
        Times by name, one a round and stage. One look at the clock ends a stage and begins the next, so that the stages
        add up to the whole.
    """
    times: Times = {name: [] for name in contenders}
    for turn in range(-warmup, runs):
        for name in turn_order(tuple(contenders), turn):
            time.sleep(PAUSE_S)
            _time(contenders[name], given, clock_ns)
            stages_ms = _time(contenders[name], given, clock_ns)
            if turn >= 0:
                times[name].append(stages_ms)
        if turn >= 0:
            after_round()
    return times


def _time(stages: Sequence[Stage], value: Any, clock_ns: Callable[[], int]) -> tuple[float, ...]:
    """Run the stages once; return how long each took, in milliseconds."""
    moments_ns = [clock_ns()]
    for stage in stages:
        value = stage(value)
        moments_ns.append(clock_ns())
    return tuple((end - start) / 1e6 for start, end in zip(moments_ns, moments_ns[1:]))


def turn_order(names: Sequence[str], turn: int) -> tuple[str, ...]:
    """Return the order of a round: rotated by one every second round and reversed in between.

    Over 2n rounds everyone stands twice at each place, and comes as often after its left neighbour as after its right.
    """
    shift = turn // 2 % len(names)
    rotated = (*names[shift:], *names[:shift])
    return rotated[::-1] if turn % 2 else rotated
