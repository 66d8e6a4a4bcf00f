"""Latencies of several checkpoints as artefacts of one backend, in turns: a benchmark that others add to theirs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from yolo_prune.device.benchmark import benchmark

DENSE = "dense"
"""The runner that all others are compared with."""

Export: TypeAlias = Callable[[Path, Path, str], Path]
"""From a checkpoint, an empty folder and a backend to the artefact in the folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Race:
    """What is timed; a subclass says of which experiment.

    Attributes:
        backend: What runs the artefacts.
        imgsz_px: Side of the input.
        threads: Of the runtime.
        runners: Names of the checkpoints, the dense one among them.
    """

    backend: str
    imgsz_px: int
    threads: int
    runners: tuple[str, ...]


def race(one: Race, checkpoints: Mapping[str, Path], export: Export, *, runs: int) -> dict[str, Any]:
    """Export every runner and time them in turns; return the line of a record.

    Args:
        one: What is timed.
        checkpoints: The runners' checkpoints by name.
        export: Makes the artefacts.
        runs: Timed rounds.
    """
    artefacts = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in one.runners:
            folder = Path(scratch, name)
            folder.mkdir()
            artefacts[name] = export(checkpoints[name], folder, one.backend)
        report = benchmark(artefacts, imgsz_px=one.imgsz_px, threads=one.threads, runs=runs)
    compared = {name: report.speed_up(name, DENSE) for name in one.runners if name != DENSE}
    return {
        "cell": dataclasses.asdict(one),
        "runs": runs,
        "dense_ms": report.entry(DENSE).summary.median_ms,
        "speed_ups": {name: {"ratio": it.ratio, "p25": it.p25, "p75": it.p75} for name, it in compared.items()},
        "machine": dataclasses.asdict(report.machine),
    }


def record_of_races(record: Path) -> Path:
    """Return where the races of a benchmark stand: beside its record of cells."""
    return record.with_name(f"{record.stem}_latency.jsonl")


def speed_up_in_words(
    races: Iterable[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
    runner: str,
    backend: str,
    *,
    shared: Sequence[str],
) -> str:
    """Return how many times as fast as the dense model a runner is; `-` where it was not timed.

    Args:
        races: Lines of `race`; of two on the same cell, the later one counts.
        cells: The runner's, one a seed; the mean over them is told.
        runner: Its name in the races.
        backend: What ran it.
        shared: What a race and a cell have in common, beside the seed.
    """
    found = {}
    for one in races:
        for cell in cells:
            same = all(one["cell"][name] == cell[name] for name in (*shared, "seed"))
            if same and one["cell"]["backend"] == backend and runner in one["speed_ups"]:
                found[cell["seed"]] = one["speed_ups"][runner]["ratio"]
    return f"{np.mean(list(found.values())):.2f}x" if found else "-"
