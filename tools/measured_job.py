"""One measurement, in a process of its own: seconds and peak memory of a job, within limits. Linux only.

Whoever measures calls `answer` with its way of doing the job; the process reads a `Job` and prints an outcome, both as
JSON. Jobs of `bench_engine.py` are warmed alike: each does its work once on `tiny_network` first.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn

Outcome: TypeAlias = dict[str, Any]
"""Figures by name; or `failure`, a few words, with its `detail`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures.

    Attributes:
        model: Yaml name of the host, no suffix.
        threads: Threads of torch.
        limit_s: Seconds that the job may take.
        limit_gb: Data that the process may hold.
        split: Whether C2f is split first; of no meaning to yolo_prune.
    """

    model: str
    threads: int
    limit_s: float
    limit_gb: float
    split: bool = False


AJob = TypeVar("AJob", bound=Job)


class Meter:
    """Measures what runs inside a `with`, and ends the process if it takes too long.

    Attributes:
        figures: Seconds, peak resident memory above its level at the start, and the peak itself, afterwards.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.figures: Outcome = {}

    def __enter__(self) -> Meter:
        resource.setrlimit(resource.RLIMIT_DATA, (int(self.job.limit_gb * 1e9),) * 2)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed earlier counts for nobody
        with contextlib.suppress(PermissionError):  # then the peak includes what ran before
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._level_mb = resident_mb("VmRSS")
        signal.signal(signal.SIGALRM, self._give_up)
        signal.setitimer(signal.ITIMER_REAL, self.job.limit_s)
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self._started
        signal.setitimer(signal.ITIMER_REAL, 0)
        peak_mb = resident_mb("VmHWM")
        self.figures = {"seconds": seconds, "above_mb": peak_mb - self._level_mb, "peak_mb": peak_mb}

    def _give_up(self, *_: object) -> None:
        """End the process: an exception might be caught by what is measured."""
        say({"failure": f"not finished in {self.job.limit_s:g} s", "detail": f"{resident_mb('VmHWM') / 1e3:.1f} GB"})
        os._exit(0)


def resident_mb(key: str) -> float:
    """Return resident memory of this process: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024 / 1e6


def tiny_network() -> nn.Module:
    """Return the smallest network with something to prune: what is loaded on first use is loaded on it."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 8, 1)).eval()


def say(outcome: Outcome) -> None:
    """Print an outcome for the process that waits for it."""
    print(json.dumps(outcome), flush=True)


def answer(measure: Callable[[AJob], Outcome], kind: type[AJob]) -> None:
    """Read this process's job, do it and print what came of it, be it a failure.

    Args:
        measure: Does a job.
        kind: Of the job.
    """
    job = kind(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    try:
        say(measure(job))
    except MemoryError:
        say({"failure": f"more than {job.limit_gb:g} GB", "detail": "stopped there"})
    except Exception as error:  # whatever fails is a row of the table
        say({"failure": f"fails: {type(error).__name__}", "detail": str(error).partition("\n")[0]})


def outcome_of(script: Path, job: Job) -> Outcome:
    """Do a job in a new process of a script that ends in `answer`."""
    command = [sys.executable, str(script), json.dumps(dataclasses.asdict(job))]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [""])[-1]
        return {"failure": f"fails: exit code {process.returncode}", "detail": last}
    outcome: Outcome = json.loads(process.stdout.strip().splitlines()[-1])
    return outcome
