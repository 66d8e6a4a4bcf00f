"""Peers side by side: the same dense checkpoint, epochs and data, pruned by Torch-Pruning, by slimming, and by us.

python tools/bench_peers.py data=bccd/data.yaml model=yolov8n_coco.pt budgets=[0.7,0.5,0.3] seeds=[0] epochs=30

Needs `pip install -e ".[bench,export]"`. A cell is a peer at a budget, with a seed; each is a line of the record, which
is only ever appended to, and a folder in `out`. With epochs=0 nothing is trained: what is left right after the cut.
Latencies are measured last, all peers of a budget in turns with the dense model; leave the machine alone meanwhile.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_recipes import TRAINING
from cells import run_missing
from measured_job import Job, Meter
from peer_figures import PeerFigures
from peers import finetune, slimming, sparsity_training, torch_pruning, user_lines
from recipes import OFTEN, SPARSE
from ultralytics import YOLO

from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, require_choice, require_least, setting
from yolo_prune.device.benchmark import benchmark
from yolo_prune.device.machine import describe_machine
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import evaluate, require_split
from yolo_prune.pipeline.artefacts import BACKENDS, SUFFIXES
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.pipeline.train import train_in
from yolo_prune.surgery import counted_macs

RECORD = Path(__file__).resolve().parent / "records" / "peers.jsonl"
LATENCIES = "_latency.jsonl"
"""How the record of the latencies ends, beside the other one."""

OURS = {"prune_every": 2, "prune_steps": 5, "criterion": "taylor", "allocation": "uniform"}
"""What `configs/gradual.yaml` adds to a training."""


@dataclasses.dataclass(kw_only=True)
class PeersConfig:
    """Settings of the benchmark."""

    data: str = setting(help="data yaml with train, val and test")
    model: str = setting(help="checkpoint that the dense training starts from")
    out: str = setting("runs/peers", help="folder of the cells")
    peers: list[str] = setting(["yolo_prune", "torch_pruning", "slimming"], help="who prunes")
    budgets: list[float] = setting([0.5], help="fractions of the MACs that are kept")
    seeds: list[int] = setting([0], help="seeds of all trainings")
    epochs: int = setting(30, help="epochs of each peer, after the dense training", unit="epochs")
    dense_epochs: int = setting(30, help="epochs of the dense training", unit="epochs")
    imgsz: int = setting(320, help="image side", unit="px")
    batch: int = setting(16, help="batch size", unit="images")
    workers: int = setting(2, help="loader processes")
    backends: list[str] = setting(["onnxruntime", "ncnn", "openvino"], help="what runs the artefacts; none: no timing")
    threads: int = setting(2, help="threads of the runtimes")
    runs: int = setting(100, help="timed rounds")
    record: str = setting(str(RECORD), help="record that finished cells are appended to")
    json: str | None = json_setting("the cells of the record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all peers share."""

    budget: float
    seed: int
    data: str
    model: str
    imgsz_px: int
    batch: int
    dense_epochs: int
    epochs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(Experiment):
    """One peer in an experiment."""

    peer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Race(Experiment):
    """All peers of an experiment on one backend."""

    peers: tuple[str, ...]
    backend: str
    threads: int


