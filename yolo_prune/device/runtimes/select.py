"""Which runtime runs which exported artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from yolo_prune.device.runtimes.base import Runtime
from yolo_prune.device.runtimes.ncnn_runtime import NcnnRuntime
from yolo_prune.device.runtimes.onnx_runtime import OnnxRuntime
from yolo_prune.device.runtimes.openvino_runtime import OpenVinoRuntime
from yolo_prune.device.runtimes.tensorrt_runtime import TensorRtRuntime
from yolo_prune.device.runtimes.variants import require_words
from yolo_prune.errors import ConfigError


def runtime_for(artefact: Path, *, full_precision: bool = False, variant: Sequence[str] = ()) -> Runtime:
    """Choose by what the artefact is: an `.onnx` or `.engine` file, or a folder with a `.param` or `.xml` file.

    Args:
        artefact: The artefact, which must exist.
        full_precision: See `NcnnRuntime` and `OpenVinoRuntime`; ONNX Runtime computes in float32 anyway, and
            an engine in what it was built for.
        variant: How it shall run where there are several ways; see `split_variant`.

    Raises:
        ConfigError: Nothing stands there, it is none of these, or the runtime does not know the variant.
    """
    if artefact.is_file() and artefact.suffix == ".onnx":
        return OnnxRuntime.of(variant)
    if artefact.is_file() and artefact.suffix == ".engine":
        require_words(variant, (), backend="tensorrt")
        return TensorRtRuntime()
    if artefact.is_dir() and any(artefact.glob("*.param")):
        return NcnnRuntime.of(variant, full_precision=full_precision)
    if artefact.is_dir() and any(artefact.glob("*.xml")):
        return OpenVinoRuntime.of(variant, full_precision=full_precision)
    raise ConfigError(
        f"artefact '{artefact}' {'is of no known kind' if artefact.exists() else 'does not exist'}",
        expected="an .onnx or .engine file, or a folder with a .param (NCNN) or .xml file (OpenVINO)",
        remedy="check the path",
    )
