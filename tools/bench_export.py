"""Does every artefact say what PyTorch says? Raw outputs, boxes and mAP of models x formats x precisions.

python tools/bench_export.py models=[dense.pt,slim.pt] data=coco/data.yaml imgsz=320 \
    formats=[onnx,ncnn,openvino] precisions=[fp32,fp16,int8]

A cell is one artefact: exported, compared, evaluated on the whole split, and thrown away. Each is a line of the record,
which is only ever appended to: a table can be finished piece by piece, on several machines.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from cells import data_name, run_missing

from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.device.benchmark import size_on_disk
from yolo_prune.device.machine import describe_machine
from yolo_prune.device.runtimes import RUNTIMES
from yolo_prune.device.runtimes.base import PRECISIONS, Precision
from yolo_prune.errors import YoloPruneError
from yolo_prune.export.provenance import read_provenance
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import Evaluation, evaluate, require_split
from yolo_prune.pipeline.artefacts import (
    FORMAT_OF,
    Exported,
    Variant,
    calibration_inputs,
    export_proved,
    sample_images,
)
from yolo_prune.report import quantity, render

RECORD = Path(__file__).resolve().parent / "records" / "export.jsonl"


@dataclasses.dataclass(kw_only=True)
class ExportBenchConfig:
    """Settings of the benchmark."""

    models: list[str] = setting(help="checkpoints, in the order of the table")
    data: str = setting(help="data yaml that they were trained on")
    split: str = setting("val", help="split on which mAP is measured")
    formats: list[str] = setting(["onnx", "ncnn", "openvino"], help=f"of: {', '.join(FORMAT_OF.values())}")
    precisions: list[str] = setting(["fp32", "fp16", "int8"], help=f"of: {', '.join(PRECISIONS)}")
    imgsz: int = setting(320, help="image side", unit="px")
    images: int = setting(16, help="images whose raw outputs and boxes are compared", unit="images")
    calibration: int = setting(64, help="images that 8 bit is calibrated with, at most", unit="images")
    record: str = setting(str(RECORD), help="record that finished cells are appended to")
    json: str | None = json_setting("the cells of the record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One artefact; `sha256` is the start of the checkpoint's."""

    model: str
    sha256: str
    data: str
    split: str
    imgsz_px: int
    format: str
    precision: str
    images: int
    calibration: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFigures:
    """The cells of a record."""

    records: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {"cells": self.records}

    def table(self, *, markdown: bool = False) -> str:
        """Return one row a cell: what is above its limit makes an artefact disagree."""
        head = [
            "model",
            "MACs",
            "format",
            "precision",
            "MB",
            "raw outputs",
            "same boxes",
            "mAP50-95",
            "PyTorch",
            "loss",
        ]
        table = render([*head, "agrees"], [_row(record) for record in self.records], markdown=markdown)
        return table + ("\n" if markdown else "") + self.summary()

    def summary(self) -> str:
        """Return in a line how many agree, and the largest change of mAP50-95 at each precision."""
        changes: dict[str, list[float]] = {}
        for record in self.records:
            if record["accuracy"]:
                both = record["accuracy"]["artefact"] - record["accuracy"]["pytorch"]
                changes.setdefault(record["cell"]["precision"], []).append(both)
        told = "; ".join(f"{name} {min(found):+.4f} to {max(found):+.4f}" for name, found in changes.items())
        agreeing = sum(not record["error"] for record in self.records)
        return (
            f"{agreeing} of {len(self.records)} artefacts agree. mAP50-95 beside PyTorch's: {told or 'not measured'}.\n"
        )


def _row(record: dict[str, Any]) -> list[str]:
    cell, parity, accuracy = record["cell"], record["parity"], record["accuracy"]
    boxes = parity and parity["boxes"]
    pairs = boxes and [(boxes["found"], boxes["expected"]), (boxes["backed"], boxes["answered"])]
    return [
        f"{cell['model']}, {cell['data']} {cell['imgsz_px']} px", quantity(record["macs"]), cell["format"],
        cell["precision"], f"{record['bytes'] / 1e6:.1f}", f"{parity['max_rel']:.0e}" if parity else "-",
        " and ".join(f"{part}/{whole}" for part, whole in pairs) if pairs else "-",
        *(f"{accuracy[side]:.4f}" if accuracy else "-" for side in ("artefact", "pytorch")),
        f"{max(accuracy['losses'].values()):+.4f}" if accuracy else "-",
        "NO" if record["error"] else "yes",
    ]  # fmt: skip


