"""What an ONNX file says of itself, read without the package `onnx`: a device has numpy, OpenCV and its runtime.

An ONNX file is one message of Protocol Buffers: a sequence of fields, each a number, a wire type and a value
(https://protobuf.dev/programming-guides/encoding). The numbers below are those of `onnx.proto3`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Union

from yolo_prune.device.runtimes.base import ArtefactFacts, Precision, unreadable
from yolo_prune.errors import ConfigError

PROVENANCE = "yolo_prune"
"""Key of the metadata under which artefacts of ours say where they come from and what was proved of them."""

Value = Union[int, memoryview]  # a number, or the bytes of a text or of a message inside

_FLOAT, _FLOAT16 = 1, 10  # TensorProto.DataType
_QUANTISED = {"QuantizeLinear", "DequantizeLinear"}


class Node(NamedTuple):
    """A node of the graph."""

    name: str
    operator: str


class Tensor(NamedTuple):
    """An input of the graph; a dimension of -1 is chosen at run time."""

    name: str
    element_type: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OnnxFacts:
    """What decides how an engine is built of a file.

    Attributes:
        opset: Version of the standard operators.
        inputs: Inputs of the graph.
        nodes: Nodes in order.
        precision: What the file itself says to compute in: int8 where it quantizes, fp16 where it holds weights of 16
            bits, else fp32.
        metadata: Texts by key, as the host noted them.
    """

    opset: int
    inputs: tuple[Tensor, ...]
    nodes: tuple[Node, ...]
    precision: Precision
    metadata: Mapping[str, str]

    @property
    def image_input(self) -> Tensor:
        """The only input: images (B, 3, H, W), float32."""
        return self.inputs[0]

    @classmethod
    def read(cls, path: Path) -> OnnxFacts:
        """Read a file.

        Raises:
            ConfigError: It is missing, damaged, or does not take one batch of float32 images.
        """
        try:
            model = _message(memoryview(path.read_bytes()))
            graph = _message(_last(model, 7))
            facts = cls(
                opset=max((_opset(item) for item in _all(model, 8)), default=0),
                inputs=tuple(_tensor(item) for item in _all(graph, 11)),
                nodes=tuple(_node(item) for item in _all(graph, 1)),
                precision=_precision(graph),
                metadata=dict(_entry(item) for item in _all(model, 14)),
            )
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise _refused(path, f"cannot be read: {error!r}") from error
        takes = facts.inputs
        if len(takes) != 1 or takes[0].element_type != _FLOAT or len(takes[0].shape) != 4 or takes[0].shape[1] != 3:
            raise _refused(path, f"has inputs {[(item.name, item.shape) for item in takes]}")
        facts._require_notes(path)
        return facts

    def _require_notes(self, path: Path) -> None:
        """Refuse metadata that an engine could not take over."""
        ArtefactFacts.parse(self.metadata, path)
        try:
            json.loads(self.metadata.get(PROVENANCE, "{}"))
        except ValueError as error:
            raise unreadable(path, f"its metadata are damaged ({error})") from error


def _refused(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"ONNX file '{path}' {reason}",
        expected="one input, float32 images (B, 3, H, W)",
        remedy="export the checkpoint again, with float32 inputs",
    )


def _precision(graph: Mapping[int, list[Value]]) -> Precision:
    """Tell from operators and weights."""
    if any(_node(item).operator in _QUANTISED for item in _all(graph, 1)):
        return "int8"
    types = {_message(item).get(2, [0])[-1] for item in _all(graph, 5)}
    return "fp16" if _FLOAT16 in types else "fp32"


def _node(data: memoryview) -> Node:
    fields = _message(data)
    return Node(name=_text(fields, 3), operator=_text(fields, 4))


def _opset(data: memoryview) -> int:
    """Return the version of the standard operators; 0 for those of another domain."""
    fields = _message(data)
    return _number(fields, 2) if _text(fields, 1) in ("", "ai.onnx") else 0


def _tensor(data: memoryview) -> Tensor:
    fields = _message(data)
    tensor = _message(_last(_message(_last(fields, 2)), 1))  # the type is a union, of which 1 is a tensor
    sizes = [_message(item) for item in _all(_message(_last(tensor, 2)), 1)] if 2 in tensor else []
    shape = tuple(_number(size, 1) if 1 in size else -1 for size in sizes)  # else a name, or nothing
    return Tensor(name=_text(fields, 1), element_type=_number(tensor, 1), shape=shape)


def _entry(data: memoryview) -> tuple[str, str]:
    fields = _message(data)
    return _text(fields, 1), _text(fields, 2)


def _message(data: memoryview) -> dict[int, list[Value]]:
    """Split a message into its fields, by number.

    Raises:
        ValueError: It is cut off, or not a message.
    """
    fields: dict[int, list[Value]] = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(kind, -1)
        if size < 0 or at + size > len(data):
            raise ValueError("cut off, or not an ONNX file")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte, the lowest first; return it and where the next field begins."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _all(fields: Mapping[int, list[Value]], number: int) -> list[memoryview]:
    """Return the messages under a number."""
    return [_bytes(value) for value in fields.get(number, [])]


def _last(fields: Mapping[int, list[Value]], number: int) -> memoryview:
    return _bytes(fields[number][-1])


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _number(fields: Mapping[int, list[Value]], number: int) -> int:
    """Return a number, 0 where there is none."""
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise ValueError("a message where a number should be")
    return value


def _text(fields: Mapping[int, list[Value]], number: int) -> str:
    return bytes(_last(fields, number)).decode("utf-8") if number in fields else ""
