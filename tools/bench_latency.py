"""Is a latency that was asked for the one that a fresh process measures, and what does it cost beside a MACs target?

python tools/bench_latency.py model=best.pt data=bccd/data.yaml out=runs/latency imgsz=[320,640] \
    backends=[ncnn,onnxruntime] targets=[0.6] epochs=10

A cell is a target on a backend at an image size. It profiles the dense checkpoint (once a backend and size), prunes
for the target, exports, and times the artefact in a process of its own. With `epochs` the slim model is fine-tuned, and
so is the one that the same allocation gives for a MACs target of the same latency. Each cell is a line of the record,
which is only ever appended to.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_recipes import TRAINING
from cells import run_missing
from recipes import OFTEN

from yolo_prune.allocation import PATHS
from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.device.benchmark_record import BenchmarkReport
from yolo_prune.export.profile import Profile, Timed
from yolo_prune.files import sha256
from yolo_prune.hosts.ultralytics.evaluation import evaluate, require_split
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.pipeline.artefacts import BACKENDS, Variant, export_one
from yolo_prune.pipeline.profile import ProfileConfig, profile
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.pipeline.pruning import PruneResult
from yolo_prune.pipeline.train import train_in
from yolo_prune.report import render

RECORD = Path(__file__).resolve().parent / "records" / "latency.jsonl"

SAME = 0.02
"""Latencies that differ by less are the same one."""


@dataclasses.dataclass(kw_only=True)
class LatencyConfig:
    """Settings of the benchmark."""

    model: str = setting(help="dense checkpoint, trained on the data")
    data: str = setting(help="data yaml with train and val")
    out: str = setting("runs/latency", help="folder of profiles, artefacts and trainings")
    backends: list[str] = setting(["ncnn", "onnxruntime"], help=f"of: {', '.join(BACKENDS)}")
    imgsz: list[int] = setting([320, 640], help="image sides", unit="px")
    targets: list[float] = setting([0.6], help="fractions of the dense model's latency")
    allocation: str = setting("knapsack", help=f"one of: {', '.join(PATHS)}")
    criterion: str = setting("taylor", help=f"one of: {', '.join(CRITERIA)}")
    threads: int = setting(2, help="threads of the runtimes")
    candidates: int = setting(40, help="networks that a profile times")
    runs: int = setting(100, help="timed rounds in the fresh process")
    epochs: int = setting(0, help="epochs of the fine-tunes; 0 for none", unit="epochs")
    seed: int = setting(0, help="seed of the fine-tunes")
    batch: int = setting(16, help="batch size", unit="images")
    workers: int = setting(2, help="loader processes")
    record: str = setting(str(RECORD), help="record that finished cells are appended to")
    json: str | None = json_setting("the cells of the record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One experiment; `model` is the start of the checkpoint's SHA-256."""

    model: str
    data: str
    backend: str
    imgsz_px: int
    threads: int
    target: float
    allocation: str
    criterion: str
    epochs: int
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyFigures:
    """The cells of a record."""

    records: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {"cells": self.records}

    def table(self, *, markdown: bool = False) -> str:
        """Return one row a cell."""
        rows = []
        for record in self.records:
            cell, fresh = record["cell"], record["fresh"]
            rows.append(
                [f"{cell['backend']}, {cell['imgsz_px']} px, {cell['threads']} threads", cell["allocation"],
                 f"{cell['target']:g}", f"{record['predicted']:.3f}", f"{record['confirmed']:.3f}",
                 f"{fresh['ratio']:.3f} ({fresh['p25']:.3f}..{fresh['p75']:.3f})",
                 f"{fresh['ratio'] / cell['target'] - 1:+.1%}", f"{record['macs_kept']:.1%}",
                 *(_map(record.get(name)) for name in ("by_latency", "by_macs"))]
            )  # fmt: skip
        head = ["where", "allocation", "target", "predicted", "confirmed", "fresh process", "off", "MACs"]
        return render([*head, "mAP50-95 val", "by MACs, as fast"], rows, markdown=markdown)


def _map(found: dict[str, Any] | None) -> str:
    return "-" if found is None else f"{found['map50_95']:.3f} at {found['ratio']:.3f}"


def bench(config: LatencyConfig) -> LatencyFigures:
    """Run every cell that the record lacks."""
    for backend in config.backends:
        require_choice("backend", backend, BACKENDS)
    for split in ("train", "val"):
        require_split(Path(config.data), split)
    cells = [
        Cell(
            model=sha256(Path(config.model))[:12], data=Path(config.data).parent.name, backend=backend,
            imgsz_px=imgsz, threads=config.threads, target=target, allocation=config.allocation,
            criterion=config.criterion, epochs=config.epochs, seed=config.seed,
        )
        for backend in config.backends
        for imgsz in config.imgsz
        for target in config.targets
    ]  # fmt: skip
    return LatencyFigures(records=run_missing(Path(config.record), cells, lambda cell: Laboratory(config, cell).run()))


