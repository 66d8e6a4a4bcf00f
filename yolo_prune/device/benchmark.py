"""How fast artefacts are: timed in turns on the same machine, forward passes and the whole way from image to boxes.

"Faster" is said only where the interquartile intervals are apart; see `SpeedUp`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import MappingProxyType
from typing import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from yolo_prune.device import image_to_boxes
from yolo_prune.device.benchmark_record import BenchmarkEntry, BenchmarkReport
from yolo_prune.device.conditions import Watch
from yolo_prune.device.image_to_boxes import ImageToBoxes
from yolo_prune.device.images import synthetic_images, to_input
from yolo_prune.device.machine import describe_machine
from yolo_prune.device.memory import peak_memory
from yolo_prune.device.runtimes import Array, Chooser, Session, runtime_for
from yolo_prune.device.runtimes.base import require_batch
from yolo_prune.device.timings import time_in_turns
from yolo_prune.errors import ConfigError

Image = NDArray[np.uint8]
_BY_DEFAULT: Mapping[str, Sequence[str]] = MappingProxyType({})


def benchmark(
    artefacts: Mapping[str, Path],
    *,
    imgsz_px: int,
    threads: int,
    runs: int = 100,
    warmup: int = 10,
    batch: int = 1,
    variants: Mapping[str, Sequence[str]] = _BY_DEFAULT,
    image: Image | None = None,
    memory: bool = False,
    runtime_for: Chooser = runtime_for,
) -> BenchmarkReport:
    """Time artefacts in turns.

    Forward passes come first: one batch of drawn images, raw outputs, neither pre- nor post-processing. Then, where an
    image is given, rounds of the whole way follow: letterbox, forward, suppression.

    Args:
        artefacts: What `runtime_for` accepts, by the name that the report shall use.
        imgsz_px: Side of the square input that all of them were exported for.
        threads: CPU threads of every runtime; torch's own count is restored afterwards.
        runs: Timed rounds.
        warmup: Untimed rounds before them.
        batch: Images in a call.
        variants: How to run an artefact, by its name; those that are not in it run by default.
        image: 8-bit image (H, W, 3), BGR, for the whole way; None leaves that out.
        memory: Also load and run each artefact in a process of its own, before all timing, for its peak memory.
        runtime_for: Chooses what runs an artefact.

    Raises:
        ConfigError: A number is out of range, or an artefact is missing, damaged, or made for another input size or
            batch, or cannot run in its variant here.
        MissingDependencyError: A runtime is not installed.
    """
    if not artefacts:
        raise ConfigError("no artefacts", expected="at least one")
    require_measurable(threads=threads, runs=runs, warmup=warmup, batch=batch)
    words = {name: tuple(variants.get(name, ())) for name in artefacts}
    runtimes = {name: runtime_for(path, variant=words[name]) for name, path in artefacts.items()}
    peaks = {
        name: peak_memory(
            path, imgsz_px=imgsz_px, threads=threads, batch=batch, variant=words[name], chooser=runtime_for
        )
        for name, path in artefacts.items()
        if memory
    }
    with contextlib.ExitStack() as stack:
        sessions = {
            name: stack.enter_context(runtime.load(artefacts[name], imgsz_px=imgsz_px, threads=threads))
            for name, runtime in runtimes.items()
        }
        for name, session in sessions.items():
            require_batch(session, artefacts[name], batch)
        watch = Watch()
        forward_ms = _time_forward(sessions, _inputs(imgsz_px, batch), runs, warmup, watch)
        whole = _time_whole(sessions, [image] * batch, imgsz_px, runs, warmup, watch) if image is not None else {}
        conditions = watch.conditions()
    return BenchmarkReport(
        imgsz_px=imgsz_px,
        threads=threads,
        runs=runs,
        warmup=warmup,
        machine=describe_machine({runtime.name: runtime.version() for runtime in runtimes.values()}),
        entries=tuple(
            BenchmarkEntry(
                name=name,
                backend=runtimes[name].name,
                latencies_ms=forward_ms[name],
                size_bytes=size_on_disk(path),
                memory=peaks.get(name),
                image_to_boxes=whole.get(name),
            )
            for name, path in artefacts.items()
        ),
        batch=batch,
        conditions=conditions,
    )


def _inputs(imgsz_px: int, batch: int) -> Array:
    """Draw what forward passes are timed with."""
    return np.concatenate([to_input(image, imgsz_px) for image in synthetic_images(batch, imgsz_px)])


def _time_forward(
    sessions: Mapping[str, Session], inputs: Array, runs: int, warmup: int, watch: Watch
) -> dict[str, tuple[float, ...]]:
    """Return the latencies of forward passes."""
    contenders = {name: [session] for name, session in sessions.items()}
    times = time_in_turns(contenders, inputs, runs=runs, warmup=warmup, after_round=watch.look)
    return {name: tuple(whole for (whole,) in rounds) for name, rounds in times.items()}


def _time_whole(
    sessions: Mapping[str, Session], images: Sequence[Image], imgsz_px: int, runs: int, warmup: int, watch: Watch
) -> dict[str, ImageToBoxes]:
    """Return the times of the whole way."""
    contenders = {name: image_to_boxes.stages(session, imgsz_px) for name, session in sessions.items()}
    times = time_in_turns(contenders, images, runs=runs, warmup=warmup, after_round=watch.look)
    return {name: ImageToBoxes(*map(tuple, zip(*rounds))) for name, rounds in times.items()}


def require_measurable(*, threads: int, runs: int, warmup: int = 0, batch: int = 1) -> None:
    """Refuse numbers that measure nothing.

    Raises:
        ConfigError: One of them is too small.
    """
    for name, value, least in (("threads", threads, 1), ("runs", runs, 1), ("warmup", warmup, 0), ("batch", batch, 1)):
        if value < least:
            raise ConfigError(f"{name}={value}", expected=f"at least {least}")


def size_on_disk(artefact: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [artefact] if artefact.is_file() else [file for file in artefact.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
