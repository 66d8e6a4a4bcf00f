"""ONNX files with a detector's interface and next to no work, for tests of what runs and times artefacts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE_PX = 32
CLASSES = 2
_CELLS = 16  # 4 x 4


def tiny_onnx(
    path: Path, *, batch: int | str = 1, half: bool = False, ballast_bytes: int = 0, notes: bool = True
) -> Path:
    """Write a pooling and a 1 x 1 convolution: (B, 3, 32, 32) -> (B, 6, 16), noted as the host notes its exports."""
    random = np.random.default_rng(0)
    number, element = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    weight = random.standard_normal((4 + CLASSES, 3, 1, 1)).astype(number)
    ballast = random.standard_normal(max(ballast_bytes // 4, 1)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["images"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Conv", ["pooled", "weight"], ["cells"]),
        helper.make_node("Reshape", ["cells", "shape"], ["output0"]),
        helper.make_node("Identity", ["ballast"], ["output1"]),
    ]
    constants = {"weight": weight, "shape": np.array([0, 4 + CLASSES, _CELLS], np.int64), "ballast": ballast}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", element, [batch, 3, SIDE_PX, SIDE_PX])],
        [
            helper.make_tensor_value_info("output0", element, [batch, 4 + CLASSES, _CELLS]),
            helper.make_tensor_value_info("output1", TensorProto.FLOAT, [ballast.size]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    names = {number: f"class {number}" for number in range(CLASSES)}
    if notes:
        helper.set_model_props(model, {"imgsz": str([SIDE_PX, SIDE_PX]), "names": str(names), "end2end": "False"})
    onnx.save(model, path)
    return path
