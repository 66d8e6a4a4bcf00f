"""Which runtime runs which exported artefact. A new runtime is a file beside this one and a row of `RUNTIMES`."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, Sequence

from yolo_prune.device.runtimes.base import ArtefactRuntime, Runtime
from yolo_prune.device.runtimes.ncnn_runtime import NcnnRuntime
from yolo_prune.device.runtimes.onnx_runtime import OnnxRuntime
from yolo_prune.device.runtimes.openvino_runtime import OpenVinoRuntime
from yolo_prune.device.runtimes.tensorrt_runtime import TensorRtRuntime
from yolo_prune.errors import ConfigError

RUNTIMES: Mapping[str, ArtefactRuntime] = {
    runtime.name: runtime for runtime in (OnnxRuntime(), NcnnRuntime(), OpenVinoRuntime(), TensorRtRuntime())
}
"""What runs exported artefacts, by the name of the backend."""


def runtime_for(artefact: Path, *, full_precision: bool = False, variant: Sequence[str] = ()) -> Runtime:
    """Choose by what the artefact is: an `.onnx` or `.engine` file, or a folder with a `.param` or `.xml` file.

    Args:
        artefact: The artefact, which must exist.
        full_precision: Compute in float32 where the runtime would choose half precision by itself.
        variant: How it shall run where there are several ways; see `split_variant`.

    Raises:
        ConfigError: Nothing stands there, it is none of these, or the runtime does not know the variant.
    """
    for runtime in RUNTIMES.values():
        if runtime.accepts(artefact):
            return runtime.of(variant, full_precision=full_precision)
    raise ConfigError(
        f"artefact '{artefact}' {'is of no known kind' if artefact.exists() else 'does not exist'}",
        expected="an .onnx or .engine file, or a folder with a .param (NCNN) or .xml file (OpenVINO)",
        remedy="check the path",
    )
