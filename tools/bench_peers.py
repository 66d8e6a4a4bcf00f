"""Peers side by side: the same dense checkpoint, epochs and data, pruned by Torch-Pruning, by slimming, and by us.

python tools/bench_peers.py data=bccd/data.yaml model=yolov8n_coco.pt budgets=[0.7,0.5,0.3] seeds=[0] epochs=30

Needs `pip install -e ".[bench,export]"`. A cell is a peer at a budget, with a seed; each is a line of the record, which
is only ever appended to, and a folder in `out`. `yolo_prune` is our recipe, pruning in steps while it trains;
`yolo_prune_direct` is one cut by magnitude, as the peers make one, and the same training. A peer that fails is a line
that says how. With epochs=0 nothing is trained: what is left right after the cut, as it is and with batch norms
recalibrated, alike for all. Latencies are measured last, all peers of a budget in turns with the dense model; leave the
machine alone meanwhile.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # Torch-Pruning's networks are of foreign classes; nothing else is read but our own files
    os.environ["ULTRALYTICS_SAFE_LOAD"] = "0"

import dataclasses
import importlib.util
import json
import math
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cells import data_name, run_missing
from experiments import TRAINING, Experiment, ExperimentsConfig
from measured_job import outcome_of
from peer_cut import CutJob
from peer_figures import ORDER, PeerFigures
from peers import PeerError, finetune, sparsity_training, strength_for, user_lines
from races import DENSE, Race, race, record_of_races
from recipes import OFTEN, RECIPES, SPARSE
from ultralytics import YOLO

from yolo_prune.cli import execute, script
from yolo_prune.configuration import require_choice, require_least, setting
from yolo_prune.device.machine import describe_machine
from yolo_prune.errors import MissingDependencyError
from yolo_prune.files import new_file
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.collection import TrainingImages, recalibrate_on
from yolo_prune.hosts.ultralytics.evaluation import evaluate, image_files, require_split
from yolo_prune.pipeline.artefacts import FORMAT_OF, SUFFIXES
from yolo_prune.pipeline.train import train_in
from yolo_prune.surgery import counted_macs

HERE = Path(__file__).resolve().parent
RECORD = HERE / "records" / "peers.jsonl"
OURS, DIRECT = "yolo_prune", "yolo_prune_direct"

THEIRS = {"torch_pruning": ("torch-pruning",)}
"""Packages that a peer needs."""

MOMENTUM = 0.937
"""The host's default, with which all train."""

LIMIT_S, LIMIT_GB = 1800.0, 16.0
"""Longest that a cut may take, and most that it may hold."""


@dataclasses.dataclass(kw_only=True)
class PeersConfig(ExperimentsConfig):
    """Settings of the benchmark."""

    out: str = setting("runs/peers", help="folder of the cells")
    peers: list[str] = setting([*ORDER], help="who prunes; dense is the start, whatever the budget")
    imgsz: int = setting(320, help="image side", unit="px")
    backends: list[str] = setting(["onnxruntime", "ncnn", "openvino"], help="what runs the artefacts; none: no timing")
    record: str = setting(str(RECORD), help="record that finished cells are appended to")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(Experiment):
    """One peer in an experiment."""

    peer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerRace(Race, Experiment):
    """All peers of an experiment on one backend."""


