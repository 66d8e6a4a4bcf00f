"""Slim networks timed beside the dense one: whole artefacts, in turns, on one backend."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.device.benchmark import benchmark
from yolo_prune.device.machine import Machine, describe_machine
from yolo_prune.device.runtimes import RUNTIMES
from yolo_prune.export.profile import Timed
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.hosts.ultralytics.checkpoints import write_slim
from yolo_prune.hosts.ultralytics.surgery import slim_copy
from yolo_prune.pipeline.artefacts import BACKENDS, export_one
from yolo_prune.plan import plan_from_keep

DENSE, SLIM = "dense", "slim"


class Beside:
    """Times networks of one checkpoint; made by `timing_beside`.

    Args:
        source: The dense checkpoint.
        graph: Its channel graph.
        folder: For artefacts.
        backend: One of `BACKENDS`.
        imgsz_px: Side of the square input.
        threads: Of the runtime.
        runs: Timed rounds.
    """

    def __init__(
        self,
        source: Checkpoint,
        graph: ChannelGraph,
        folder: Path,
        *,
        backend: str,
        imgsz_px: int,
        threads: int,
        runs: int,
    ) -> None:
        self._source, self._graph, self._folder = source, graph, folder
        self._backend, self._imgsz_px, self._threads, self._runs = backend, imgsz_px, threads, runs
        dense = folder / f"{DENSE}.pt"
        shutil.copyfile(source.path, dense)
        self._dense = export_one(dense, folder, BACKENDS[backend], imgsz_px=imgsz_px)

    def time(self, keep: BoolArray) -> Timed:
        """Cut, export and time a network; the artefact does not stay."""
        graph, source = self._graph, self._source
        plan = plan_from_keep(graph, keep, source_sha256=source.sha256, imgsz_px=self._imgsz_px, choice={})
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            slim = Path(folder, f"{SLIM}.pt")
            write_slim(slim, slim_copy(source.model, graph, keep), source, plan, dtype=torch.float32)
            artefact = export_one(slim, Path(folder), BACKENDS[self._backend], imgsz_px=self._imgsz_px)
            report = benchmark(
                {DENSE: self._dense, SLIM: artefact}, imgsz_px=self._imgsz_px, threads=self._threads, runs=self._runs
            )
        return Timed.between(report.entry(SLIM), report.entry(DENSE))


@contextlib.contextmanager
def timing_beside(
    source: Checkpoint, graph: ChannelGraph, *, backend: str, imgsz_px: int, threads: int, runs: int
) -> Iterator[Beside]:
    """Yield what times networks of a checkpoint; its artefacts vanish at the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield Beside(source, graph, Path(folder), backend=backend, imgsz_px=imgsz_px, threads=threads, runs=runs)


def this_machine(backend: str) -> Machine:
    """Return what timings on a backend are made with.

    Raises:
        MissingDependencyError: Its runtime is not installed.
    """
    return describe_machine({backend: RUNTIMES[backend].version()})
