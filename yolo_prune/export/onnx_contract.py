"""What TensorRT takes of ONNX, checked before it is asked: it is slow to refuse, and absent where bundles are made.

Sources: `docs/operators.md` of github.com/onnx/onnx-tensorrt at its branches 8.6-GA and 10.1-GA, the importers of
quantization there, and the opset guide of TensorRT 11.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.tensorrt_library import Version
from yolo_prune.device.tensorrt_recipe import EngineOptions
from yolo_prune.errors import ConfigError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

OPERATORS = frozenset([
    "Add", "And", "ArgMax", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "DequantizeLinear", "Div", "Equal", "Erf", "Exp", "Expand",
    "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gemm", "GlobalAveragePool", "Greater", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Less", "MatMul", "Max", "MaxPool", "Min", "Mod", "Mul", "Neg", "Not",
    "PRelu", "Pad", "Pow", "QuantizeLinear", "Range", "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape",
    "Resize", "ScatterND", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Softplus", "Split", "Sqrt", "Squeeze",
    "Sub", "Tanh", "Tile", "TopK", "Transpose", "Unsqueeze", "Where",
])  # fmt: skip
"""Operators that exports of YOLO can contain and every version since 8.6 knows; others are refused, not guessed."""

_OLDEST_OPSET = 9
_NEWEST_OPSET = {8: 17, 9: 19, 10: 20, 11: 25}
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1}  # where a scale per channel lies in the weight
_RESIZE = {
    "mode": {"nearest", "linear"},
    "coordinate_transformation_mode": {
        "half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners",
    },
    "nearest_mode": {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"},
}  # fmt: skip
_TYPES = {"FLOAT", "FLOAT16", "INT8", "INT32", "INT64", "BOOL"}
_MOST_TOP_K = 3840
_SPARSE_GROUP, _SPARSE_ZEROS = 4, 2
_SHOWN = 8


def require_contract(onnx: Path, version: Version, options: EngineOptions) -> None:
    """Refuse an ONNX file that TensorRT would refuse.

    Args:
        onnx: The file.
        version: Of TensorRT.
        options: What is asked of the engine.

    Raises:
        ConfigError: It breaks a rule; the message lists every breach.
    """
    import onnx as package

    found = breaches(package.load(onnx), version, options)
    if found:
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise ConfigError(
            f"ONNX file '{onnx}' is not for TensorRT {version}:\n    " + "\n    ".join([*found[:_SHOWN], *more]),
            expected="a graph that TensorRT can read",
            remedy="export the checkpoint with yolo-prune, format=engine or bundle",
        )


def breaches(model: ModelProto, version: Version, options: EngineOptions) -> list[str]:
    """Return every breach of a rule, one sentence each; none for a graph that TensorRT takes."""
    subject = _Subject(model, version, options)
    return [sentence for rule in _RULES for sentence in rule(subject)]


def sparse_convolutions(model: ModelProto) -> tuple[list[str], list[str]]:
    """Tell which convolutions could run on sparse units.

    Returns:
        Names of the weights that are 2:4 sparse (among each four neighbours along the input channels two are zero), and
        of all weights of ungrouped convolutions whose input channels are a multiple of four.
    """
    subject = _Subject(model, Version(11, 0), EngineOptions())
    eligible = {
        weight: values
        for node in subject.nodes("Conv")
        if subject.attribute(node, "group", 1) == 1
        for weight, values in [subject.weight(node)]
        if values is not None and values.shape[1] % _SPARSE_GROUP == 0
    }
    return [weight for weight, values in eligible.items() if _is_sparse(values)], list(eligible)


@dataclass(frozen=True)
class _Subject:
    """A model under judgement."""

    model: ModelProto
    version: Version
    options: EngineOptions

    @property
    def graph(self) -> GraphProto:
        return self.model.graph

    @cached_property
    def constants(self) -> dict[str, NDArray[Any]]:
        """Values of weights and constants by name."""
        from onnx import numpy_helper

        values = {item.name: numpy_helper.to_array(item) for item in self.graph.initializer}
        for node in self.nodes("Constant"):
            for item in node.attribute:
                if item.name == "value":
                    values[node.output[0]] = numpy_helper.to_array(item.t)
        return values

    @cached_property
    def producers(self) -> dict[str, NodeProto]:
        """Node by the name of what it makes."""
        return {name: node for node in self.graph.node for name in node.output}

    def nodes(self, *operators: str) -> Iterator[NodeProto]:
        """Yield the nodes of some operators."""
        return (node for node in self.graph.node if node.op_type in operators)

    def attribute(self, node: NodeProto, name: str, default: Any) -> Any:
        """Return an attribute's value."""
        from onnx import helper

        return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)

    def weight(self, node: NodeProto) -> tuple[str, NDArray[Any] | None]:
        """Return the name and values of a node's weight, through its quantization."""
        name = node.input[1] if len(node.input) > 1 else ""
        while name in self.producers and self.producers[name].op_type in ("QuantizeLinear", "DequantizeLinear"):
            name = self.producers[name].input[0]
        return name, self.constants.get(name)


