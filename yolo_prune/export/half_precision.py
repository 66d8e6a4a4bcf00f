"""ONNX graphs in 16 bits, for runtimes that take the precision from the graph (TensorRT 11).

Our own, because the converters that exist (`onnxruntime.transformers.float16`, its twin in `onnxconverter-common`) put
a cast to 16 bits and back between two nodes that both stay in 32: 55 casts in yolov8n where 7 do, and the coordinates
of a box are rounded to half a pixel all the same. Some of their casts carry the same name twice, which is no graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np

from yolo_prune.errors import ExportError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_LARGEST = float(np.finfo(np.float16).max)
_ALWAYS_FLOAT = {"Resize": (1, 2), "QuantizeLinear": (1,), "DequantizeLinear": (1,)}
"""Inputs that the operator takes in 32 bits, whatever its first input is."""


def to_half(model: ModelProto, *, keep: Collection[str]) -> ModelProto:
    """Return the model with weights and activations in 16 bits; inputs and outputs stay in 32.

    Args:
        model: In 32 bits, without graphs inside of nodes; not changed.
        keep: Names of nodes that compute in 32 bits. Casts stand only where the precision changes.

    Raises:
        ExportError: A weight lies outside of what 16 bits can hold.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
    _Typing(result.graph, keep).run()
    del result.graph.value_info[:]
    onnx.checker.check_model(result, full_check=True)
    return result


class _Typing:
    """One pass over a graph in its order."""

    def __init__(self, graph: GraphProto, keep: Collection[str]) -> None:
        from onnx import TensorProto

        self.graph, self.keep = graph, keep
        self.float32, self.float16 = TensorProto.FLOAT, TensorProto.FLOAT16
        known = [*graph.value_info, *graph.input, *graph.output]
        self.floats = {item.name for item in known if item.type.tensor_type.elem_type == self.float32}
        self.weights = {item.name: item for item in graph.initializer if item.data_type == self.float32}
        self.types = dict.fromkeys([item.name for item in graph.input], int(self.float32))
        self.types.update(dict.fromkeys(self.weights, int(self.float32)))
        self.made: dict[tuple[str, int], str] = {}
        self.extra_weights: list[TensorProto] = []

    def run(self) -> None:
        """Change the graph in place."""
        nodes = [changed for node in self.graph.node for changed in self._typed(node)]
        nodes += [node for output in self.graph.output for node in self._restored(output.name, nodes)]
        nodes = [type(node).FromString(node.SerializeToString()) for node in nodes]  # they belong to what is emptied
        used = {name for node in nodes for name in node.input}
        weights = [item for item in [*self.graph.initializer, *self.extra_weights] if item.name in used]
        weights = [type(item).FromString(item.SerializeToString()) for item in weights]
        for field, items in ((self.graph.node, nodes), (self.graph.initializer, weights)):
            del field[:]
            field.extend(items)

    def _typed(self, node: NodeProto) -> Iterator[NodeProto]:
        """Yield the casts that a node needs, then the node."""
        wanted = int(self.float32 if node.name in self.keep else self.float16)
        always = _ALWAYS_FLOAT.get(node.op_type, ())
        for index, name in enumerate(node.input):
            if name in self.types:
                kind = int(self.float32) if index in always else wanted
                yield from self._converted(name, kind)
                node.input[index] = self.made.get((name, kind), name)
        self._retype(node, wanted)
        self.types.update({name: wanted for name in node.output if name in self.floats})
        yield node

    def _converted(self, name: str, kind: int) -> Iterator[NodeProto]:
        """Make a tensor's other version once: a weight is converted here, an activation by a cast in the graph."""
        if self.types[name] == kind or (name, kind) in self.made:
            return
        other = f"{name}_{'fp16' if kind == self.float16 else 'fp32'}"
        self.made[name, kind] = other
        if name in self.weights:
            self.extra_weights.append(_half_weight(self.weights[name], other))
        else:
            yield _cast(name, other, kind)

    def _retype(self, node: NodeProto, kind: int) -> None:
        """Let a node that makes floats by itself make those of the precision around it."""
        from onnx import numpy_helper

        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == self.float32:
                attribute.i = kind
            if attribute.HasField("t") and attribute.t.data_type == self.float32 and kind == self.float16:
                attribute.t.CopyFrom(numpy_helper.from_array(_half(numpy_helper.to_array(attribute.t), node.name)))

    def _restored(self, output: str, nodes: list[NodeProto]) -> Iterator[NodeProto]:
        """Cast an output of the graph back under its own name."""
        if self.types.get(output) != self.float16:
            return
        inner = f"{output}_fp16"
        for node in nodes:
            for names in (node.input, node.output):
                names[:] = [inner if name == output else name for name in names]
        yield _cast(inner, output, int(self.float32))


def _cast(source: str, target: str, kind: int) -> NodeProto:
    from onnx import helper

    return helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=kind)


def _half_weight(weight: TensorProto, name: str) -> TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(_half(numpy_helper.to_array(weight), weight.name), name)


def _half(values: np.ndarray, name: str) -> np.ndarray:
    """Return values in 16 bits.

    Raises:
        ExportError: One of them does not fit.
    """
    if np.abs(values).max(initial=0.0) > _LARGEST:
        raise ExportError(
            f"weight '{name}' reaches {np.abs(values).max():.3g}",
            expected=f"at most {_LARGEST:g}, the largest number of 16 bits",
            remedy="export in fp32",
        )
    return values.astype(np.float16)
