"""How much memory an artefact takes: a fresh process loads and runs it, and says how high it stood.

`python -m yolo_prune.device.memory` is that process. Only resident memory of the process counts; what a driver holds on
a GPU of its own does not.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

import yolo_prune
from yolo_prune.device.runtimes import Chooser, runtime_for
from yolo_prune.device.runtimes.base import require_batch
from yolo_prune.errors import ConfigError, YoloPruneError

_RUNS = 3  # the first one allocates, the second may still grow an arena
_REFUSED = 3  # exit code of the process; Python's own are 1 and 2
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class PeakMemory:
    """Resident memory of a process that loads and runs one artefact.

    Attributes:
        idle_bytes: With the runtime imported and nothing loaded.
        peak_bytes: The high-water mark from there on.
    """

    idle_bytes: int
    peak_bytes: int

    @property
    def artefact_bytes(self) -> int:
        """What loading and running added at the worst moment."""
        return self.peak_bytes - self.idle_bytes


def peak_memory(
    artefact: Path,
    *,
    imgsz_px: int,
    threads: int,
    batch: int = 1,
    variant: Sequence[str] = (),
    chooser: Chooser = runtime_for,
) -> PeakMemory | None:
    """Load and run an artefact in a process of its own; None where the system does not tell (other than Linux).

    Args:
        artefact: The artefact.
        imgsz_px: Side of the square input.
        threads: CPU threads.
        batch: Images in a call.
        variant: How its runtime shall run it.
        chooser: Chooses what runs it; found again in the new process by its name.

    Raises:
        ConfigError: The artefact cannot be run, as its runtime said in the process, or the process died.
    """
    if not _STATUS.is_file():
        return None
    job = {
        "chooser": [chooser.__module__, chooser.__qualname__],  # type: ignore[attr-defined]  # it is a function
        "artefact": str(artefact.resolve()),
        "imgsz_px": imgsz_px,
        "threads": threads,
        "batch": batch,
        "variant": list(variant),
    }
    done = subprocess.run(
        [sys.executable, "-B", "-m", __name__, json.dumps(job)],  # a bundle holds no file that it does not list
        cwd=str(Path(yolo_prune.__file__).resolve().parents[1]),  # where this very package is found
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        raise _failed(artefact, done)
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))  # runtimes may have spoken before


def _failed(artefact: Path, done: subprocess.CompletedProcess[str]) -> ConfigError:
    """Return the error for a process that did not end well."""
    if done.returncode == _REFUSED:
        return ConfigError(**json.loads(done.stdout.splitlines()[-1]))
    said = done.stderr.strip().splitlines()
    how = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return ConfigError(
        f"a process that only loads and runs '{artefact}' died ({how}): {said[-1] if said else 'it said nothing'}",
        expected="a process that comes to its end, as it does with enough memory",
        remedy="free memory, or leave this measurement out: memory=false",
    )


def _measure(job: Mapping[str, Any]) -> PeakMemory:
    """Do the job of the fresh process."""
    module, name = job["chooser"]
    chooser: Chooser = getattr(importlib.import_module(module), name)
    artefact, side = Path(job["artefact"]), job["imgsz_px"]
    runtime = chooser(artefact, variant=job["variant"])
    runtime.version()  # imports the runtime
    images = np.zeros((job["batch"], 3, side, side), np.float32)
    _forget_peak()
    idle_bytes = _resident("VmRSS")
    with runtime.load(artefact, imgsz_px=side, threads=job["threads"]) as session:
        require_batch(session, artefact, job["batch"])
        for _ in range(_RUNS):
            session(images)
    return PeakMemory(idle_bytes=idle_bytes, peak_bytes=_resident("VmHWM"))


def _forget_peak() -> None:
    """Set the high-water mark to what is resident now; a kernel that refuses leaves the mark of the imports."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _resident(key: str) -> int:
    """Return an entry of `/proc/self/status`, which is in KiB, in bytes."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_measure(json.loads(sys.argv[1])))))
    except YoloPruneError as error:
        print(json.dumps({"found": error.found, "expected": error.expected, "remedy": error.remedy}))
        sys.exit(_REFUSED)
    except Exception as error:  # whatever a runtime raises: on one line, which is all that is shown of it
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