def _opset(subject: _Subject) -> Iterator[str]:
    newest = _NEWEST_OPSET.get(subject.version.major, max(_NEWEST_OPSET.values()))
    for item in subject.model.opset_import:
        if item.domain in ("", "ai.onnx") and not _OLDEST_OPSET <= item.version <= newest:
            yield f"opset {item.version}, where {_OLDEST_OPSET} to {newest} are known"


def _operators(subject: _Subject) -> Iterator[str]:
    for node in subject.graph.node:
        if node.domain not in ("", "ai.onnx"):
            yield f"node '{node.name}' is of domain {node.domain}"
        elif node.op_type not in OPERATORS:
            yield f"node '{node.name}': operator {node.op_type} is not among those that are known to work"


def _types(subject: _Subject) -> Iterator[str]:
    from onnx import TensorProto

    for item in subject.graph.initializer:
        name = TensorProto.DataType.Name(item.data_type)
        if name not in _TYPES:
            yield f"'{item.name}' is of type {name}"
    for node in subject.nodes("Cast"):
        if subject.attribute(node, "to", 0) == TensorProto.DOUBLE:
            yield f"node '{node.name}' casts to DOUBLE"
    for node in subject.nodes(*_WEIGHTED):
        name, values = subject.weight(node)
        if values is not None and values.dtype.kind in "iu" and values.dtype != np.int8:
            yield f"weight '{name}' is of type {values.dtype}"


def _ends(subject: _Subject) -> Iterator[str]:
    """One input, float32 images; float32 outputs; what is open must be in the range that the engine is made for."""
    from onnx import TensorProto

    for item in [*subject.graph.input, *subject.graph.output]:
        if item.type.tensor_type.elem_type != TensorProto.FLOAT:
            yield f"'{item.name}' is of type {TensorProto.DataType.Name(item.type.tensor_type.elem_type)}, not FLOAT"
    inputs = [_shape(item) for item in subject.graph.input]
    if len(inputs) != 1 or len(inputs[0]) != 4 or inputs[0][1] != 3:
        yield f"inputs {inputs}, not one of images (B, 3, H, W)"
        return
    batch, _, height, width = inputs[0]
    if batch < 0 and subject.options.batch is None:
        yield "the batch size is open, and no range is given"
    if min(height, width) < 0 and subject.options.imgsz_px is None:
        yield "the image side is open, and none is given"