class Laboratory:
    """Runs the cells of one experiment; every step leaves files, so that a killed cell goes on."""

    def __init__(self, config: PeersConfig, experiment: Experiment) -> None:
        self.config, self.experiment = config, experiment
        one = experiment
        self.base = Path(config.out, one.base)
        self.folder = Path(config.out, f"{one.base}-{one.budget:g}-{one.epochs}")
        self.data = Path(config.data).absolute()

    def dense(self) -> Path:
        """Return the dense checkpoint that all peers of a seed start from, trained once."""
        if not self.experiment.dense_epochs:
            return Path(self.config.model)
        settings = {**self._training(self.experiment.dense_epochs), "nbs": 64}  # the host's, as in bench_recipes.py
        return train_in(self.base, Path(self.config.model), self.data, settings)

    def final(self, peer: str) -> Path:
        """Return what a peer made of it, trained as long as the others.

        Raises:
            PeerError: It cannot.
        """
        if peer == DENSE:
            return self.dense()
        out = self.folder / f"{peer}.pt"
        if not out.is_file():
            out.parent.mkdir(parents=True, exist_ok=True)
            made = {"torch_pruning": self._theirs, "slimming": self._forks}.get(peer, self._ours)(peer, self.dense())
            with new_file(out) as temporary:
                shutil.copyfile(made, temporary)
        return out

    def run(self, cell: Cell) -> dict[str, Any]:
        """Return the line of a cell.

        Raises:
            PeerError: The peer cannot do it.
        """
        started = time.perf_counter()
        final = self.final(cell.peer)
        network: Any = YOLO(str(final)).model.float()
        macs, dense_macs = (self._macs(model) for model in (network, YOLO(str(self.dense())).model.float()))
        figures = {
            "macs_kept": macs / dense_macs,
            "params": sum(parameter.numel() for parameter in network.parameters()),
            **{split: self._map(final, split) for split in self._splits()},
            **self._tool(cell.peer),
            "user_lines": user_lines(cell.peer),
        }
        if not self.experiment.epochs:
            figures["recalibrated"] = self._map(self._recalibrated(final), "val")
        return {
            "cell": dataclasses.asdict(cell),
            "figures": figures,
            "seconds": round(time.perf_counter() - started),
            "machine": dataclasses.asdict(
                describe_machine({name: version(name) for name in ("torch", "ultralytics", *THEIRS.get(cell.peer, ()))})
            ),
        }

    def checkpoints(self) -> dict[str, Path]:
        """Return the final checkpoints that are there, by peer."""
        known = {peer: self.folder / f"{peer}.pt" for peer in self.config.peers}
        return {DENSE: self.dense(), **{peer: path for peer, path in known.items() if path.is_file()}}

    def _ours(self, peer: str, dense: Path) -> Path:
        epochs, budget = self.experiment.epochs, self.experiment.budget
        direct = {"allocation": "uniform"}
        if not epochs and peer == OURS:
            return self._cut(peer, dense, {**direct, "criterion": "taylor", "data": str(self.data)})
        cut = self._cut(peer, dense, direct)  # where pruning is part of the training, to be measured alone
        if not epochs or peer == DIRECT:
            return train_in(self.folder / peer, cut, self.data, self._training(epochs)) if epochs else cut
        (step,) = RECIPES["gradual_taylor"]
        settings = {**self._training(epochs), **step.settings(epochs, budget)}
        return train_in(self.folder / peer, dense, self.data, settings)

    def _theirs(self, peer: str, dense: Path) -> Path:
        cut = self._cut(peer, dense, {})
        if not self.experiment.epochs:
            return cut
        network = torch.load(cut, weights_only=False)["model"].float()
        try:
            return finetune(network, dense, **self._stock(peer, self.experiment.epochs))
        except Exception as error:  # whatever fails is a row of the table
            raise PeerError(f"its network does not train: {type(error).__name__}: {error}") from error

    def _forks(self, peer: str, dense: Path) -> Path:
        epochs = self.experiment.epochs
        if not epochs:
            return self._cut(peer, dense, {})
        first = round(SPARSE * epochs)
        steps = first * math.ceil(len(image_files(self.data, "train")) / self.experiment.batch)
        strength = strength_for(dense, lr0=TRAINING["lr0"], momentum=MOMENTUM, steps=steps)
        sparse = sparsity_training(dense, strength=strength, **self._stock(f"{peer}_sparse", first))
        cut = self._cut(peer, sparse, {})
        return train_in(self.folder / peer, cut, self.data, self._training(epochs - first))

    def _cut(self, peer: str, start: Path, settings: dict[str, Any]) -> Path:
        """Cut in a process of its own, which is measured.

        Raises:
            PeerError: It failed, or did not finish.
        """
        one, out = self.experiment, self.folder / f"{peer}_cut.pt"
        out.unlink(missing_ok=True)  # of another start, or of a cut that was killed
        found = outcome_of(
            HERE / "peer_cut.py",
            CutJob(
                model=one.model, threads=torch.get_num_threads(), limit_s=LIMIT_S, limit_gb=LIMIT_GB, peer=peer,
                start=str(start.absolute()), out=str(out.absolute()), budget=one.budget, imgsz_px=one.imgsz_px,
                settings=settings,
            ),
        )  # fmt: skip
        if "failure" in found:
            raise PeerError(f"{found['failure']}: {found['detail']}")
        self._measured(peer).write_text(json.dumps(found), encoding="utf-8")
        return out

    def _measured(self, peer: str) -> Path:
        return self.folder / f"{peer}_cut.json"

    def _tool(self, peer: str) -> dict[str, float]:
        """Return seconds and memory of a peer's cut; nothing for the dense one."""
        if peer == DENSE:
            return {}
        found = json.loads(self._measured(peer).read_text(encoding="utf-8"))
        return {"tool_s": found["seconds"], "tool_mb": found["above_mb"]}

    def _recalibrated(self, checkpoint: Path) -> Path:
        """Write a copy whose batch norms were measured anew, as EagleEye does; for all peers alike."""
        network: Any = YOLO(str(checkpoint)).model.float()
        images = TrainingImages(
            data=self.data, imgsz_px=self.experiment.imgsz_px, batches=100, batch=self.experiment.batch,
            workers=self.config.workers, device="cpu",
        )  # fmt: skip
        recalibrate_on(network, images)
        out = self.folder / f"{checkpoint.stem}_recalibrated.pt"
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": network.half(), "train_args": {}}, out)
        return out

    def _training(self, epochs: int) -> dict[str, Any]:
        one = self.experiment
        more = {"epochs": epochs, "imgsz": one.imgsz_px, "seed": one.seed, "batch": one.batch, "verbose": False}
        return {**TRAINING, **OFTEN, **more, "workers": self.config.workers}

    def _stock(self, name: str, epochs: int) -> dict[str, Any]:
        place = {"project": str(self.folder.absolute()), "name": name, "exist_ok": True}
        return {**self._training(epochs), **place, "data": str(self.data)}

    def _splits(self) -> tuple[str, ...]:
        return ("val", "test") if self.experiment.epochs else ("val",)

    def _map(self, model: Path, split: str) -> float:
        one = self.experiment
        found = evaluate(model, data=self.data, split=split, imgsz_px=one.imgsz_px, workers=self.config.workers)
        return found.map50_95

    def _macs(self, network: Any) -> int:
        side = self.experiment.imgsz_px
        return counted_macs(network.fuse(verbose=False), torch.zeros(1, 3, side, side))

    def race(self, one: Race) -> dict[str, Any]:
        """Time the artefacts of all peers beside the dense one, in turns."""
        return race(one, self.checkpoints(), self._export, runs=self.config.runs)

    def _export(self, checkpoint: Path, folder: Path, backend: str) -> Path:
        """Export with the host alone, which takes foreign classes as well."""
        copy = folder / "model.pt"
        copy.write_bytes(checkpoint.read_bytes())
        YOLO(str(copy)).export(format=FORMAT_OF[backend], imgsz=self.experiment.imgsz_px)
        return folder / f"model{SUFFIXES[FORMAT_OF[backend]]}"


