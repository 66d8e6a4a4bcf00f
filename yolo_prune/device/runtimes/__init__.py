"""What runs an artefact: one file a runtime, one protocol for all."""

from __future__ import annotations

from yolo_prune.device.runtimes.base import Array, Runtime, Session
from yolo_prune.device.runtimes.ncnn_runtime import NcnnRuntime
from yolo_prune.device.runtimes.onnx_runtime import OnnxRuntime
from yolo_prune.device.runtimes.openvino_runtime import OpenVinoRuntime
from yolo_prune.device.runtimes.select import RUNTIMES, runtime_for
from yolo_prune.device.runtimes.tensorrt_runtime import TensorRtRuntime
from yolo_prune.device.runtimes.variants import Chooser, split_variant

__all__ = [
    "RUNTIMES",
    "Array",
    "Chooser",
    "NcnnRuntime",
    "OnnxRuntime",
    "OpenVinoRuntime",
    "Runtime",
    "Session",
    "TensorRtRuntime",
    "runtime_for",
    "split_variant",
]
