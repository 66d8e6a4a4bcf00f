"""How fast artefacts are: timed in turns on the same machine, so that they share its weather.

A single mean hides who had the bad minute. Here every round times every artefact once, ratios are taken within rounds,
and "faster" is said only when the interquartile intervals are apart.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_prune.device.images import synthetic_images, to_input
from yolo_prune.device.machine import Machine, describe_machine
from yolo_prune.device.runtimes import Array, Runtime, runtime_for
from yolo_prune.errors import ConfigError


@dataclass(frozen=True)
class LatencySummary:
    """Order statistics of latencies in milliseconds; p5 to p95 is the spread."""

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
class BenchmarkEntry:
    """The latencies of one artefact.

    Attributes:
        name: The caller's name for it.
        backend: Name of the runtime.
        latencies_ms: One latency a round, in order.
    """

    name: str
    backend: str
    latencies_ms: tuple[float, ...]

    @property
    def summary(self) -> LatencySummary:
        """Order statistics of the latencies."""
        return LatencySummary.of(self.latencies_ms)


@dataclass(frozen=True)
class SpeedUp:
    """An entry against a baseline on the same backend.

    Attributes:
        name: The entry.
        baseline: What it is compared with.
        ratio: Median over rounds of (baseline's latency / entry's latency); above 1 the entry takes less time.
        p25: Lower quartile of these ratios.
        p75: Upper quartile of these ratios.
        faster: The entry's upper quartile lies below the baseline's lower quartile. The only licence for the word.
    """

    name: str
    baseline: str
    ratio: float
    p25: float
    p75: float
    faster: bool

    @classmethod
    def between(cls, entry: BenchmarkEntry, baseline: BenchmarkEntry) -> SpeedUp:
        """Compare two entries of the same rounds."""
        ratios = np.asarray(baseline.latencies_ms) / np.asarray(entry.latencies_ms)
        p25, ratio, p75 = (float(value) for value in np.percentile(ratios, [25, 50, 75]))
        faster = entry.summary.p75_ms < baseline.summary.p25_ms
        return cls(name=entry.name, baseline=baseline.name, ratio=ratio, p25=p25, p75=p75, faster=faster)


@dataclass(frozen=True)
class BenchmarkReport:
    """The latencies of several artefacts, timed in turns.

    Attributes:
        imgsz_px: Side of the square input; batch 1.
        threads: CPU threads of every runtime.
        runs: Timed rounds.
        warmup: Untimed rounds before them.
        machine: What it was measured on.
        entries: One an artefact, in the caller's order.
    """

    imgsz_px: int
    threads: int
    runs: int
    warmup: int
    machine: Machine
    entries: tuple[BenchmarkEntry, ...]

    def entry(self, name: str) -> BenchmarkEntry:
        """Return the entry of that name, or raise `ConfigError`."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        known = ", ".join(f"'{entry.name}'" for entry in self.entries)
        raise ConfigError(f"no entry '{name}' in the benchmark", expected=f"one of {known}", remedy="correct the name")

    def speed_up(self, name: str, baseline: str) -> SpeedUp:
        """Compare an entry with a baseline.

        Raises:
            ConfigError: One of them is not in the report, or they ran on different backends, whose difference would be
                taken for the model's.
        """
        entry, reference = self.entry(name), self.entry(baseline)
        if entry.backend != reference.backend:
            raise ConfigError(
                f"'{name}' ran on {entry.backend}, '{baseline}' on {reference.backend}",
                expected="a baseline on the same backend",
                remedy="benchmark the baseline's artefact for that backend too",
            )
        return SpeedUp.between(entry, reference)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value; the summaries are included for readers."""
        entries = [{**asdict(entry), "summary": asdict(entry.summary)} for entry in self.entries]
        return {**asdict(self), "entries": entries}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BenchmarkReport:
        """Undo `to_json`."""
        entries = tuple(
            BenchmarkEntry(name=item["name"], backend=item["backend"], latencies_ms=tuple(item["latencies_ms"]))
            for item in value["entries"]
        )
        return cls(**{**value, "machine": Machine(**value["machine"]), "entries": entries})


def benchmark(
    artefacts: Mapping[str, Path],
    *,
    imgsz_px: int,
    threads: int,
    runs: int = 100,
    warmup: int = 10,
    runtime_for: Callable[[Path], Runtime] = runtime_for,
) -> BenchmarkReport:
    """Time artefacts in turns: forward passes of one image, raw outputs, neither pre- nor post-processing.

    Args:
        artefacts: What `runtime_for` accepts, by the name that the report shall use.
        imgsz_px: Side of the square input that all of them were exported for.
        threads: CPU threads of every runtime; torch's own count is restored afterwards.
        runs: Timed rounds.
        warmup: Untimed rounds before them.
        runtime_for: Chooses what runs an artefact.

    Raises:
        ConfigError: A number is out of range, or an artefact is missing, damaged, or made for another input size.
        MissingDependencyError: A runtime is not installed.
    """
    if not artefacts:
        raise ConfigError("no artefacts", expected="at least one")
    require_measurable(threads=threads, runs=runs, warmup=warmup)
    image = to_input(synthetic_images(1, imgsz_px)[0], imgsz_px)
    runtimes = {name: runtime_for(path) for name, path in artefacts.items()}
    with contextlib.ExitStack() as stack:
        sessions = {
            name: stack.enter_context(runtime.load(artefacts[name], imgsz_px=imgsz_px, threads=threads))
            for name, runtime in runtimes.items()
        }
        latencies_ms = time_in_turns(sessions, image, runs=runs, warmup=warmup)
    return BenchmarkReport(
        imgsz_px=imgsz_px,
        threads=threads,
        runs=runs,
        warmup=warmup,
        machine=describe_machine({runtime.name: runtime.version() for runtime in runtimes.values()}),
        entries=tuple(
            BenchmarkEntry(name=name, backend=runtimes[name].name, latencies_ms=tuple(latencies_ms[name]))
            for name in artefacts
        ),
    )


PAUSE_S = 0.05
"""Longer than any runtime's threads were seen spinning for more work."""


