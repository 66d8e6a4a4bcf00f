"""`benchmark`: artefacts timed beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolo_prune.configuration import json_setting, setting
from yolo_prune.device.benchmark import BenchmarkReport, benchmark
from yolo_prune.errors import ConfigError
from yolo_prune.export.runtimes import runtime_for
from yolo_prune.report import render
from yolo_prune.report.summary import in_words

THREADS: dict[str, Any] = {"default": 2, "help": "threads of each runtime"}
RUNS: dict[str, Any] = {"default": 100, "help": "timed runs of each artefact, interleaved"}
"""Settings that `benchmark` and `run` share."""


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of `benchmark`."""

    models: list[str] = setting(
        help="artefacts, comma-separated in brackets: [dense.onnx,slim.onnx]; .pt, .onnx, NCNN or OpenVINO folder"
    )
    imgsz: int = setting(640, help="image side", unit="px")
    threads: int = setting(**THREADS)
    runs: int = setting(**RUNS)
    warmup: int = setting(10, help="untimed runs of each artefact before")
    json: str | None = json_setting("every timing")


@dataclass(frozen=True, kw_only=True)
class BenchmarkTable:
    """A benchmark that can be shown: speed-ups are against the first artefact of the same backend."""

    report: BenchmarkReport

    def to_json(self) -> dict[str, Any]:
        """Return every timing as plain values."""
        return self.report.to_json()

    def table(self) -> str:
        """Return one row per artefact."""
        rows = []
        first: dict[str, str] = {}
        for entry in self.report.entries:
            summary = entry.summary
            baseline = first.setdefault(entry.backend, entry.name)
            rows.append(
                [entry.name, entry.backend, f"{summary.median_ms:.2f}", f"{summary.p5_ms:.2f}..{summary.p95_ms:.2f}",
                 _speed_up(self.report, entry.name, baseline)]
            )  # fmt: skip
        heading = f"{self.report.imgsz_px} px, {self.report.threads} threads, {self.report.runs} interleaved runs\n"
        return heading + render(["artefact", "backend", "median ms", "p5..p95 ms", "speed-up"], rows)


def _speed_up(report: BenchmarkReport, name: str, baseline: str) -> str:
    """Return the speed-up of an entry in words."""
    return "1 (baseline)" if name == baseline else in_words(asdict(report.speed_up(name, baseline)))


def benchmark_artefacts(config: BenchmarkConfig) -> BenchmarkTable:
    """Time artefacts in turns.

    Raises:
        YoloPruneError: A missing artefact, or one that no runtime reads.
    """
    names = _names(config.models)
    report = benchmark(
        names,
        imgsz_px=config.imgsz,
        threads=config.threads,
        runs=config.runs,
        warmup=config.warmup,
        runtime_for=runtime_for,
    )
    return BenchmarkTable(report=report)


def _names(models: Sequence[str]) -> dict[str, Path]:
    """Name artefacts by their path as given; the same one twice is refused."""
    if len(set(models)) != len(models) or not models:
        raise ConfigError(f"models={list(models)}", expected="at least one artefact, each once")
    return {model: Path(model) for model in models}
