"""Dense beside slim on a GPU, through every way there is to run them: one command, one JSON with the GPU's name.

python tools/bench_gpu.py models=[dense.pt,slim.pt] onnx=[dense.onnx,slim.onnx] json=gpu.json

`onnx` are the exports of `models`; half=true when they were exported suits a GPU. Each way is a process of its own, in
which the two take turns: a library that crashes or is not there costs only its own row, which says why. Rows on the CPU
are run too. Speeds are compared within a row, never between rows.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, setting
from yolo_prune.device.benchmark_record import BenchmarkReport
from yolo_prune.errors import ConfigError
from yolo_prune.report import render

ONNX, CHECKPOINT = "onnx", "pt"
WAYS = [
    "onnx", "onnx@tensorrt_rtx", "onnx@tensorrt", "onnx@cuda",
    "pt", "pt@cuda", "pt@cuda+half", "pt@cuda+half+channels_last", "pt@cuda+half+compile",
    "pt@cuda+half+channels_last+compile",
]  # fmt: skip
"""Kind of artefact and variant, as `yolo-prune benchmark` has them."""


@dataclasses.dataclass(kw_only=True)
class GpuConfig:
    """Settings of the benchmark."""

    models: list[str] = setting(help="checkpoints, the dense one first: [dense.pt,slim.pt]")
    onnx: list[str] = setting(help="their ONNX files in the same order")
    ways: list[str] = setting(WAYS, help="onnx or pt, with the variant behind an @")
    imgsz: int = setting(640, help="image side", unit="px")
    batch: int = setting(1, help="images in a call", unit="images")
    threads: int = setting(2, help="CPU threads of each runtime")
    runs: int = setting(100, help="timed runs of each model, interleaved")
    warmup: int = setting(10, help="untimed runs of each before")
    limit_s: float = setting(600.0, help="longest that a way may take", unit="s")
    json: str | None = json_setting("every timing, and why a way could not run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run the models.

    Attributes:
        way: Of `WAYS`.
        report: What was measured; None where it could not run.
        refused: Why it could not.
    """

    way: str
    report: BenchmarkReport | None = None
    refused: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"way": self.way, "refused": self.refused, "report": self.report.to_json() if self.report else None}

    def cells(self) -> list[str]:
        """Return its cells of the table."""
        if self.report is None:
            return [self.way, "-", "-", str(self.refused).partition("\n")[0]]
        dense, slim = self.report.entries
        times = [
            f"{one.summary.median_ms:.2f} ({one.summary.p25_ms:.2f}..{one.summary.p75_ms:.2f})" for one in (dense, slim)
        ]
        return [self.way, *times, self.report.speed_up(slim.name, dense.name).in_words()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuFigures:
    """All ways."""

    gpus: list[str]
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {"gpus": self.gpus, "rows": [row.to_json() for row in self.rows]}

    def table(self) -> str:
        """Return one row a way."""
        head = ["way", "dense ms (p25..p75)", "slim ms (p25..p75)", "speed-up"]
        gpus = ", ".join(self.gpus) or "no GPU"
        return f"{gpus}\n" + render(head, [row.cells() for row in self.rows], words=("speed-up",))


def bench(config: GpuConfig) -> GpuFigures:
    """Run every way.

    Raises:
        ConfigError: There are not two models and two ONNX files, or a way is of neither.
    """
    for name, files in (("models", config.models), ("onnx", config.onnx)):
        if len(files) != 2:
            raise ConfigError(f"{name}={files}", expected="two: the dense one, then the slim one")
        for file in files:
            if not Path(file).is_file():
                raise ConfigError(f"'{file}' of {name}= does not exist", expected="a file")
    for way in config.ways:
        if way.partition("@")[0] not in (ONNX, CHECKPOINT):
            raise ConfigError(f"way '{way}'", expected=f"{ONNX} or {CHECKPOINT}, with a variant or without")
    rows = []
    for way in config.ways:
        rows.append(run(config, way))
        print(" | ".join(rows[-1].cells()), file=sys.stderr, flush=True)
    return GpuFigures(gpus=gpu_names(), rows=rows)


def run(config: GpuConfig, way: str) -> Row:
    """Run one way in a process of its own."""
    kind, at, variant = way.partition("@")
    models = [f"{file}{at}{variant}" for file in (config.onnx if kind == ONNX else config.models)]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "benchmark.json")
        words = [f"models=[{','.join(models)}]", f"json={record}", "memory=false", "boxes=false"]
        words += [f"{key}={getattr(config, key)}" for key in ("imgsz", "batch", "threads", "runs", "warmup")]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "yolo_prune", "benchmark", *words],
                capture_output=True, encoding="utf-8", errors="replace", timeout=config.limit_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Row(way=way, refused=f"not done after {config.limit_s:g} s")
        if done.returncode != 0:
            return Row(way=way, refused=_reason(done))
        return Row(way=way, report=BenchmarkReport.from_json(json.loads(record.read_text(encoding="utf-8"))))


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a process that failed said: our error with its remedy, or else its last line."""
    _, error, text = done.stderr.rpartition("error: ")
    if error and done.returncode in (1, 2) and "Traceback" not in done.stderr:
        return text.strip()
    lines = done.stderr.strip().splitlines()
    return f"exit code {done.returncode}: {lines[-1] if lines else 'nothing was said'}"


def gpu_names() -> list[str]:
    """Return the names of the GPUs that PyTorch sees."""
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


if __name__ == "__main__":
    sys.exit(script((__doc__ or "").partition("\n")[0], GpuConfig, lambda config: execute(bench, config)))
