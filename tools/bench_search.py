"""Does the score of a candidate tell what it is worth after a fine-tune? Spearman, with and without recalibration.

python tools/bench_search.py model=best.pt data=bccd/data.yaml out=runs/search imgsz=320 candidates=16 epochs=10

Random candidates within a budget are scored on held-out training images, once with recalibrated batch norms and once
as pruned, and then fine-tuned, all alike. Each is a folder in `out`, in which a killed training goes on, and in the end
a line of the record, which is only ever appended to. Lines of their own beside that: how many candidates a second the
closed form prices, and whether it counts what a forward pass counts.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import cell_key, data_name, run_missing
from experiments import TRAINING
from recipes import OFTEN
from search_figures import SearchFigures
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from yolo_prune.allocation import Budget, Constraints
from yolo_prune.allocation.budget import lowest_go, solver_for
from yolo_prune.channels import ChannelGraph
from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.device.machine import describe_machine
from yolo_prune.files import sha256
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint, write_slim
from yolo_prune.hosts.ultralytics.collection import TrainingImages, scored_on
from yolo_prune.hosts.ultralytics.evaluation import evaluate, require_split
from yolo_prune.hosts.ultralytics.scoring import Scorer
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model
from yolo_prune.importance import FloatArray
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.pipeline.train import train_in
from yolo_prune.plan import plan_from_keep
from yolo_prune.search.sampling import Sampler
from yolo_prune.surgery import counted_macs

RECORD = Path(__file__).resolve().parent / "records" / "search.jsonl"

BATCH = 10_000
"""Candidates that are priced at once."""


@dataclasses.dataclass(kw_only=True)
class SearchBenchConfig:
    """Settings of the benchmark."""

    model: str = setting(help="dense checkpoint, trained on the data")
    data: str = setting(help="data yaml with train and val")
    out: str = setting("runs/search", help="folder of the candidates")
    candidates: int = setting(16, help="candidates that are scored and fine-tuned")
    criteria: list[str] = setting(["taylor"], help=f"of: {', '.join(CRITERIA)}; the paper's is l1")
    target_macs: float = setting(0.5, help="fraction of the MACs that they keep")
    largest: float | None = setting(
        None, help="largest fraction of a group that is drawn; default: what the budget asks for on average"
    )
    epochs: int = setting(10, help="epochs of each fine-tune", unit="epochs")
    batches: int = setting(100, help="batches that norms are recalibrated on")
    seed: int = setting(0, help="seed of the candidates and of the trainings")
    imgsz: int = setting(640, help="image side", unit="px")
    batch: int = setting(16, help="batch size", unit="images")
    workers: int = setting(2, help="loader processes")
    device: str = setting("cpu", help="device of the trainings")
    counted: int = setting(0, help="random candidates whose MACs are counted by a forward pass, too")
    record: str = setting(str(RECORD), help="record that finished candidates are appended to")
    json: str | None = json_setting("the lines of the record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One candidate; `model` is the start of the checkpoint's SHA-256."""

    model: str
    data: str
    criterion: str
    number: int
    target_macs: float
    largest: float | None
    epochs: int
    batches: int
    seed: int
    imgsz_px: int
    batch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pricing:
    """How many candidates a second are priced."""

    kind: str = "pricing"
    model: str
    imgsz_px: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting:
    """Whether random candidates have the MACs that they are priced at."""

    kind: str = "counting"
    model: str
    imgsz_px: int
    candidates: int
    seed: int


def bench(config: SearchBenchConfig) -> SearchFigures:
    """Price candidates, and run every cell that the record lacks.

    Raises:
        YoloPruneError: Settings, data or checkpoints that cannot be, or work that failed.
    """
    for criterion in config.criteria:
        require_choice("criterion", criterion, CRITERIA)
    for split in ("train", "val"):
        require_split(Path(config.data), split)
    source = read_checkpoint(Path(config.model))
    graph = trace_model(source.model)
    laboratories = {name: cache(partial(Laboratory, config, source, graph, name)) for name in config.criteria}

    def run(cell: Cell | Pricing | Counting) -> dict[str, Any]:
        if isinstance(cell, Cell):
            return laboratories[cell.criterion]().run(cell)
        found = priced(graph, config.imgsz) if isinstance(cell, Pricing) else counted(source, graph, config)
        return {"cell": dataclasses.asdict(cell), **found}

    model = source.sha256[:12]
    cells: list[Cell | Pricing | Counting] = [Pricing(model=model, imgsz_px=config.imgsz)]
    if config.counted:
        cells += [Counting(model=model, imgsz_px=config.imgsz, candidates=config.counted, seed=config.seed)]
    cells += [_cell(config, criterion, number) for criterion in config.criteria for number in range(config.candidates)]
    return SearchFigures(lines=run_missing(Path(config.record), cells, run))


