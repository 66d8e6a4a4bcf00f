"""Is a latency that was asked for the one that a fresh process measures, and what does it cost beside a MACs target?

python tools/bench_latency.py model=best.pt data=bccd/data.yaml out=runs/latency imgsz=[320,640] \
    backends=[ncnn,onnxruntime] targets=[0.6] epochs=10

A cell is a target on a backend at an image size. It profiles the dense checkpoint (once a backend and size), prunes for
the target, exports, and times the artefact in a process of its own; then it looks for the MACs target with which the
same allocation gives a model that is as fast, timed in turns with the first one. With `epochs` both are fine-tuned.
Each cell is a line of the record, which is only ever appended to; a target that cannot be reached is a line as well.
What was cut and timed are files in `out`, with which a killed cell goes on. Fine-tunes of other epochs or seeds start
from them, too, so that everything can be timed first, on a machine that does nothing else.
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

from cells import cell_key, data_name, failures, run_missing
from experiments import TRAINING
from recipe_figures import spread
from recipes import OFTEN

from yolo_prune.allocation import PATHS
from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.device.benchmark_record import BenchmarkReport
from yolo_prune.errors import InfeasibleTargetError
from yolo_prune.export.profile import Timed
from yolo_prune.files import sha256, write_json
from yolo_prune.hosts.slim import MARKER
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import evaluate, require_split
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.pipeline.artefacts import FORMAT_OF, Variant, export_one
from yolo_prune.pipeline.profile import ProfileConfig, profile
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.pipeline.train import train_in
from yolo_prune.report import render

RECORD = Path(__file__).resolve().parent / "records" / "latency.jsonl"

SAME = 0.01
"""A latency that differs by less from the one that is looked for is not worth another try."""

MATCHED = 0.03
"""Latencies that differ by at most this fraction are the same one."""

TRIES = 8
"""Networks that are timed for a MACs target of the same latency."""


@dataclasses.dataclass(kw_only=True)
class LatencyConfig:
    """Settings of the benchmark."""

    model: str = setting(help="dense checkpoint, trained on the data")
    data: str = setting(help="data yaml with train and val")
    out: str = setting("runs/latency", help="folder of profiles, artefacts and trainings")
    backends: list[str] = setting(["ncnn", "onnxruntime"], help=f"of: {', '.join(FORMAT_OF)}")
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
    candidates: int
    runs: int
    batch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyFigures:
    """The cells of a record."""

    records: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {"cells": self.records}

    def table(self, *, markdown: bool = False) -> str:
        """Return one row a cell, or for cells that differ in the seed of the fine-tunes; below why some cannot be."""
        head = ["where", "allocation", "target", "predicted", "confirmed", "fresh process", "off", "MACs"]
        head += ["epochs", "seeds", "mAP50-95 val", "by MACs, as fast"]
        rows = [
            [*_place(same[0]["cell"]), *(_failed() if "failed" in same[0] else _row(same))]
            for same in _but_for_the_seed(self.records)
        ]
        told = failures(self.records)
        return render(head, rows, markdown=markdown) + ("\n" if markdown and told else "") + told


def _place(cell: dict[str, Any]) -> list[str]:
    where = f"{cell['backend']}, {cell['imgsz_px']} px, {cell['threads']} threads"
    return [where, cell["allocation"], f"{cell['target']:g}"]


def _failed() -> list[str]:
    return ["cannot be", *("-" for _ in range(8))]


def _but_for_the_seed(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the lines of each cut: seeds are those of its fine-tunes."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(json.dumps({**record["cell"], "seed": None}, sort_keys=True), []).append(record)
    return list(groups.values())


def _row(records: list[dict[str, Any]]) -> list[str]:
    record = records[0]
    fresh = record["fresh"]
    return [
        f"{record['predicted']:.3f}", f"{record['confirmed']:.3f}",
        f"{fresh['ratio']:.3f} ({fresh['p25']:.3f}..{fresh['p75']:.3f})",
        f"{fresh['ratio'] / record['cell']['target'] - 1:+.1%}", f"{record['macs_kept']:.1%}",
        str(record["cell"]["epochs"]), " ".join(str(one["cell"]["seed"]) for one in records),
        *(_map([one[name] for one in records]) for name in ("by_latency", "by_macs")),
    ]  # fmt: skip


def _map(found: list[dict[str, Any]]) -> str:
    tuned = [one["map50_95"] for one in found if "map50_95" in one]
    value = spread(tuned) if tuned else "not tuned,"
    return f"{value} at {found[0]['ratio']:.3f}{'' if found[0].get('matched', True) else ', not matched'}"


def bench(config: LatencyConfig) -> LatencyFigures:
    """Run every cell that the record lacks.

    Raises:
        YoloPruneError: Settings, data or checkpoints that cannot be, or work that failed.
    """
    for backend in config.backends:
        require_choice("backend", backend, FORMAT_OF)
    for split in ("train", "val"):
        require_split(Path(config.data), split)
    cells = [
        Cell(
            model=sha256(Path(config.model))[:12], data=data_name(config.data), backend=backend,
            imgsz_px=imgsz, threads=config.threads, target=target, allocation=config.allocation,
            criterion=config.criterion, epochs=config.epochs, seed=config.seed, candidates=config.candidates,
            runs=config.runs, batch=config.batch,
        )
        for backend in config.backends
        for imgsz in config.imgsz
        for target in config.targets
    ]  # fmt: skip
    lines = run_missing(
        Path(config.record), cells, lambda cell: Laboratory(config, cell).run(), cannot_be=(InfeasibleTargetError,)
    )
    return LatencyFigures(records=lines)


class Laboratory:
    """Runs one cell.

    Slim models and timings are files of the cell's folder, and none is made twice: each is noisy or new with every try,
    so that what is built on it would be, too. The profile and the dense artefact are shared by the cells of a backend,
    image size and number of threads.
    """

    def __init__(self, config: LatencyConfig, cell: Cell) -> None:
        self.config, self.cell = config, cell
        self.shared = Path(config.out) / f"{cell.model}-{cell.backend}-{cell.imgsz_px}px-{cell.threads}threads"
        cut = dataclasses.replace(cell, epochs=0, seed=0)
        self.folder = self.shared / f"{cell.target:g}-{cell.allocation}-{cell.criterion}-{cell_key(cut)}"
        self.tunes = self.folder / f"{cell.epochs}epochs-seed{cell.seed}"
        self.variant = Variant(format=FORMAT_OF[cell.backend], imgsz_px=cell.imgsz_px)

    def run(self) -> dict[str, Any]:
        """Return the line of the record.

        Raises:
            InfeasibleTargetError: The target cannot be reached, or was not confirmed.
        """
        started, cell = time.perf_counter(), self.cell
        found = profile(
            ProfileConfig(
                model=self.config.model, out=str(self.shared / f"profile-{cell.candidates}"), backend=cell.backend,
                imgsz=cell.imgsz_px, threads=cell.threads, candidates=cell.candidates,
            )
        )  # fmt: skip
        slim = self._pruned("by_latency", target_latency=cell.target, profile=str(found.path))
        marker = getattr(read_checkpoint(slim).model, MARKER)
        choice, fresh = marker["plan"]["choice"], self._timed("by_latency", slim, self._dense())
        nearest, target_macs = self._as_fast(slim, found.profile.fit.multiple)
        again = self._timed(f"{nearest.stem}_again", nearest, slim)["ratio"]  # the first was picked, so it is too good
        line: dict[str, Any] = {
            "cell": dataclasses.asdict(cell),
            "machine": dataclasses.asdict(found.profile.machine),
            "profile_error": found.profile.fit.error,
            "multiple": found.profile.fit.multiple,
            "predicted": choice["predicted"],
            "confirmed": choice["timed"]["ratio"],
            "macs_kept": marker["after"]["macs"] / marker["before"]["macs"],
            "fresh": fresh,
            "by_latency": {"ratio": fresh["ratio"]},
            "by_macs": {
                "ratio": again * fresh["ratio"], "target_macs": target_macs, "matched": _off(again) <= MATCHED,
            },
        }  # fmt: skip
        if cell.epochs:
            line["by_latency"]["map50_95"] = self._tuned(slim)
            line["by_macs"]["map50_95"] = self._tuned(nearest)
        return {**line, "seconds": round(time.perf_counter() - started)}

    def _pruned(self, name: str, **target: Any) -> Path:
        """Return the slim model of a target."""
        config, cell, out = self.config, self.cell, self.folder / f"{name}.pt"
        if not out.is_file():
            looks: dict[str, Any] = {}
            if CRITERIA[cell.criterion].needs:
                looks = {"data": config.data, "batch": cell.batch}
            looks |= {"criterion": cell.criterion, "allocation": cell.allocation, "imgsz": cell.imgsz_px}
            prune(PruneConfig(model=config.model, out=str(out), **looks, **target))
        return out

    def _timed(self, name: str, slim: Path, base: Path) -> dict[str, float]:
        """Return slim / base as a process of its own measured it."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_json(path, self._fresh(slim, base))
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _fresh(self, slim: Path, base: Path) -> dict[str, float]:
        """Measure slim / base, a checkpoint or an artefact, in turns and in a process of its own."""
        with tempfile.TemporaryDirectory() as name:
            artefact, times = export_one(slim, Path(name), self.variant), Path(name, "times.json")
            against = export_one(base, Path(name), self.variant) if base.suffix == ".pt" else base
            words = [f"models=[{against},{artefact}]", f"imgsz={self.cell.imgsz_px}", f"threads={self.cell.threads}"]
            words += [f"runs={self.cell.runs}", "boxes=false", "memory=false", f"json={times}"]
            command = [sys.executable, "-m", "yolo_prune", "benchmark", *words]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            report = BenchmarkReport.from_json(json.loads(times.read_text(encoding="utf-8")))
        return dataclasses.asdict(Timed.between(report.entry(str(artefact)), report.entry(str(against))))

    def _dense(self) -> Path:
        """Return the dense artefact."""
        model, folder = Path(self.config.model), self.shared / "dense"
        artefact = self.variant.path(folder, model.stem)
        return artefact if artefact.exists() else export_one(model, folder, self.variant)

    def _as_fast(self, wanted: Path, multiple: int) -> tuple[Path, float]:
        """Return the slim model of a MACs target that is as fast, and that target: it is halved in on by timing.

        Each is timed in turns with the wanted one: the ratios to the dense model that two processes measure differ by
        several percent for one and the same network.

        Raises:
            InfeasibleTargetError: No MACs target can be reached.
        """
        low, high, tried = 0.05, 0.95, dict[Path, tuple[float, float]]()
        for number in range(TRIES):
            middle = (low + high) / 2.0
            try:
                slim = self._pruned(f"by_macs{number}", target_macs=middle, round_to=multiple)
            except InfeasibleTargetError:
                if not tried and number == TRIES - 1:
                    raise
                low = middle  # the floors are above it
                continue
            timed = self._timed(slim.stem, slim, wanted)["ratio"]
            tried[slim] = (timed, middle)
            if _off(timed) < SAME:
                break
            low, high = (middle, high) if timed < 1.0 else (low, middle)
        nearest = min(tried, key=lambda slim: _off(tried[slim][0]))
        return nearest, tried[nearest][1]

    def _tuned(self, slim: Path) -> float:
        """Return mAP50-95 on val after the fine-tune."""
        config, cell = self.config, self.cell
        settings = {**TRAINING, **OFTEN, "epochs": cell.epochs, "imgsz": cell.imgsz_px, "batch": cell.batch}
        settings |= {"seed": cell.seed, "workers": config.workers}
        best = train_in(self.tunes / slim.stem, slim, Path(config.data), settings)
        return evaluate(
            best, data=Path(config.data), split="val", imgsz_px=cell.imgsz_px, batch=cell.batch,
            workers=config.workers,
        ).map50_95  # fmt: skip


def _off(ratio: float) -> float:
    return abs(ratio - 1.0)


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    sys.exit(script(summary, LatencyConfig, lambda config: execute(bench, config)))
