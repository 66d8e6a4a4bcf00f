"""What a latency was measured on: enough to judge it, nothing that names a person, a host or a folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """The machine and the software of a measurement.

    Attributes:
        cpu: Model of the CPU or of the board.
        cores: CPU cores that this process may use.
        system: Operating system and instruction set.
        python: Python's version.
        runtimes: Version of every runtime that took part, by backend.
    """

    cpu: str
    cores: int
    system: str
    python: str
    runtimes: Mapping[str, str]


def describe_machine(runtimes: Mapping[str, str]) -> Machine:
    """Describe this machine; `runtimes` maps backends to versions."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return Machine(
        cpu=_cpu_model(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        runtimes=dict(runtimes),
    )


def _cpu_model() -> str:
    """Return the CPU's name; ARM kernels tell the board's in the device tree instead."""
    board = Path("/proc/device-tree/model")
    if board.is_file():
        return board.read_text(encoding="utf-8").strip("\0\n ")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