def _cell(config: SearchBenchConfig, criterion: str, number: int) -> Cell:
    return Cell(
        model=sha256(Path(config.model))[:12], data=data_name(config.data), criterion=criterion, number=number,
        target_macs=config.target_macs, largest=config.largest, epochs=config.epochs, batches=config.batches,
        seed=config.seed, imgsz_px=config.imgsz, batch=config.batch,
    )  # fmt: skip


class Laboratory:
    """Scores and fine-tunes candidates of one criterion."""

    def __init__(self, config: SearchBenchConfig, source: Checkpoint, graph: ChannelGraph, criterion: str) -> None:
        self._config, self._source, self._graph = config, source, graph
        images = TrainingImages(
            data=Path(config.data), imgsz_px=config.imgsz, batches=config.batches, batch=config.batch,
            workers=config.workers, device=config.device,
        )  # fmt: skip
        self._scores: FloatArray = scored_on(source.model, graph, CRITERIA[criterion], images)
        budget = Budget(unit="macs", ratio=config.target_macs, imgsz_px=config.imgsz)
        solver = solver_for(graph, Constraints(), self._scores)
        self._sampler = Sampler(graph, solver, budget, largest=config.largest, seed=config.seed)
        self._scorer = Scorer(source.model, images, held_out=0.2, seed=config.seed)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Return the line of the record."""
        started, candidate = time.perf_counter(), self._sampler.draw(cell.number)
        name = f"{cell.data}-{cell.criterion}-{cell.target_macs:g}-{cell.number}-{cell_key(cell)}"
        folder = Path(self._config.out) / name
        keep = lowest_go(self._graph, self._scores, candidate.widths)
        slim = slim_copy(self._source.model, self._graph, keep)
        macs, whole = (
            self._graph.cost.macs(widths, imgsz_px=cell.imgsz_px) for widths in (candidate.widths, self._graph.widths())
        )
        line = {
            "cell": dataclasses.asdict(cell),
            "macs": int(macs),
            "macs_kept": float(macs / whole),
            "recalibrated": self._scorer.score(slim),
            "as_pruned": self._scorer.score(slim, recalibrated=False),
        }
        path = folder / "slim.pt"
        if not path.is_file():
            plan = plan_from_keep(
                self._graph, keep, source_sha256=self._source.sha256, imgsz_px=cell.imgsz_px, choice={}
            )
            write_slim(path, slim, self._source, plan, dtype=self._source.stored_dtype)
        settings = {**TRAINING, **OFTEN, "epochs": cell.epochs, "imgsz": cell.imgsz_px, "batch": cell.batch}
        settings |= {"seed": cell.seed, "workers": self._config.workers, "device": self._config.device}
        best = train_in(folder / "tune", path, Path(self._config.data), settings)
        found = evaluate(
            best, data=Path(self._config.data), split="val", imgsz_px=cell.imgsz_px, batch=cell.batch,
            workers=self._config.workers,
        )  # fmt: skip
        seconds = round(time.perf_counter() - started)
        return {**line, "fine_tuned": found.map50_95, "moved": candidate.moved, "seconds": seconds}


def priced(graph: ChannelGraph, imgsz_px: int) -> dict[str, Any]:
    """Return how many candidates a second are priced on one core, the median of several turns."""
    widths, rates = graph.widths(), list[float]()
    kept = np.random.default_rng(0).integers(1, widths + 1, size=(BATCH, len(widths)))
    with threadpool_limits(1):  # the matrix products of numpy, which do not ask torch
        for _ in range(7):
            started = time.perf_counter()
            graph.cost.macs(kept, imgsz_px=imgsz_px)
            rates.append(BATCH / (time.perf_counter() - started))
    return {"a_second": round(float(np.median(rates))), "machine": dataclasses.asdict(describe_machine({}))}


def counted(source: Checkpoint, graph: ChannelGraph, config: SearchBenchConfig) -> dict[str, int]:
    """Return how many of some random candidates have the MACs that a forward pass counts."""
    scores = np.random.default_rng(0).random(graph.channel_count)
    solver, equal = solver_for(graph, Constraints(), scores), 0
    image = torch.zeros(1, 3, config.imgsz, config.imgsz)
    generator = np.random.default_rng(config.seed)
    for _ in range(config.counted):
        widths = solver.settle(graph.widths() * generator.uniform(0.1, 1.0, size=len(graph.groups)))
        slim = slim_copy(source.model, graph, lowest_go(graph, scores, widths))
        equal += counted_macs(slim, image) == int(graph.cost.macs(widths, imgsz_px=config.imgsz))
    return {"equal": equal}


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    sys.exit(script(summary, SearchBenchConfig, lambda config: execute(bench, config)))
