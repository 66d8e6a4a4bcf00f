"""Slim networks timed beside the dense one: whole artefacts, in turns, on one backend."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.device.benchmark import benchmark
from yolo_prune.device.conditions import gpu_names
from yolo_prune.device.machine import Machine, describe_machine
from yolo_prune.device.runtimes import RUNTIMES
from yolo_prune.export.profile import Target, Timed
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.hosts.ultralytics.checkpoints import write_slim
from yolo_prune.hosts.ultralytics.surgery import slim_copy
from yolo_prune.pipeline.artefacts import FORMAT_OF, EngineSettings, Variant, export_one
from yolo_prune.plan import plan_from_keep

DENSE, SLIM = "dense", "slim"


class Beside:
    """Times networks of one checkpoint; made by `timing_beside`.

    Args:
        source: The dense checkpoint.
        graph: Its channel graph.
        folder: For artefacts.
        target: What the artefacts are, and what runs them.
        runs: Timed rounds.
    """

    def __init__(
        self,
        source: Checkpoint,
        graph: ChannelGraph,
        folder: Path,
        target: Target,
        *,
        runs: int,
    ) -> None:
        self._source, self._graph, self._folder, self._target, self._runs = source, graph, folder, target, runs
        self._variant = Variant(
            format=FORMAT_OF[target.backend], precision=target.precision, imgsz_px=target.imgsz_px,
            engine=EngineSettings(timing_cache=folder / "timing.cache"),  # most layers are those of the network before
        )  # fmt: skip
        dense = folder / f"{DENSE}.pt"
        shutil.copyfile(source.path, dense)
        self._dense = export_one(dense, folder, self._variant)

    def time(self, keep: BoolArray) -> Timed:
        """Cut, export and time a network; the artefact does not stay."""
        graph, source, target = self._graph, self._source, self._target
        plan = plan_from_keep(graph, keep, source_sha256=source.sha256, imgsz_px=target.imgsz_px, choice={})
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            slim = Path(folder, f"{SLIM}.pt")
            write_slim(slim, slim_copy(source.model, graph, keep), source, plan, dtype=torch.float32)
            artefact = export_one(slim, Path(folder), self._variant)
            report = benchmark(
                {DENSE: self._dense, SLIM: artefact}, imgsz_px=target.imgsz_px, threads=target.threads, runs=self._runs
            )
        return Timed.between(report.entry(SLIM), report.entry(DENSE))


@contextlib.contextmanager
def timing_beside(source: Checkpoint, graph: ChannelGraph, target: Target, *, runs: int) -> Iterator[Beside]:
    """Yield what times networks of a checkpoint; its artefacts vanish at the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield Beside(source, graph, Path(folder), target, runs=runs)


def this_machine(backend: str) -> Machine:
    """Return what timings on a backend are made with; an engine's machine is its GPU.

    Raises:
        MissingDependencyError: Its runtime is not installed.
    """
    machine = describe_machine({backend: RUNTIMES[backend].version()})
    gpus = ", ".join(gpu_names(Path("/"))) if backend == "tensorrt" else ""
    return replace(machine, cpu=f"{machine.cpu}, {gpus}") if gpus else machine
