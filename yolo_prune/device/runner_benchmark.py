"""`run.py benchmark`: how long the artefacts take on this device, timed in turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_prune.device.benchmark import benchmark, require_measurable
from yolo_prune.device.benchmark_record import BenchmarkReport
from yolo_prune.device.benchmark_rows import forward_rows, heading, to_boxes_rows
from yolo_prune.device.bundle import Bundle
from yolo_prune.device.columns import columns
from yolo_prune.device.image_to_boxes import drawn_image, stages
from yolo_prune.device.memory import peak_memory
from yolo_prune.device.options import option
from yolo_prune.device.runner_artefacts import (
    DoesNotRunError,
    Here,
    NoRuntimeError,
    artefacts_here,
    failures_of,
    split_by_runtime,
)
from yolo_prune.device.runtimes import runtime_for
from yolo_prune.files import refuse_existing, write_json


@dataclass
class BenchmarkOptions:
    """Settings of `benchmark`."""

    threads: int = option(2, help="CPU threads of each runtime")
    runs: int = option(100, help="timed runs of each artefact, interleaved")
    warmup: int = option(10, help="untimed runs of each artefact before")
    out: str = option("", help="folder with engines that `build` made; default: 'built' in the bundle")
    json: str = option("", help="also write every timing to this JSON file; must not exist")


def benchmark_here(bundle: Bundle, options: BenchmarkOptions) -> None:
    """Time every artefact that can be run here, and print a table, then why each of the others was not timed.

    Raises:
        ConfigError: A number is out of range.
        DoesNotRunError: An artefact is damaged or cannot be run; the others were timed.
        MissingDependencyError: No runtime is installed.
        OutputError: The JSON file exists or cannot be written.
    """
    if options.json:
        refuse_existing(Path(options.json))
    require_measurable(threads=options.threads, runs=options.runs, warmup=options.warmup)
    imgsz_px, threads = bundle.network.imgsz_px, options.threads
    artefacts = artefacts_here(bundle, options.out)
    damaged = failures_of(artefacts, lambda here: _require_intact(bundle, here))
    able, unable = split_by_runtime([here for here in artefacts if here.name not in damaged])
    if not able and not damaged:
        raise NoRuntimeError([problem for _, problem in unable], bundle)
    failures = {**damaged, **failures_of(able, lambda here: _run_once(here.path, imgsz_px, threads))}
    timed = {here.name: here.path for here in able if here.name not in failures}
    if timed:
        report = benchmark(
            timed,
            imgsz_px=imgsz_px,
            threads=threads,
            runs=options.runs,
            warmup=options.warmup,
            image=drawn_image(),
            memory=True,
        )
        if options.json:
            write_json(Path(options.json), report.to_json())
        print(_tables(report), end="")
    for here, problem in unable:
        print(f"not timed: {here.name}: {problem}")
    for name, failure in failures.items():
        print(f"not timed: {name}: {failure.found}")
    if failures:
        raise DoesNotRunError(f"{', '.join(failures)}: not timed, see above")


def _require_intact(bundle: Bundle, here: Here) -> None:
    """Hold what the bundle brought against its checksums; an engine that was built here has none."""
    if here.part is not None:
        bundle.require_intact(here.part)


def _run_once(artefact: Path, imgsz_px: int, threads: int) -> None:
    """Take an artefact the whole way: first in a process of its own, since one that crashes would end this one."""
    peak_memory(artefact, imgsz_px=imgsz_px, threads=threads)
    with runtime_for(artefact).load(artefact, imgsz_px=imgsz_px, threads=threads) as session:
        value: Any = [drawn_image()]
        for stage in stages(session, imgsz_px):
            value = stage(value)


def _tables(report: BenchmarkReport) -> str:
    """Return the machine, forward passes, then the whole way from image to boxes."""
    machine = report.machine
    text = f"{machine.cpu}, {machine.system}, Python {machine.python}\n{heading(report)}"
    for rows in (forward_rows(report), to_boxes_rows(report)):
        if rows is not None:
            text += f"\n{rows.title}\n{columns(rows.columns, rows.cells)}"
    return text