def time_in_turns(
    sessions: Mapping[str, Callable[[Array], object]],
    image: Array,
    *,
    runs: int,
    warmup: int,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, list[float]]:
    """Time every session once a round.

    Each turn is a pause, an untimed run and then the timed one. The threads of a runtime keep spinning after their work
    and caches hold the previous model: timed cold on two cores, NCNN's median rose from 23 to 44 ms because of who ran
    before, and without the pause a third of its runs still did. A deployed model follows itself, as the timed run does.

    Args:
        sessions: Callables by name.
        image: What they are called with.
        runs: Timed rounds.
        warmup: Untimed rounds before them.
        clock_ns: Monotonic clock in nanoseconds.

    Returns:
        Latencies in milliseconds by name, one a round.
    """
    latencies_ms: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(-warmup, runs):
        for name in turn_order(tuple(sessions), turn):
            time.sleep(PAUSE_S)
            sessions[name](image)
            start_ns = clock_ns()
            sessions[name](image)
            elapsed_ms = (clock_ns() - start_ns) / 1e6
            if turn >= 0:
                latencies_ms[name].append(elapsed_ms)
    return latencies_ms


def turn_order(names: Sequence[str], turn: int) -> tuple[str, ...]:
    """Return the order of a round: rotated by one every second round and reversed in between.

    Over 2n rounds everyone stands twice at each place, and comes as often after its left neighbour as after its right.
    """
    shift = turn // 2 % len(names)
    rotated = (*names[shift:], *names[:shift])
    return rotated[::-1] if turn % 2 else rotated


def require_measurable(*, threads: int, runs: int, warmup: int = 0) -> None:
    """Refuse numbers that measure nothing.

    Raises:
        ConfigError: One of them is too small.
    """
    for name, value, least in (("threads", threads, 1), ("runs", runs, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ConfigError(f"{name}={value}", expected=f"at least {least}")