def bench(config: ExportBenchConfig) -> ExportFigures:
    """Run every cell that the record lacks.

    Raises:
        YoloPruneError: Settings, data or checkpoints that cannot be, or work that failed.
    """
    for key, values, known in (
        ("format", config.formats, FORMAT_OF.values()),
        ("precision", config.precisions, PRECISIONS),
    ):
        for value in values:
            require_choice(key, value, known)
    for split in ("train", config.split):
        require_split(Path(config.data), split)
    models = {read_checkpoint(Path(model)).sha256[:12]: Path(model) for model in config.models}
    cells = [
        Cell(
            model=path.stem, sha256=digest, data=data_name(config.data), split=config.split,
            imgsz_px=config.imgsz, format=name, precision=precision, images=config.images,
            calibration=config.calibration if precision == "int8" else 0,
        )
        for digest, path in models.items()
        for precision in config.precisions
        for name in config.formats
    ]  # fmt: skip
    cells = require_any(cells)
    work = Laboratory(Path(config.data), models).run
    return ExportFigures(records=run_missing(Path(config.record), cells, work))


def require_any(cells: list[Cell]) -> list[Cell]:
    """Return the cells that can be run on this machine, and say what the others lack.

    Raises:
        YoloPruneError: There is none.
    """
    possible: list[Cell] = []
    lacking: dict[str, YoloPruneError] = {}
    for cell in cells:
        try:
            _variant(cell).require_possible()
            possible.append(cell)
        except YoloPruneError as error:
            lacking[f"{cell.format} {cell.precision}"] = error
    if not possible:
        raise next(iter(lacking.values()))
    for name, reason in lacking.items():
        print(f"left out: {name}: {reason.found}", file=sys.stderr, flush=True)
    return possible


def _variant(cell: Cell) -> Variant:
    return Variant(format=cell.format, precision=cast(Precision, cell.precision), imgsz_px=cell.imgsz_px)


class Laboratory:
    """Runs cells; a checkpoint is evaluated once.

    Args:
        data: Data yaml.
        models: Checkpoints by the start of their SHA-256.
    """

    def __init__(self, data: Path, models: dict[str, Path]) -> None:
        self.data, self.models = data, models
        self._reference = functools.cache(self._evaluate)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Return the line of the record."""
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = self._export(cell, Path(folder))
            told = read_provenance(found.path)
            size = size_on_disk(found.path)
        parity = found.parity and found.parity.to_json()
        backend = next(name for name, format_name in FORMAT_OF.items() if format_name == cell.format)
        return {
            "cell": dataclasses.asdict(cell),
            "macs": told.macs,
            "params": told.params,
            "bytes": size,
            "parity": parity,
            "accuracy": found.accuracy and found.accuracy.to_json(),
            "error": found.error and found.error.found,
            "seconds": round(time.perf_counter() - started),
            "machine": dataclasses.asdict(describe_machine({backend: RUNTIMES[backend].version()})),
        }

    def _export(self, cell: Cell, folder: Path) -> Exported:
        calibrated = cell.precision == "int8"
        return export_proved(
            read_checkpoint(self.models[cell.sha256]),
            folder,
            _variant(cell),
            images=sample_images(self.data, cell.split, cell.images),
            calibration=calibration_inputs(self.data, cell.calibration, cell.imgsz_px) if calibrated else (),
            data=self.data,
            reference=self._reference(cell.sha256, cell.split, cell.imgsz_px),
            threads=2,
        )

    def _evaluate(self, digest: str, split: str, imgsz_px: int) -> Evaluation:
        return evaluate(self.models[digest], data=self.data, split=split, imgsz_px=imgsz_px, square=True)


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    sys.exit(script(summary, ExportBenchConfig, lambda config: execute(bench, config)))