def _quantization(subject: _Subject) -> Iterator[str]:
    """Symmetric int8 with constant scales; weights by channel; no quantized biases."""
    for node in subject.nodes("QuantizeLinear", "DequantizeLinear"):
        yield from _scale(subject, node)
        yield from _zero_point(subject, node)
    for node in subject.nodes("Conv", "ConvTranspose"):
        if len(node.input) > 2 and node.input[2] not in subject.constants:
            yield f"bias of node '{node.name}' is not a constant in floating point"
        quantizer = subject.producers.get(node.input[1])
        if quantizer is not None and quantizer.op_type == "DequantizeLinear":
            yield from _weight_axis(subject, node, quantizer)
    for node in subject.nodes("DequantizeLinear"):
        if subject.version.major < 10 and node.input[0] in subject.constants:
            yield f"node '{node.name}' reads int8 weights: before TensorRT 10 QuantizeLinear has to make them"


def _scale(subject: _Subject, node: NodeProto) -> Iterator[str]:
    scale = subject.constants.get(node.input[1])
    if scale is None:
        yield f"scale of node '{node.name}' is not a constant"
    elif not (np.isfinite(scale).all() and (scale > 0).all()):
        yield f"scale of node '{node.name}' is not positive"
    elif scale.dtype != np.float32 and subject.version.major < 10:
        yield f"scale of node '{node.name}' is of type {scale.dtype}, not float32"


def _zero_point(subject: _Subject, node: NodeProto) -> Iterator[str]:
    if len(node.input) < 3 or not node.input[2]:
        yield f"node '{node.name}' has no zero point: ONNX takes it for uint8 then"
        return
    zero = subject.constants.get(node.input[2])
    if zero is None or zero.dtype != np.int8 or zero.any():
        yield f"zero point of node '{node.name}' is not a constant int8 of 0: quantization has to be symmetric"


def _weight_axis(subject: _Subject, node: NodeProto, quantizer: NodeProto) -> Iterator[str]:
    scale, axis = subject.constants.get(quantizer.input[1]), subject.attribute(quantizer, "axis", 1)
    if scale is not None and scale.size > 1 and axis != _OUTPUT_AXIS[node.op_type]:
        yield f"scales of node '{node.name}' lie along axis {axis} of its weight, not along its output channels"


def _resizing(subject: _Subject) -> Iterator[str]:
    for node in subject.nodes("Resize"):
        for name, known in _RESIZE.items():
            value = subject.attribute(node, name, None)
            if value is not None and value.decode() not in known:
                yield f"node '{node.name}': {name} '{value.decode()}'"


def _pooling(subject: _Subject) -> Iterator[str]:
    for node in subject.nodes("MaxPool"):
        if len(node.output) > 1 and node.output[1]:
            yield f"node '{node.name}' returns indices"
    for node in subject.nodes("Conv", "ConvTranspose", "MaxPool", "AveragePool"):
        if len(subject.attribute(node, "kernel_shape", [0, 0])) != 2:
            yield f"node '{node.name}' is not two-dimensional"


def _selection(subject: _Subject) -> Iterator[str]:
    for node in subject.nodes("TopK"):
        count = subject.constants.get(node.input[1])
        if count is None and subject.version.major < 10:
            yield f"node '{node.name}': its k is not a constant"
        if count is not None and int(count.max()) > _MOST_TOP_K:
            yield f"node '{node.name}' selects {int(count.max())}, where {_MOST_TOP_K} are the most"


def _sparsity(subject: _Subject) -> Iterator[str]:
    if subject.options.sparse:
        found, eligible = sparse_convolutions(subject.model)
        if not found:
            yield f"sparse units asked for, but none of {len(eligible)} convolutions is 2:4 sparse"


def _is_sparse(values: NDArray[Any]) -> bool:
    """Tell whether two of each four neighbours along the input channels are zero."""
    groups = np.moveaxis(values, 1, -1).reshape(-1, _SPARSE_GROUP)
    return bool(((groups == 0).sum(axis=1) >= _SPARSE_ZEROS).all())


def _shape(item: Any) -> Sequence[int]:
    """Return the shape of an input, -1 where it is open."""
    sizes = item.type.tensor_type.shape.dim
    return tuple(size.dim_value if size.HasField("dim_value") else -1 for size in sizes)


_RULES = (_opset, _operators, _types, _ends, _quantization, _resizing, _pooling, _selection, _sparsity)
