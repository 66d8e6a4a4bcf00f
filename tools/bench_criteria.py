"""What criteria are worth before any fine-tune: mAP of slim networks with and without recalibrated batch norms.

python tools/bench_criteria.py model=best.pt seed=0 data=bccd/data.yaml imgsz=320 \
    criteria=[l2,taylor] allocations=[uniform] budgets=[0.5,0.3]

A cell is a criterion with an allocation at a budget of MACs, on the dense checkpoint of a seed, which is that of chance
as well. Each is a line of the record, which is only ever appended to, so that the table can be finished piece by piece;
a budget that cannot be reached is a line, too.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cells import data_name, failures, run_missing
from recipe_figures import spread

from yolo_prune.allocation import PATHS
from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.errors import InfeasibleTargetError
from yolo_prune.files import sha256
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import evaluate, require_split
from yolo_prune.importance.chance import RANDOM
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
    name: str | None = setting(
        None, help="name of the row that its seeds share in the table; default: the host's for the network"
    )
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
    """One experiment.

    `model` is the start of the checkpoint's SHA-256, `name` what the checkpoints of all seeds are called.
    """

    model: str
    name: str
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
        """Return one row a criterion and allocation, the best at the largest budget first.

        Seeds of one name share a row: the mean, with the lowest and highest, and the number of seeds where a budget
        has fewer than the row. Below them stands why some cannot be.
        """
        records = self.records
        budgets = sorted({record["cell"]["budget"] for record in records}, reverse=True)
        several = _several([record["cell"] for record in records])
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for record in records:
            cell = record["cell"]
            name = cell["name"]
            if (cell["data"], name) in several:
                name += f" {cell['model'][:6]}"
            groups.setdefault((_place(cell), name, cell["criterion"], cell["allocation"]), []).append(record)
        kinds = [(budget, kind) for budget in budgets for kind in ("recalibrated", "as pruned")]
        rows = [
            (_mean(found, *kinds[0]), [*key, _seeds(found), *(_shown(found, *kind) for kind in kinds)])
            for key, found in groups.items()
        ]
        head = ["data", "model", "criterion", "allocation", "seeds"]
        head += [f"{budget:.0%} {kind}" for budget, kind in kinds]
        table = render(head, [row for _, row in sorted(rows, key=lambda row: -row[0])], markdown=markdown)
        told = failures(self.records)
        return table + ("\n" if markdown and told else "") + told


def _place(cell: dict[str, Any]) -> str:
    return f"{cell['data']}, {cell['imgsz_px']} px, {cell['batches']} batches of {cell['batch']}"


def _several(cells: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Return data and names of which a seed has several checkpoints.

    No record tells which checkpoints of other seeds belong to which of these, so that none is averaged with another.
    """
    found: dict[tuple[str, str, int], set[str]] = {}
    for cell in cells:
        found.setdefault((cell["data"], cell["name"], cell["seed"]), set()).add(cell["model"])
    return {(data, name) for (data, name, _), models in found.items() if len(models) > 1}


def _values(records: list[dict[str, Any]], budget: float, kind: str) -> list[float]:
    return [record[kind] for record in records if record["cell"]["budget"] == budget and kind in record]


def _mean(records: list[dict[str, Any]], budget: float, kind: str) -> float:
    values = _values(records, budget, kind)
    return float(np.mean(values)) if values else float("-inf")


def _shown(records: list[dict[str, Any]], budget: float, kind: str) -> str:
    values, seeds = _values(records, budget, kind), len({record["cell"]["seed"] for record in records})
    if not values:
        tried = any(record["cell"]["budget"] == budget for record in records)
        return "cannot be" if tried else "-"
    return spread([*values]) if len(values) == seeds else f"{spread([*values])}, {len(values)} of {seeds} seeds"


def _seeds(records: list[dict[str, Any]]) -> str:
    return " ".join(str(seed) for seed in sorted({record["cell"]["seed"] for record in records}))


def bench(config: CriteriaConfig) -> CriteriaFigures:
    """Run every cell that the record lacks.

    Raises:
        YoloPruneError: Settings, data or checkpoints that cannot be, or work that failed.
    """
    for criterion in config.criteria:
        require_choice("criterion", criterion, CRITERIA)
    for allocation in config.allocations:
        require_choice("allocation", allocation, PATHS)
    for split in ("train", "val"):
        require_split(Path(config.data), split)
    dense: Any = read_checkpoint(Path(config.model)).model
    name = config.name or Path(dense.yaml.get("yaml_file", config.model)).stem
    cells = [
        Cell(
            model=sha256(Path(config.model))[:12], name=name, criterion=criterion, allocation=allocation, budget=budget,
            seed=config.seed, data=data_name(config.data), imgsz_px=config.imgsz, batch=config.batch,
            batches=config.batches,
        )
        for budget in config.budgets
        for allocation in config.allocations
        for criterion in config.criteria
    ]  # fmt: skip
    lines = run_missing(
        Path(config.record), cells, lambda cell: measured(config, cell), cannot_be=(InfeasibleTargetError,)
    )
    return CriteriaFigures(records=lines)


def measured(config: CriteriaConfig, cell: Cell) -> dict[str, Any]:
    """Cut once, recalibrate that cut as well, and return the line of the record.

    Raises:
        InfeasibleTargetError: The budget cannot be reached.
    """
    started, found, images = time.perf_counter(), dict[str, float](), {"data": config.data, "batch": cell.batch}
    choice: dict[str, Any] = {"criterion": cell.criterion, "allocation": cell.allocation, "target_macs": cell.budget}
    if CRITERIA[cell.criterion].needs:
        choice |= {**images, "batches": cell.batches}
    if cell.criterion == RANDOM.name:
        choice["seed"] = cell.seed
    with tempfile.TemporaryDirectory() as folder:
        plan = str(Path(folder, "plan.json"))
        for kind, settings in (
            ("as pruned", {**choice, "imgsz": cell.imgsz_px, "save_plan": plan}),
            ("recalibrated", {**images, "plan": plan, "recalibrate": cell.batches}),
        ):
            out = Path(folder, f"{kind}.pt")
            prune(PruneConfig(model=config.model, out=str(out), **settings))
            scores = evaluate(out, data=Path(config.data), split="val", imgsz_px=cell.imgsz_px, batch=cell.batch)
            found[kind] = scores.map50_95
    return {"cell": dataclasses.asdict(cell), **found, "seconds": round(time.perf_counter() - started)}


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    sys.exit(script(summary, CriteriaConfig, lambda config: execute(bench, config)))