class Laboratory:
    """Runs the cells of one experiment; every step leaves files, so that a killed cell goes on."""

    def __init__(self, config: PeersConfig, experiment: Experiment) -> None:
        self.config, self.experiment = config, experiment
        one = experiment
        base = f"{one.model}-{one.data}-{one.imgsz_px}px-batch{one.batch}-dense{one.dense_epochs}-seed{one.seed}"
        self.base = Path(config.out, base)
        self.folder = Path(config.out, f"{base}-{one.budget:g}-{one.epochs}")
        self.data = Path(config.data).absolute()
        self._tool: dict[str, float] = {}

    def dense(self) -> Path:
        """Return the dense checkpoint that all peers of a seed start from, trained once."""
        if not self.experiment.dense_epochs:
            return Path(self.config.model)
        return train_in(self.base, Path(self.config.model), self.data, self._training(self.experiment.dense_epochs))

    def slim(self, peer: str) -> Path:
        """Return what a peer made of it, trained as long as the others."""
        return self._whole(
            peer, {"yolo_prune": self._ours, "torch_pruning": self._theirs, "slimming": self._forks}[peer]
        )

    def run(self, cell: Cell) -> dict[str, Any]:
        """Return the line of a cell."""
        started = time.perf_counter()
        final = self.slim(cell.peer)
        network: Any = YOLO(str(final)).model.float()
        macs, dense_macs = (self._macs(model) for model in (network, YOLO(str(self.dense())).model.float()))
        return {
            "cell": dataclasses.asdict(cell),
            "figures": {
                "macs_kept": macs / dense_macs,
                "params": sum(parameter.numel() for parameter in network.parameters()),
                **{split: self._map(final, split) for split in self._splits()},
                **self._tool,
                "user_lines": 1 if cell.peer == "yolo_prune" else user_lines(cell.peer),
            },
            "seconds": round(time.perf_counter() - started),
            "machine": dataclasses.asdict(
                describe_machine({name: version(name) for name in ("torch", "torch-pruning")})
            ),
        }

    def race(self, race: Race) -> dict[str, Any]:
        """Time the artefacts of all peers beside the dense one, in turns."""
        checkpoints = {"dense": self.dense(), **{peer: self.slim(peer) for peer in race.peers}}
        with tempfile.TemporaryDirectory() as name:
            artefacts = {peer: self._export(path, Path(name, peer), race.backend) for peer, path in checkpoints.items()}
            report = benchmark(artefacts, imgsz_px=race.imgsz_px, threads=race.threads, runs=self.config.runs)
        compared = {peer: report.speed_up(peer, "dense") for peer in race.peers}
        return {
            "cell": dataclasses.asdict(race),
            "dense_ms": report.entry("dense").summary.median_ms,
            "speed_ups": {peer: {"ratio": one.ratio, "p25": one.p25, "p75": one.p75} for peer, one in compared.items()},
            "machine": dataclasses.asdict(report.machine),
        }

    def _whole(self, peer: str, work: Callable[[Path], Path]) -> Path:
        """Do a peer's work once."""
        out = self.folder / f"{peer}.pt"
        if not out.is_file():
            out.parent.mkdir(parents=True, exist_ok=True)
            made = work(self.dense())
            temporary = out.with_suffix(".part")
            temporary.write_bytes(made.read_bytes())
            temporary.replace(out)
        return out

    def _ours(self, dense: Path) -> Path:
        epochs, budget = self.experiment.epochs, self.experiment.budget
        if epochs:  # pruning is part of the training; what is metered is the same cut in one step
            once = PruneConfig(
                model=str(dense), out=str(self.folder / "metered.pt"), target_macs=budget, allocation="uniform",
                imgsz=self.experiment.imgsz_px,
            )  # fmt: skip
            Path(once.out).unlink(missing_ok=True)
            self._metered(lambda: prune(once))
            return train_in(
                self.folder / "yolo_prune", dense, self.data, {**self._training(epochs), **OURS, "target_macs": budget}
            )
        out = self.folder / "yolo_prune_cut.pt"
        settings = PruneConfig(
            model=str(dense), out=str(out), target_macs=budget, imgsz=self.experiment.imgsz_px, criterion="taylor",
            data=str(self.data), recalibrate=100,
        )  # fmt: skip
        if not out.is_file():
            self._metered(lambda: prune(settings))
        return out

    def _theirs(self, dense: Path) -> Path:
        network = self._metered(lambda: torch_pruning(dense, self.experiment.budget, self.experiment.imgsz_px))
        if self.experiment.epochs:
            return finetune(network, dense, **self._stock("torch_pruning", self.experiment.epochs))
        out = self.folder / "torch_pruning_cut.pt"
        torch.save({"model": network.half(), "train_args": {}}, out)
        return out

    def _forks(self, dense: Path) -> Path:
        epochs = self.experiment.epochs
        first = round(SPARSE * epochs)
        sparse = sparsity_training(dense, **self._stock("slimming_sparse", first)) if epochs else dense
        out = self.folder / "slimming_cut.pt"
        out.unlink(missing_ok=True)  # of an earlier sparsity training
        self._metered(lambda: slimming(sparse, self.experiment.budget, self.experiment.imgsz_px, out))
        return train_in(self.folder / "slimming", out, self.data, self._training(epochs - first)) if epochs else out

    def _training(self, epochs: int) -> dict[str, Any]:
        one = self.experiment
        more = {"epochs": epochs, "imgsz": one.imgsz_px, "seed": one.seed, "batch": one.batch, "verbose": False}
        return {**TRAINING, **OFTEN, **more, "workers": self.config.workers}

    def _stock(self, name: str, epochs: int) -> dict[str, Any]:
        place = {"project": str(self.folder.absolute()), "name": name, "exist_ok": True}
        return {**self._training(epochs), **place, "data": str(self.data)}

    def _metered(self, work: Callable[[], Any]) -> Any:
        """Do what a tool does, and keep its seconds and memory."""
        with Meter(
            Job(model=self.experiment.model, threads=torch.get_num_threads(), limit_s=3600, limit_gb=64)
        ) as meter:
            result = work()
        self._tool = {"tool_s": meter.figures["seconds"], "tool_mb": meter.figures["above_mb"]}
        return result

    def _splits(self) -> tuple[str, ...]:
        return ("val", "test") if self.experiment.epochs else ("val",)

    def _map(self, model: Path, split: str) -> float:
        one = self.experiment
        found = evaluate(model, data=self.data, split=split, imgsz_px=one.imgsz_px, workers=self.config.workers)
        return found.map50_95

    def _macs(self, network: Any) -> int:
        side = self.experiment.imgsz_px
        return counted_macs(network.fuse(verbose=False), torch.zeros(1, 3, side, side))

    def _export(self, checkpoint: Path, folder: Path, backend: str) -> Path:
        """Export with the host alone, which takes foreign classes as well."""
        folder.mkdir()
        copy = folder / "model.pt"
        copy.write_bytes(checkpoint.read_bytes())
        YOLO(str(copy)).export(format=BACKENDS[backend], imgsz=self.experiment.imgsz_px)
        return folder / f"model{SUFFIXES[BACKENDS[backend]]}"


