"""What a share of the MACs is worth on each backend: slim artefacts timed beside the dense one, in turns.

python tools/bench_speedups.py models=[yolov8n.pt,yolov8s.pt] backends=[ncnn,openvino,onnxruntime] target_macs=0.5

A cell is a model on a backend. Its slim versions, one for each allocation and multiple of widths, have the same MACs
and share every round with the dense artefact, so that what differs between them is where the cut was made. Each cell is
a line, with every timing, of a record that is only ever appended to.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from cells import run_missing

from yolo_prune.allocation import PATHS
from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.device.benchmark import benchmark
from yolo_prune.files import sha256
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.pipeline.artefacts import FORMAT_OF, Variant, export_one
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.report import render

RECORD = Path(__file__).resolve().parent / "records" / "speedups.jsonl"

DENSE = "dense"


@dataclasses.dataclass(kw_only=True)
class SpeedupsConfig:
    """Settings of the benchmark."""

    models: list[str] = setting(help="dense checkpoints; a cell is known by the file's name")
    backends: list[str] = setting(["ncnn", "openvino", "onnxruntime"], help=f"of: {', '.join(FORMAT_OF)}")
    target_macs: float = setting(0.5, help="fraction of the MACs that is kept")
    allocations: list[str] = setting(["uniform", "global"], help=f"of: {', '.join(PATHS)}")
    multiples: list[int] = setting([8, 16], help="multiples that kept widths are rounded to", unit="channels")
    imgsz: int = setting(640, help="image side", unit="px")
    threads: int = setting(2, help="threads of the runtimes")
    runs: int = setting(100, help="timed rounds")
    record: str = setting(str(RECORD), help="record that finished cells are appended to")
    json: str | None = json_setting("the cells of the record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One experiment."""

    model: str
    model_sha256: str
    backend: str
    target_macs: float
    allocations: tuple[str, ...]
    multiples: tuple[int, ...]
    imgsz_px: int
    threads: int
    runs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedupFigures:
    """The cells of a record."""

    records: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {"cells": self.records}

    def table(self, *, markdown: bool = False) -> str:
        """Return one row for each way of cutting, and a column for each backend."""
        backends = list(dict.fromkeys(record["cell"]["backend"] for record in self.records))
        rows: dict[tuple[str, ...], dict[str, str]] = {}
        for record in self.records:
            cell = record["cell"]
            where = f"{cell['model']}, {cell['imgsz_px']} px, {cell['threads']} threads"
            for name, found in record["slim"].items():
                row = rows.setdefault((where, name, f"{found['macs']:.1%}", f"{1 / found['macs']:.2f}x"), {})
                row[cell["backend"]] = f"{found['ratio']:.2f}x ({found['p25']:.2f}..{found['p75']:.2f})"
        head = ["model", "allocation, multiple", "MACs", "their ratio", *backends]
        return render(head, [[*key, *(row.get(name, "-") for name in backends)] for key, row in rows.items()],
                      markdown=markdown)  # fmt: skip


def bench(config: SpeedupsConfig) -> SpeedupFigures:
    """Run every cell that the record lacks.

    Raises:
        YoloPruneError: Settings, data or checkpoints that cannot be, or work that failed.
    """
    for name, values, known in (("backends", config.backends, FORMAT_OF), ("allocations", config.allocations, PATHS)):
        for value in values:
            require_choice(name, value, known)
    paths = {Path(model).stem: Path(model) for model in config.models}
    for path in paths.values():
        read_checkpoint(path)
    cells = [
        Cell(
            model=name, model_sha256=sha256(path)[:12], backend=backend, target_macs=config.target_macs,
            allocations=tuple(config.allocations), multiples=tuple(config.multiples), imgsz_px=config.imgsz,
            threads=config.threads, runs=config.runs,
        )
        for name, path in paths.items()
        for backend in config.backends
    ]  # fmt: skip
    return SpeedupFigures(records=run_missing(Path(config.record), cells, lambda cell: timed(cell, paths)))


def timed(cell: Cell, paths: dict[str, Path]) -> dict[str, Any]:
    """Return the line of a cell."""
    with tempfile.TemporaryDirectory() as name:
        folder, variant = Path(name), Variant(format=FORMAT_OF[cell.backend], imgsz_px=cell.imgsz_px)
        artefacts = {DENSE: export_one(paths[cell.model], folder / DENSE, variant)}
        macs = {}
        for allocation in cell.allocations:
            for multiple in cell.multiples:
                label = f"{allocation}, {multiple}"
                slim = folder / f"{allocation}-{multiple}.pt"
                pruned = prune(
                    PruneConfig(
                        model=str(paths[cell.model]), out=str(slim), target_macs=cell.target_macs,
                        allocation=allocation, round_to=multiple, imgsz=cell.imgsz_px,
                    )
                )  # fmt: skip
                macs[label] = pruned.plan.after.macs / pruned.plan.before.macs
                artefacts[label] = export_one(slim, folder, variant)
        report = benchmark(artefacts, imgsz_px=cell.imgsz_px, threads=cell.threads, runs=cell.runs)
    compared = {label: report.speed_up(label, DENSE) for label in macs}
    return {
        "cell": dataclasses.asdict(cell),
        "report": report.to_json(),
        "slim": {
            label: {"macs": macs[label], "ratio": found.ratio, "p25": found.p25, "p75": found.p75}
            for label, found in compared.items()
        },
    }


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    sys.exit(script(summary, SpeedupsConfig, lambda config: execute(bench, config)))
