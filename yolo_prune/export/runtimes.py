"""Which runtime runs which artefact, the checkpoint itself among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yolo_prune.device import runtimes
from yolo_prune.device.runtimes import Runtime


def runtime_for(artefact: Path, *, full_precision: bool = False, variant: Sequence[str] = ()) -> Runtime:
    """Choose by what the artefact is: a `.pt` file, or else see `device.runtimes.runtime_for`.

    Args:
        artefact: The artefact, which must exist.
        full_precision: Compute in float32 where the runtime would choose half precision by itself.
        variant: How it shall run where there are several ways; see `split_variant`.

    Raises:
        ConfigError: Nothing stands there, or it is none of these, or the runtime does not know the variant.
    """
    if artefact.is_file() and artefact.suffix == ".pt":
        # Only here: a process that measures an ONNX file's memory should not hold torch and the host.
        from yolo_prune.export.pytorch_runtime import PyTorchRuntime

        return PyTorchRuntime.of(variant)
    return runtimes.runtime_for(artefact, full_precision=full_precision, variant=variant)