def bench(config: PeersConfig) -> PeerFigures:
    """Run every cell that the record lacks, then the races."""
    for peer in config.peers:
        require_choice("peer", peer, ("yolo_prune", "torch_pruning", "slimming"))
    for backend in config.backends:
        require_choice("backend", backend, BACKENDS)
    require_least(config, epochs=0, dense_epochs=0)
    for split in ("train", "val", "test") if config.epochs else ("train", "val"):
        require_split(Path(config.data), split)
    read_checkpoint(Path(config.model))
    experiments = [
        Experiment(
            budget=budget, seed=seed, data=Path(config.data).resolve().parent.name, model=Path(config.model).stem,
            imgsz_px=config.imgsz, batch=config.batch, dense_epochs=config.dense_epochs, epochs=config.epochs,
        )
        for seed in config.seeds
        for budget in config.budgets
    ]  # fmt: skip
    cells = [Cell(**dataclasses.asdict(one), peer=peer) for one in experiments for peer in config.peers]
    races = [
        Race(**dataclasses.asdict(one), peers=tuple(config.peers), backend=backend, threads=config.threads)
        for one in experiments
        for backend in config.backends
    ]
    record = Path(config.record)
    lines = run_missing(record, cells, lambda cell: _laboratory(config, cell).run(cell))
    timed = run_missing(
        record.with_name(record.stem + LATENCIES), races, lambda race: _laboratory(config, race).race(race)
    )
    return PeerFigures(records=lines, races=timed)


def _laboratory(config: PeersConfig, one: Experiment) -> Laboratory:
    shared = {field.name: getattr(one, field.name) for field in dataclasses.fields(Experiment)}
    return Laboratory(config, Experiment(**shared))


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    sys.exit(script(summary, PeersConfig, lambda config: execute(bench, config)))