def bench(config: PeersConfig) -> PeerFigures:
    """Run every cell that the record lacks, then the races.

    Raises:
        YoloPruneError: A peer is not installed, or settings and data that cannot be.
    """
    for peer in config.peers:
        require_choice("peer", peer, ORDER)
    if "torch_pruning" in config.peers and importlib.util.find_spec("torch_pruning") is None:
        raise MissingDependencyError("torch-pruning", extra="bench", purpose="prune with it")
    for backend in config.backends:
        require_choice("backend", backend, FORMAT_OF)
    require_least(config, epochs=0, dense_epochs=0)
    for split in ("train", "val", "test") if config.epochs else ("train", "val"):
        require_split(Path(config.data), split)
    read_checkpoint(Path(config.model))
    experiments = [
        Experiment(
            budget=budget, seed=seed, data=data_name(config.data), model=Path(config.model).stem,
            imgsz_px=config.imgsz, batch=config.batch, dense_epochs=config.dense_epochs, epochs=config.epochs,
        )
        for seed in config.seeds
        for budget in config.budgets
    ]  # fmt: skip
    cells = [
        Cell(**dataclasses.asdict(dataclasses.replace(one, budget=1.0) if peer == DENSE else one), peer=peer)
        for one in experiments
        for peer in config.peers
    ]
    record = Path(config.record)
    lines = run_missing(record, cells, lambda cell: _laboratory(config, cell).run(cell), cannot_be=(PeerError,))
    races = [
        PeerRace(**dataclasses.asdict(one), backend=backend, threads=config.threads, runners=runners)
        for one in experiments
        if (runners := tuple(_laboratory(config, one).checkpoints()))
        for backend in config.backends
    ]
    timed = run_missing(record_of_races(record), races, lambda one: _laboratory(config, one).race(one))
    return PeerFigures(records=lines, races=timed)


def _laboratory(config: PeersConfig, one: Experiment) -> Laboratory:
    shared = {field.name: getattr(one, field.name) for field in dataclasses.fields(Experiment)}
    return Laboratory(config, Experiment(**shared))


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    sys.exit(script(summary, PeersConfig, lambda config: execute(bench, config)))
