"""What `bench_engine.py` measured, as tables: how the engine grows with the model, and how its peer does."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from measured_job import Outcome
from source import engine_hash

from yolo_prune.report import render

OURS = "yolo_prune"
AS_IT_IS = "as it is"
SPLIT = "C2f split"
"""Sides of a measurement: the engine, and Torch-Pruning on the model as the host builds it or with C2f split."""

STEPS = ("trace_s", "plan_s", "apply_s", "seconds", "verify_s", "first_use_s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """Outcomes of every process.

    Attributes:
        machine: What they were measured on; see `device.machine.Machine`.
        threads: Threads of torch.
        models: By model and side, one outcome a turn; see `measured_job.Outcome`.
        engine: Hash of the engine's code; empty in records of earlier ones.
    """

    machine: dict[str, Any]
    threads: int
    models: dict[str, dict[str, list[Outcome]]]
    engine: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return dataclasses.asdict(self)

    def table(self, *, markdown: bool = False) -> str:
        """Return the table of the engine alone, that of the comparison, and what both leave open."""
        parts = [growth_table(self.models, markdown=markdown), peer_table(self.models, markdown=markdown)]
        notes = (growth_notes, failure_notes, first_use_notes)
        lines = [line for note in notes for line in note(self.models)] + [self._conditions()]
        return "\n".join([part for part in parts if part] + lines) + "\n"

    def _conditions(self) -> str:
        turns = max(len(runs) for sides in self.models.values() for runs in sides.values())
        versions = ", ".join(f"{name} {version}" for name, version in self.machine["runtimes"].items())
        return (
            f"Interleaved runs, medians of {turns}; torch threads: {self.threads}; {self.machine['cpu']}; {versions}"
            f"{'.' if self.engine == engine_hash() else '; an earlier version of the engine.'}"
        )


def failure(runs: Sequence[Outcome]) -> Outcome | None:
    """Return the first outcome that is a failure."""
    return next((run for run in runs if "failure" in run), None)


def median(runs: Sequence[Outcome], key: str) -> float:
    """Return the median of a figure."""
    return float(statistics.median(run[key] for run in runs))


def ratios(ours: Sequence[Outcome], theirs: Sequence[Outcome], key: str) -> list[float]:
    """Return ours / theirs of every turn: what slows a turn down slows both."""
    return [one[key] / other[key] for one, other in zip(ours, theirs, strict=False) if other[key]]


def in_words(values: Sequence[float]) -> str:
    """Return ratios as `median (lowest..highest)`."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}..{max(values):.3f})" if values else "-"


def growth_table(models: dict[str, dict[str, list[Outcome]]], *, markdown: bool) -> str:
    """Return the engine's steps, one row a model, and its time for a million parameters."""
    heads = ["model", "M params", "trace s", "plan s", "apply s", "engine s", "verify s", "first use s"]
    rows = []
    for name, sides in models.items():
        failed, runs = failure(sides[OURS]), sides[OURS]
        if failed:
            rows.append([name, "-", *["-"] * 3, failed["failure"], *["-"] * 5])
            continue
        millions = median(runs, "params") / 1e6
        rows.append(
            [
                name,
                f"{millions:.1f}",
                *(f"{median(runs, step):.2f}" for step in STEPS),
                f"{1e3 * median(runs, 'seconds') / millions:.0f}",
                f"{median(runs, 'above_mb'):.0f}",
                f"{median(runs, 'peak_mb') / 1e3:.2f}",
            ]
        )
    return render([*heads, "ms / M params", "MB more", "peak GB"], rows, markdown=markdown)


def peer_table(models: dict[str, dict[str, list[Outcome]]], *, markdown: bool) -> str:
    """Return ours beside theirs, one row a model and way of Torch-Pruning; empty where it did not take part."""
    rows = [
        [f"{name}, {side}", *_compared(sides[OURS], sides[side])]
        for name, sides in models.items()
        for side in sides
        if side != OURS
    ]
    heads = ["Torch-Pruning on", "ours s", "theirs s", "ratio", "ours MB more", "theirs MB more", "ratio"]
    heads += ["ours peak GB", "theirs peak GB", "ratio", "MACs kept"]
    return render(heads, rows, markdown=markdown) if rows else ""


def _compared(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> list[str]:
    """Return the cells of a comparison; a side that failed says so in place of its time."""
    failures = [failure(runs) for runs in (ours, theirs)]
    seconds, above, peak, kept = (
        [
            "-" if failed else shown.format(factor * median(runs, key))
            for runs, failed in zip((ours, theirs), failures, strict=True)
        ]
        for key, factor, shown in (
            ("seconds", 1, "{:.2f}"),
            ("above_mb", 1, "{:.0f}"),
            ("peak_mb", 1e-3, "{:.2f}"),
            ("macs_kept", 100, "{:.0f}%"),
        )
    )
    seconds = [failed["failure"] if failed else cell for cell, failed in zip(seconds, failures, strict=True)]
    time, memory, whole = (
        "-" if any(failures) else in_words(ratios(ours, theirs, key)) for key in ("seconds", "above_mb", "peak_mb")
    )
    return [*seconds, time, *above, memory, *peak, whole, " / ".join(kept)]


def growth_notes(models: dict[str, dict[str, list[Outcome]]]) -> list[str]:
    """Say how time and parameters grow from the first to the last scale of each family (names but for a letter)."""
    measured = {name: sides[OURS] for name, sides in models.items() if not failure(sides[OURS])}
    notes = []
    for _, family in groupby(measured, key=lambda name: name[:-1]):
        first, *larger = family
        if larger:
            last = larger[-1]
            size, time = (median(measured[last], key) / median(measured[first], key) for key in ("params", "seconds"))
            notes.append(f"{first} to {last}: {size:.1f} times the parameters, {time:.1f} times the time.")
    return notes


def failure_notes(models: dict[str, dict[str, list[Outcome]]]) -> list[str]:
    """Say in full what failed."""
    failed = [
        (name, side, bad)
        for name, sides in models.items()
        for side, runs in sides.items()
        if (bad := failure(runs)) is not None
    ]
    return [f"{name}, {side}: {bad['failure']} ({bad['detail']})." for name, side, bad in failed]


def first_use_notes(models: dict[str, dict[str, list[Outcome]]]) -> list[str]:
    """Say what the first use costs in a process, ours and theirs, which no other figure of the comparison holds."""
    runs: dict[bool, list[Outcome]] = {True: [], False: []}
    for sides in models.values():
        for side, outcomes in sides.items():
            runs[side == OURS] += [outcome for outcome in outcomes if "failure" not in outcome]
    if not all(runs.values()):
        return []
    ours, theirs = (median(runs[own], "first_use_s") for own in (True, False))
    return [f"First use, once a process and in none of the times above: ours {ours:.2f} s, theirs {theirs:.2f} s."]
