"""What recipes are worth: mAP before and after pruning, and after the fine-tune, cell by cell.

python tools/bench_recipes.py data=bccd/data.yaml model=yolov8n_coco.pt out=runs/recipes imgsz=320 \
    recipes=[dense,direct,gradual] budgets=[0.5] seeds=[0] epochs=30

A cell is a recipe at a budget of MACs, with a seed, on a data set. Each is a folder in `out`, in which a killed one
goes on, and in the end a line of the record, which is only ever appended to: a table can be finished piece by piece, on
several machines. Every recipe starts from the same dense checkpoint (of that seed: `model` trained for `dense_epochs`)
and trains for `epochs` in all, whatever it does with them; where it trains several networks side by side, the epochs of
all count. With `backends` the artefacts of the recipes are timed last, in turns with the dense model's; leave the
machine alone meanwhile.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cells import data_name, run_missing
from experiments import TRAINING, Experiment, ExperimentsConfig
from races import DENSE, Race, race, record_of_races
from recipe_figures import Cells
from recipes import CONTROLS, RECIPES, Step
from ultralytics import YOLO

from yolo_prune.cli import execute, script
from yolo_prune.configuration import require_choice, setting
from yolo_prune.device.machine import describe_machine
from yolo_prune.files import new_file, sha256
from yolo_prune.hosts.slim import MARKER
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import evaluate, require_split
from yolo_prune.hosts.ultralytics.grafting_files import grafting_record
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.pipeline.artefacts import FORMAT_OF, Variant, export_one
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.pipeline.rewrite import RewriteConfig, rewrite
from yolo_prune.pipeline.search import SearchConfig, search
from yolo_prune.pipeline.train import train_in

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tools" / "records" / "recipes.jsonl"


@dataclasses.dataclass(kw_only=True)
class RecipesConfig(ExperimentsConfig):
    """Settings of the benchmark."""

    out: str = setting("runs/recipes", help="folder of the cells")
    recipes: list[str] = setting(["dense", "direct"], help=f"of: {', '.join(RECIPES)}")
    imgsz: int = setting(640, help="image side", unit="px")
    device: str = setting("cpu", help="device of the trainings")
    backends: list[str] = setting([], help="what runs the artefacts of the recipes to time them; none: no timing")
    record: str = setting(str(RECORD), help="record that finished cells are appended to")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(Experiment):
    """One recipe in an experiment."""

    recipe: str

    @property
    def name(self) -> str:
        """Name of its folder."""
        budget = "" if self.recipe in CONTROLS else f"-{self.budget:g}"
        return f"{self.base}-{self.recipe}{budget}-{self.epochs}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeRace(Race, Experiment):
    """What the recipes of an experiment made, on one backend."""


def bench(config: RecipesConfig) -> Cells:
    """Run every cell that the record lacks, then the races.

    Raises:
        YoloPruneError: Settings, data or checkpoints that cannot be, or work that failed.
    """
    for recipe in config.recipes:
        require_choice("recipe", recipe, RECIPES)
    for backend in config.backends:
        require_choice("backend", backend, FORMAT_OF)
    for split in ("train", "val", "test"):
        require_split(Path(config.data), split)
    cells = [
        Cell(
            recipe=recipe, budget=1.0 if recipe in CONTROLS else budget, seed=seed, data=data_name(config.data),
            model=Path(config.model).stem, imgsz_px=config.imgsz, batch=config.batch,
            dense_epochs=config.dense_epochs, epochs=config.epochs,
        )
        for seed in config.seeds
        for budget in config.budgets
        for recipe in config.recipes
    ]  # fmt: skip
    record = Path(config.record)
    lines = run_missing(record, cells, lambda cell: Laboratory(config, cell).run())
    timed = run_missing(record_of_races(record), _races(config, cells), lambda one: _timed(config, cells, one))
    return Cells(records=lines, races=timed)


def _races(config: RecipesConfig, cells: Sequence[Cell]) -> list[RecipeRace]:
    """Return one race a budget, seed and backend."""
    runners: dict[Cell, list[str]] = {}
    for cell in cells:
        if cell.recipe not in CONTROLS:  # they are as fast as the dense model
            runners.setdefault(dataclasses.replace(cell, recipe=DENSE), [DENSE]).append(cell.recipe)
    return [
        RecipeRace(
            backend=backend, imgsz_px=shared.imgsz_px, threads=config.threads, runners=tuple(names),
            budget=shared.budget, seed=shared.seed, data=shared.data, model=shared.model, batch=shared.batch,
            dense_epochs=shared.dense_epochs, epochs=shared.epochs,
        )
        for shared, names in runners.items()
        for backend in config.backends
    ]  # fmt: skip


def _timed(config: RecipesConfig, cells: Sequence[Cell], one: RecipeRace) -> dict[str, Any]:
    """Time what the recipes made."""
    made = [cell for cell in cells if (cell.budget, cell.seed) == (one.budget, one.seed) and cell.recipe in one.runners]
    checkpoints = {cell.recipe: Laboratory(config, cell).final() for cell in made}
    checkpoints[DENSE] = Laboratory(config, made[0]).dense()

    def export(checkpoint: Path, folder: Path, backend: str) -> Path:
        return export_one(checkpoint, folder, Variant(format=FORMAT_OF[backend], imgsz_px=one.imgsz_px))

    return race(one, checkpoints, export, runs=config.runs)


class Laboratory:
    """Runs one cell; every step leaves files, so that a killed cell goes on."""

    def __init__(self, config: RecipesConfig, cell: Cell) -> None:
        self.config, self.cell = config, cell
        self.folder = Path(config.out) / cell.name
        self.curves: dict[str, list[float]] = {}
        self.stages: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Return the line of the record."""
        started = time.perf_counter()
        dense = self.dense()
        current, unpruned, pruned = dense, None, None
        for number, step in enumerate(RECIPES[self.cell.recipe]):
            if step.verb == "rewrite":
                current = self._rewrite(number, step, current)
            elif step.verb in ("prune", "search"):
                unpruned = self._map(current, "val")
                work = self._prune if step.verb == "prune" else self._search
                current = work(number, self._settings(step, dense, current), current)
                pruned = self._map(current, "val")
            else:
                settings = self._settings(step, dense, current)
                current = self._train(f"{number}_train", current, self._epochs(step), settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        with new_file(self._final, replace=True) as temporary:
            shutil.copyfile(current, temporary)
        figures = self._figures(dense, current)
        return {
            "cell": dataclasses.asdict(self.cell),
            "figures": {**figures, "unpruned": unpruned, "pruned": pruned},
            "curves": self.curves,
            "stages": self.stages,
            "seconds": round(time.perf_counter() - started),
            "machine": dataclasses.asdict(
                describe_machine({package: version(package) for package in ("torch", "ultralytics", "yolo-prune")})
            ),
        }

    @property
    def _final(self) -> Path:
        return self.folder / "final.pt"

    def final(self) -> Path:
        """Return what the recipe made; it is made again where the folder was thrown away."""
        if not self._final.is_file():
            self.run()
        return self._final

    def dense(self) -> Path:
        """Train the dense model that all recipes of a seed start from, once."""
        cell = self.cell
        return self._train(cell.base, Path(self.config.model), cell.dense_epochs, {}, project=Path(self.config.out))

    def _epochs(self, step: Step) -> int:
        """Return the epochs of a step; the last training has what the others leave."""
        trainings = [one for one in RECIPES[self.cell.recipe] if one.verb == "train"]
        if step is trainings[-1]:
            return self.cell.epochs - sum(self._epochs(one) * one.nets for one in trainings[:-1])
        return max(1, round(step.share * self.cell.epochs / step.nets))

    def _settings(self, step: Step, dense: Path, current: Path) -> dict[str, Any]:
        """Return the settings of a step. Budgets are fractions of the dense model's MACs, whatever is cut by now."""
        budget = self.cell.budget * _macs(dense, self.cell.imgsz_px) / _macs(current, self.cell.imgsz_px)
        settings = dict(step.settings(self._epochs(step), budget))
        if settings.get("distill") == "dense":
            settings["distill"] = str(dense)
        if settings.get("data") == "data":
            settings["data"] = self.config.data
        return settings

    def _train(
        self, name: str, model: Path, epochs: int, settings: Mapping[str, Any], *, project: Path | None = None
    ) -> Path:
        """Train as a step says."""
        folder = (project or self.folder) / name
        stock = {**TRAINING, "epochs": epochs, "imgsz": self.cell.imgsz_px, "seed": self.cell.seed}
        stock |= {"batch": self.cell.batch, "workers": self.config.workers, "device": self.config.device}
        best = train_in(folder, model, Path(self.config.data), {**stock, "verbose": False, **settings})
        self.curves[name] = _curve(folder)
        self.stages.append(
            {"train": name, "epochs": epochs, **_plain(settings), **_sparsity(folder), **_forgetting(folder)}
        )
        return best

    def _rewrite(self, number: int, step: Step, model: Path) -> Path:
        """Write an equal network in another form."""
        out, settings = self.folder / f"{number}_rewritten_{sha256(model)[:8]}.pt", step.settings(0, self.cell.budget)
        if not out.is_file():
            rewrite(RewriteConfig(model=str(model), out=str(out), imgsz=self.cell.imgsz_px, **settings))
        self.stages.append({"rewrite": out.stem, **settings})
        return out

    def _search(self, number: int, settings: Mapping[str, Any], model: Path) -> Path:
        """Search for the best plan, and apply it."""
        folder = self.folder / f"{number}_search_{sha256(model)[:8]}"
        how = {key: value for key, value in settings.items() if key != "recalibrate"}
        found = search(
            SearchConfig(
                model=str(model), data=self.config.data, out=str(folder), imgsz=self.cell.imgsz_px,
                seed=self.cell.seed, device=self.config.device, **how,
            )
        )  # fmt: skip
        out = folder / "slim.pt"
        if not out.is_file():
            fresh = {"recalibrate": settings["recalibrate"], "data": self.config.data, "imgsz": self.cell.imgsz_px}
            prune(PruneConfig(model=str(model), out=str(out), plan=str(found.path), **fresh))
        scores = [line["score"] for line in found.lines]
        self.stages.append({"search": len(scores), "best": max(scores), **_plain(settings)})
        return out

    def _prune(self, number: int, settings: Mapping[str, Any], model: Path) -> Path:
        # Named by what it was made from: a training that was repeated makes another slim model.
        out = self.folder / f"{number}_slim_{sha256(model)[:8]}.pt"
        if not out.is_file():
            prune(PruneConfig(model=str(model), out=str(out), imgsz=self.cell.imgsz_px, **settings))
        self.stages.append({"prune": out.stem, **_plain(settings)})
        return out

    def _map(self, model: Path, split: str) -> float:
        """Return mAP50-95 on a split."""
        config = self.config
        found = evaluate(
            model, data=Path(config.data), split=split, imgsz_px=config.imgsz, batch=config.batch,
            workers=config.workers,
        )  # fmt: skip
        return found.map50_95

    def _figures(self, dense: Path, final: Path) -> dict[str, Any]:
        """Return the costs of the final model and its mAP50-95."""
        model = read_checkpoint(final).model
        graph, before = trace_model(model), _macs(dense, self.cell.imgsz_px)
        macs = float(graph.cost.macs(graph.widths(), imgsz_px=self.cell.imgsz_px))
        stripes = getattr(model, MARKER, {}).get("stripes")
        return {
            "macs": round(macs),
            "macs_kept": macs / before,
            **({"stripe_macs_kept": stripes["macs"] / before} if stripes else {}),
            "params": int(graph.cost.params(graph.widths())),
            "val": self._map(final, "val"),
            "test": self._map(final, "test"),
            **self._before_conversion(final),
        }

    def _before_conversion(self, final: Path) -> dict[str, dict[str, float]]:
        """Return mAP50-95 of the network that still had its compactors, where the recipe trained some."""
        compactors = final.with_name("compactors.pt")
        if not compactors.is_file():
            return {}
        return {"before_conversion": {split: self._map_unfused(compactors, split) for split in ("val", "test")}}

    def _map_unfused(self, model: Path, split: str) -> float:
        """Return mAP50-95 of a network as it is: the host would fuse a norm past the compactor behind it."""
        yolo: Any = YOLO(str(model))
        yolo.model.fuse = lambda *_args, **_options: yolo.model
        with tempfile.TemporaryDirectory() as scratch:
            found = yolo.val(
                data=self.config.data, split=split, imgsz=self.config.imgsz, batch=self.config.batch,
                workers=self.config.workers, plots=False, verbose=False, project=scratch, name="val",
            )  # fmt: skip
        return float(found.box.map)


def _macs(checkpoint: Path, imgsz_px: int) -> float:
    """Return the MACs of a checkpoint's network."""
    graph = trace_model(read_checkpoint(checkpoint).model)
    return float(graph.cost.macs(graph.widths(), imgsz_px=imgsz_px))


def _curve(folder: Path) -> list[float]:
    """Return mAP50-95 on val after each epoch, as the host wrote it down; of several networks, the best one's."""
    grafted = grafting_record(folder)
    results = folder / (grafted["best"] if grafted and grafted["nets"] else "") / "results.csv"
    with results.open(newline="", encoding="utf-8") as stream:
        rows = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(stream)]
    return [round(float(row["metrics/mAP50-95(B)"]), 4) for row in rows]


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without the folders of this machine."""
    return {key: Path(value).name if key in ("distill", "data") else value for key, value in settings.items()}


def _forgetting(folder: Path) -> dict[str, Any]:
    """Return with what compactors were made to forget."""
    path = folder / "resrep.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return {key: record[key] for key in ("strength", "momentum")}


def _sparsity(folder: Path) -> dict[str, Any]:
    """Return how sparse a sparsity training made the scales, epoch by epoch."""
    path = folder / "sparsity.json"
    if not path.is_file():
        return {}
    epochs = json.loads(path.read_text(encoding="utf-8"))["epochs"]
    return {key: [float(f"{epoch[key]:.4g}") for epoch in epochs] for key in ("silent", "strength", "macs")}


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    sys.exit(script(summary, RecipesConfig, lambda config: execute(bench, config)))
