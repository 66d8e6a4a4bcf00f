"""Which runtime runs which artefact, the checkpoint itself among them."""

from __future__ import annotations

from pathlib import Path

from yolo_prune.device import runtimes
from yolo_prune.device.runtimes import Runtime
from yolo_prune.export.pytorch_runtime import PyTorchRuntime


def runtime_for(artefact: Path, *, full_precision: bool = False) -> Runtime:
    """Choose by what the artefact is: a `.pt` file, or else see `device.runtimes.runtime_for`.

    Args:
        artefact: The artefact, which must exist.
        full_precision: Compute in float32 where the runtime would choose half precision by itself.

    Raises:
        ConfigError: Nothing stands there, or it is none of these.
    """
    if artefact.is_file() and artefact.suffix == ".pt":
        return PyTorchRuntime()
    return runtimes.runtime_for(artefact, full_precision=full_precision)