class Laboratory:
    """Runs one cell."""

    def __init__(self, config: LatencyConfig, cell: Cell) -> None:
        self.config, self.cell = config, cell
        self.folder = Path(config.out) / f"{cell.model}-{cell.backend}-{cell.imgsz_px}px-{cell.threads}threads"

    def run(self) -> dict[str, Any]:
        """Return the line of the record."""
        started, config = time.perf_counter(), self.config
        found = profile(
            ProfileConfig(
                model=config.model, out=str(self.folder / "profile"), backend=self.cell.backend,
                imgsz=self.cell.imgsz_px, threads=config.threads, candidates=config.candidates,
            )
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            slim = Path(folder, "slim.pt")
            pruned = self._prune(slim, target_latency=self.cell.target, profile=str(found.path))
            assert pruned.latency is not None  # it was asked for
            assert pruned.latency.timed is not None
            line: dict[str, Any] = {
                "cell": dataclasses.asdict(self.cell),
                "profile_error": found.profile.fit.error,
                "multiple": found.profile.fit.multiple,
                "predicted": pruned.latency.predicted,
                "confirmed": pruned.latency.timed.ratio,
                "macs_kept": pruned.plan.after.macs / pruned.plan.before.macs,
                "fresh": self._fresh(slim),
            }
            if config.epochs:
                line["by_latency"] = {"ratio": line["fresh"]["ratio"], "map50_95": self._tuned("latency", slim)}
                line["by_macs"] = self._by_macs(line["fresh"]["ratio"], found.profile, Path(folder))
        return {**line, "seconds": round(time.perf_counter() - started)}

    def _prune(self, out: Path, **target: Any) -> PruneResult:
        config, cell = self.config, self.cell
        looks: dict[str, Any] = {}
        if CRITERIA[cell.criterion].needs:
            looks = {"data": config.data, "batch": config.batch}
        shared: dict[str, Any] = {"criterion": cell.criterion, "allocation": cell.allocation, "imgsz": cell.imgsz_px}
        return prune(PruneConfig(model=config.model, out=str(out), **shared, **looks, **target))

    def _fresh(self, slim: Path) -> dict[str, float]:
        """Return slim / dense as a process of its own measures it."""
        with tempfile.TemporaryDirectory() as name:
            folder, variant = Path(name), Variant(format=BACKENDS[self.cell.backend], imgsz_px=self.cell.imgsz_px)
            dense = export_one(Path(self.config.model), folder / "dense", variant)
            artefact = export_one(slim, folder / "slim", variant)
            words = [f"models=[{dense},{artefact}]", f"imgsz={self.cell.imgsz_px}", f"threads={self.cell.threads}"]
            words += [f"runs={self.config.runs}", "boxes=false", "memory=false", f"json={folder / 'times.json'}"]
            command = [sys.executable, "-m", "yolo_prune", "benchmark", *words]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            report = BenchmarkReport.from_json(json.loads((folder / "times.json").read_text()))
        return dataclasses.asdict(Timed.between(report.entry(str(artefact)), report.entry(str(dense))))

    def _by_macs(self, ratio: float, known: Profile, folder: Path) -> dict[str, float]:
        """Return mAP of the model for a MACs target that is as fast: its target is halved in on by timing."""
        low, high, best = 0.05, 0.95, dict[str, float]()
        for number in range(8):
            middle, path = (low + high) / 2.0, folder / f"macs{number}.pt"
            self._prune(path, target_macs=middle, round_to=known.fit.multiple)
            timed = self._fresh(path)["ratio"]
            if not best or abs(timed - ratio) < abs(best["ratio"] - ratio):
                best = {"ratio": timed, "target_macs": middle, "number": number}
            if abs(timed / ratio - 1.0) < SAME:
                break
            low, high = (middle, high) if timed < ratio else (low, middle)
        best["map50_95"] = self._tuned("macs", folder / f"macs{int(best.pop('number'))}.pt")
        return best

    def _tuned(self, name: str, slim: Path) -> float:
        """Return mAP50-95 on val after the fine-tune."""
        config, cell = self.config, self.cell
        # Named by what it starts from: timings, and with them the channels, differ a little from one try to another.
        folder = self.folder / f"{name}-{cell.target:g}-seed{cell.seed}-{sha256(slim)[:8]}"
        settings = {**TRAINING, **OFTEN, "epochs": cell.epochs, "imgsz": cell.imgsz_px, "batch": config.batch}
        settings |= {"seed": cell.seed, "workers": config.workers}
        best = train_in(folder, slim, Path(config.data), settings)
        return evaluate(
            best, data=Path(config.data), split="val", imgsz_px=cell.imgsz_px, batch=config.batch,
            workers=config.workers,
        ).map50_95  # fmt: skip


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    sys.exit(script(summary, LatencyConfig, lambda config: execute(bench, config)))
