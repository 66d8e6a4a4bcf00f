"""A benchmark as rows of words, for whatever draws the table: rich where it is installed, a plain one on a device."""

from __future__ import annotations

from dataclasses import dataclass

from yolo_prune.device.benchmark_record import BenchmarkEntry, BenchmarkReport
from yolo_prune.device.timings import LatencySummary

_MB = 1e6


@dataclass(frozen=True)
class Rows:
    """A table before it is drawn.

    Attributes:
        title: What it shows.
        columns: Headings.
        cells: Rows of one cell a column.
    """

    title: str
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


def heading(report: BenchmarkReport) -> str:
    """Return what all figures of a report have in common, and then every warning, a line each."""
    batch = f", batch {report.batch}" if report.batch > 1 else ""
    lines = [f"{report.imgsz_px} px{batch}, {report.threads} threads, {report.runs} interleaved runs"]
    lines += [f"warning: {found}" for found in (report.conditions.warnings() if report.conditions else [])]
    return "\n".join(lines) + "\n"


def forward_rows(report: BenchmarkReport) -> Rows:
    """Return the forward passes, with size and memory; speed-ups are against the first artefact of the same backend."""
    cells = [
        (
            entry.name, entry.backend, *_spread(entry.summary), _speed_up(report, entry),
            *([f"{1000 * report.batch / entry.summary.median_ms:.1f}"] if report.batch > 1 else []),
            _megabytes(entry.size_bytes), _megabytes(entry.memory.artefact_bytes if entry.memory else None),
        )
        for entry in report.entries
    ]  # fmt: skip
    rate = ("images/s",) if report.batch > 1 else ()
    return Rows(
        title="forward",
        columns=("artefact", "backend", *_SPREAD, "speed-up", *rate, "MB on disk", "MB in memory"),
        cells=tuple(cells),
    )


def to_boxes_rows(report: BenchmarkReport) -> Rows | None:
    """Return the whole way from image to boxes; None where it was not timed."""
    timed = [(entry, entry.image_to_boxes) for entry in report.entries if entry.image_to_boxes is not None]
    cells = []
    for entry, whole in timed:
        summary = whole.summary
        parts = [f"{summary[stage].median_ms:.2f}" for stage in ("pre", "forward", "post")]
        cells.append(
            (entry.name, entry.backend, *_spread(summary["total"]), *parts, _speed_up(report, entry, to_boxes=True))
        )
    columns = ("artefact", "backend", *_SPREAD, "letterbox", "forward", "suppression", "speed-up")
    return Rows(title="image to boxes", columns=columns, cells=tuple(cells)) if timed else None


_SPREAD = ("median ms", "p25..p75", "p5..p95")


def _spread(summary: LatencySummary) -> list[str]:
    """Return median, interquartile interval and spread."""
    return [
        f"{summary.median_ms:.2f}",
        f"{summary.p25_ms:.2f}..{summary.p75_ms:.2f}",
        f"{summary.p5_ms:.2f}..{summary.p95_ms:.2f}",
    ]


def _speed_up(report: BenchmarkReport, entry: BenchmarkEntry, *, to_boxes: bool = False) -> str:
    """Return the speed-up of an entry in words."""
    baseline = next(other.name for other in report.entries if other.backend == entry.backend)
    if entry.name == baseline:
        return "1 (baseline)"
    return report.speed_up(entry.name, baseline, to_boxes=to_boxes).in_words()


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / _MB:.1f}"
