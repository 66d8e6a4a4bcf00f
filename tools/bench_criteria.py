"""What criteria are worth before any fine-tune: mAP of slim networks with and without recalibrated batch norms.

python tools/bench_criteria.py model=best.pt seed=0 data=bccd/data.yaml imgsz=320 \
    criteria=[l2,taylor] allocations=[uniform] budgets=[0.5,0.3]

A cell is a criterion with an allocation at a budget of MACs, on the dense checkpoint of a seed. Each is a line of the
record, which is only ever appended to, so that the table can be finished piece by piece.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cells import run_missing

from yolo_prune.allocation import PATHS
from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.files import sha256
from yolo_prune.hosts.ultralytics.evaluation import evaluate, require_split
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.report import render

RECORD = Path(__file__).resolve().parent / "records" / "criteria.jsonl"


@dataclasses.dataclass(kw_only=True)
class CriteriaConfig:
    """Settings of the benchmark."""

    model: str = setting(help="dense checkpoint, trained on the data")
    data: str = setting(help="data yaml with train and val")
    seed: int = setting(0, help="seed that the checkpoint was trained with")
    criteria: list[str] = setting(list(CRITERIA), help=f"of: {', '.join(CRITERIA)}")
    allocations: list[str] = setting(["uniform"], help=f"of: {', '.join(PATHS)}")
    budgets: list[float] = setting([0.5, 0.3], help="fractions of the MACs that are kept")
    imgsz: int = setting(640, help="image side", unit="px")
    batch: int = setting(16, help="batch size", unit="images")
    batches: int = setting(16, help="batches that criteria look at, and that norms are recalibrated on")
    record: str = setting(str(RECORD), help="record that finished cells are appended to")
    json: str | None = json_setting("the cells of the record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One experiment; `model` is the start of the checkpoint's SHA-256."""

    model: str
    criterion: str
    allocation: str
    budget: float
    seed: int
    data: str
    imgsz_px: int
    batch: int
    batches: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriteriaFigures:
    """The cells of a record."""

    records: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {"cells": self.records}

    def table(self, *, markdown: bool = False) -> str:
        """Return one row a criterion and allocation, the best at the largest budget first; means over the seeds."""
        budgets = sorted({record["cell"]["budget"] for record in self.records}, reverse=True)
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for record in self.records:
            cell = record["cell"]
            place = f"{cell['data']}, {cell['imgsz_px']} px, {cell['batches']} batches of {cell['batch']}"
            groups.setdefault((place, cell["criterion"], cell["allocation"]), []).append(record)
        kinds = [(budget, kind) for budget in budgets for kind in ("recalibrated", "as pruned")]
        rows = [
            (
                _mean(found, *kinds[0]),
                [*key, _seeds(found), *(_shown(_mean(found, *kind)) for kind in kinds)],
            )
            for key, found in groups.items()
        ]
        head = ["data", "criterion", "allocation", "seeds", *(f"{budget:.0%} {kind}" for budget, kind in kinds)]
        return render(head, [row for _, row in sorted(rows, key=lambda row: -row[0])], markdown=markdown)


def _mean(records: list[dict[str, Any]], budget: float, kind: str) -> float:
    values = [record[kind] for record in records if record["cell"]["budget"] == budget]
    return float(np.mean(values)) if values else float("-inf")


def _shown(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "-"


def _seeds(records: list[dict[str, Any]]) -> str:
    return " ".join(str(seed) for seed in sorted({record["cell"]["seed"] for record in records}))


def bench(config: CriteriaConfig) -> CriteriaFigures:
    """Run every cell that the record lacks."""
    for criterion in config.criteria:
        require_choice("criterion", criterion, CRITERIA)
    for allocation in config.allocations:
        require_choice("allocation", allocation, PATHS)
    for split in ("train", "val"):
        require_split(Path(config.data), split)
    cells = [
        Cell(
            model=sha256(Path(config.model))[:12], criterion=criterion, allocation=allocation, budget=budget,
            seed=config.seed, data=Path(config.data).parent.name, imgsz_px=config.imgsz, batch=config.batch,
            batches=config.batches,
        )
        for budget in config.budgets
        for allocation in config.allocations
        for criterion in config.criteria
    ]  # fmt: skip
    return CriteriaFigures(records=run_missing(Path(config.record), cells, lambda cell: measured(config, cell)))


def measured(config: CriteriaConfig, cell: Cell) -> dict[str, Any]:
    """Prune twice, with recalibration and without, and return the line of the record."""
    started, found = time.perf_counter(), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        for kind, batches in (("recalibrated", cell.batches), ("as pruned", 0)):
            looks: dict[str, Any] = {}
            if CRITERIA[cell.criterion].needs:
                looks["batches"] = cell.batches
            if looks or batches:
                looks |= {"data": config.data, "batch": cell.batch}
            out = Path(folder, f"{kind}.pt")
            prune(
                PruneConfig(
                    model=config.model,
                    out=str(out),
                    target_macs=cell.budget,
                    criterion=cell.criterion,
                    allocation=cell.allocation,
                    imgsz=cell.imgsz_px,
                    recalibrate=batches,
                    **looks,
                )
            )
            scores = evaluate(out, data=Path(config.data), split="val", imgsz_px=cell.imgsz_px, batch=cell.batch)
            found[kind] = scores.map50_95
    return {"cell": dataclasses.asdict(cell), **found, "seconds": round(time.perf_counter() - started)}


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    sys.exit(script(summary, CriteriaConfig, lambda config: execute(bench, config)))
