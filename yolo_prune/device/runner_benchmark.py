"""`run.py benchmark`: how long the artefacts take on this device, timed in turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from yolo_prune.device.benchmark import benchmark, require_measurable
from yolo_prune.device.benchmark_record import BenchmarkReport
from yolo_prune.device.benchmark_rows import forward_rows, heading, to_boxes_rows
from yolo_prune.device.bundle import Bundle
from yolo_prune.device.columns import columns
from yolo_prune.device.image_to_boxes import drawn_image
from yolo_prune.device.options import option
from yolo_prune.device.runner_artefacts import Here, NoRuntimeError, artefacts_here, split_by_runtime
from yolo_prune.device.runtimes import runtime_for
from yolo_prune.errors import YoloPruneError
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
    """Time every artefact that can be loaded here, and print a table.

    Raises:
        ConfigError: A number is out of range, or an artefact is damaged; the others were timed.
        MissingDependencyError: No runtime is installed.
        OutputError: The JSON file exists or cannot be written.
    """
    if options.json:
        refuse_existing(Path(options.json))
    require_measurable(threads=options.threads, runs=options.runs, warmup=options.warmup)
    able, unable = split_by_runtime(artefacts_here(bundle, options.out))
    if not able:
        raise NoRuntimeError([problem for _, problem in unable], bundle)
    failures = _failures(able, bundle.network.imgsz_px, options.threads)
    if len(failures) == len(able):
        raise next(iter(failures.values()))
    report = benchmark(
        {here.name: here.path for here in able if here.name not in failures},
        imgsz_px=bundle.network.imgsz_px,
        threads=options.threads,
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
        raise next(iter(failures.values()))


def _failures(artefacts: Sequence[Here], imgsz_px: int, threads: int) -> dict[str, YoloPruneError]:
    """Return why artefacts cannot be loaded, such as an engine of another TensorRT: they must not stop the others."""
    failures: dict[str, YoloPruneError] = {}
    for here in artefacts:
        try:
            with runtime_for(here.path).load(here.path, imgsz_px=imgsz_px, threads=threads):
                pass
        except YoloPruneError as error:
            failures[here.name] = error
    return failures


def _tables(report: BenchmarkReport) -> str:
    """Return the machine, forward passes, then the whole way from image to boxes."""
    machine = report.machine
    text = f"{machine.cpu}, {machine.system}, Python {machine.python}\n{heading(report)}"
    for rows in (forward_rows(report), to_boxes_rows(report)):
        if rows is not None:
            text += f"\n{rows.title}\n{columns(rows.columns, rows.cells)}"
    return text
