"""`benchmark`: artefacts timed beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_prune.configuration import json_setting, setting
from yolo_prune.device.benchmark import benchmark
from yolo_prune.device.benchmark_record import BenchmarkReport
from yolo_prune.device.benchmark_rows import forward_rows, heading, to_boxes_rows
from yolo_prune.device.image_to_boxes import drawn_image
from yolo_prune.device.runtimes import split_variant
from yolo_prune.device.sources import read_image
from yolo_prune.errors import ConfigError
from yolo_prune.export.runtimes import runtime_for
from yolo_prune.report import render

THREADS: dict[str, Any] = {"default": 2, "help": "threads of each runtime"}
RUNS: dict[str, Any] = {"default": 100, "help": "timed runs of each artefact, interleaved"}
"""Settings that `benchmark` and `run` share."""


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Settings of `benchmark`."""

    models: list[str] = setting(
        help="artefacts, comma-separated in brackets: [dense.onnx,slim.onnx]; .pt, .onnx, .engine, NCNN or OpenVINO "
        "folder. @ says how one runs: .onnx@cuda, @tensorrt or @tensorrt_rtx; NCNN @vulkan; OpenVINO @gpu or @npu; "
        ".pt@ with any of cuda+half+channels_last+compile"
    )
    imgsz: int = setting(640, help="image side", unit="px")
    batch: int = setting(1, help="images in a call", unit="images")
    threads: int = setting(**THREADS)
    runs: int = setting(**RUNS)
    warmup: int = setting(10, help="untimed runs of each artefact before")
    boxes: bool = setting(True, help="also time the whole way from an image to boxes: letterbox, forward, suppression")
    image: str | None = setting(
        None, help="image for the whole way; default: a drawn one, though suppression depends on what is found"
    )
    memory: bool = setting(True, help="also measure peak memory, in a process for each artefact")
    json: str | None = json_setting("every timing")


@dataclass(frozen=True, kw_only=True)
class BenchmarkTable:
    """A benchmark that can be shown: speed-ups are against the first artefact of the same backend."""

    report: BenchmarkReport

    def to_json(self) -> dict[str, Any]:
        """Return every timing as plain values."""
        return self.report.to_json()

    def table(self) -> str:
        """Return one row per artefact: forward passes, then the whole way."""
        text = heading(self.report)
        for rows in (forward_rows(self.report), to_boxes_rows(self.report)):
            if rows is not None:
                text += f"\n{rows.title}\n" + render(rows.columns, rows.cells, words=("backend",))
        return text


def benchmark_artefacts(config: BenchmarkConfig) -> BenchmarkTable:
    """Time artefacts in turns.

    Raises:
        YoloPruneError: A missing artefact, one that no runtime reads, or a runtime, a provider or a GPU that is not
            here.
    """
    artefacts = _artefacts(config.models)
    if config.image and not config.boxes:
        raise ConfigError("image= together with boxes=false", expected="an image only where it is used")
    report = benchmark(
        {name: path for name, (path, _) in artefacts.items()},
        variants={name: variant for name, (_, variant) in artefacts.items()},
        imgsz_px=config.imgsz,
        batch=config.batch,
        threads=config.threads,
        runs=config.runs,
        warmup=config.warmup,
        image=_image(config.image) if config.boxes else None,
        memory=config.memory,
        runtime_for=runtime_for,
    )
    return BenchmarkTable(report=report)


def _artefacts(models: Sequence[str]) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Name artefacts and their variants as given; the same one twice is refused."""
    if len(set(models)) != len(models) or not models:
        raise ConfigError(f"models={list(models)}", expected="at least one artefact, each once")
    return {model: split_variant(model) for model in models}


def _image(path: str | None) -> NDArray[np.uint8]:
    """Read the image for the whole way, or draw one."""
    return drawn_image() if path is None else read_image(Path(path))
