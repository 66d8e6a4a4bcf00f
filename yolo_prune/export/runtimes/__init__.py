"""What runs an artefact: one file a runtime, one protocol for all."""

from yolo_prune.export.runtimes.base import Array, Runtime, Session
from yolo_prune.export.runtimes.ncnn_runtime import NcnnRuntime
from yolo_prune.export.runtimes.onnx_runtime import OnnxRuntime
from yolo_prune.export.runtimes.openvino_runtime import OpenVinoRuntime
from yolo_prune.export.runtimes.pytorch_runtime import PyTorchRuntime
from yolo_prune.export.runtimes.select import runtime_for

RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (OnnxRuntime(), NcnnRuntime(), OpenVinoRuntime())}
"""What runs exported artefacts, by the name of the backend."""

__all__ = [
    "RUNTIMES",
    "Array",
    "NcnnRuntime",
    "OnnxRuntime",
    "OpenVinoRuntime",
    "PyTorchRuntime",
    "Runtime",
    "Session",
    "runtime_for",
]
