"""A stand-in for TensorRT that knows the real signatures and nothing else.

What it is made of are the types of TensorRT 10.13 (`tensorrt-stubs`): a name, an argument or an attribute that is not
there raises as it would with TensorRT. Older and newer versions are made by taking names away. It computes nothing.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib.metadata
import inspect
import sys
import types
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import tensorrt_types

from yolo_prune.device import tensorrt_library
from yolo_prune.device.cuda import Stream

NOT_IN_11 = {
    "BuilderFlag": {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"},
    "NetworkDefinitionCreationFlag": {"EXPLICIT_BATCH"},
    "IBuilderConfig": {"int8_calibrator", "set_calibration_profile"},
    "ILayer": {"precision", "set_output_type"},
}
"""What this project could call that TensorRT 11.1 has no more (python/src of github.com/NVIDIA/TensorRT)."""


@cache
def classes() -> dict[str, ast.ClassDef]:
    """Return the classes of the stubs by name."""
    file = next(file for file in importlib.metadata.files("tensorrt-stubs") if file.name == "tensorrt.pyi")
    text = file.read_text(encoding="utf-8")
    for wrong, right in tensorrt_types.REPAIRS.items():
        text = text.replace(wrong, right)
    return {item.name: item for item in ast.parse(text).body if isinstance(item, ast.ClassDef)}


def members(kind: str) -> dict[str, list[ast.stmt]]:
    """Return the members of a class and of its bases, by name; a method may be overloaded."""
    found: dict[str, list[ast.stmt]] = {}
    for base in classes()[kind].bases:
        found.update(members(ast.unparse(base)))
    for item in classes()[kind].body:
        if isinstance(item, ast.FunctionDef):
            found.setdefault(item.name, []).append(item)
        if isinstance(item, ast.AnnAssign):
            found[item.target.id] = [item]
    return found


def signature(function: ast.FunctionDef) -> inspect.Signature:
    """Return the arguments of a method, without the first."""
    names, defaults = [item.arg for item in function.args.args], len(function.args.defaults)
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None if index >= len(names) - defaults else inspect.Parameter.empty,
        )
        for index, name in enumerate(names)
    ]
    return inspect.Signature(parameters[1:])


class Recorded:
    """An object of a class of the stubs."""

    def __init__(self, trt: StandIn, kind: str) -> None:
        object.__setattr__(self, "_trt", trt)
        object.__setattr__(self, "_kind", kind)

    def __getattr__(self, name: str) -> Any:
        stated = self._trt.stated.get((self._kind, name))
        found = self._trt.members(self._kind)
        if name not in found:
            raise AttributeError(f"TensorRT's {self._kind} has no '{name}'")
        if isinstance(found[name][0], ast.AnnAssign) or is_property(found[name]):
            return stated(self) if callable(stated) else 0 if stated is None else stated
        return lambda *values, **named: self._call(found[name], stated, values, named)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._trt.members(self._kind):
            raise AttributeError(f"TensorRT's {self._kind} has no '{name}'")
        self._trt.log.append((f"{self._kind}.{name}", value))

    def _call(self, overloads: list[Any], stated: Any, values: Any, named: Any) -> Any:
        error: TypeError | None = None
        for function in overloads:
            try:
                bound = signature(function).bind(*values, **named)
            except TypeError as wrong:
                error = wrong
                continue
            self._trt.log.append((f"{self._kind}.{function.name}", *bound.arguments.values()))
            return stated(*bound.arguments.values()) if callable(stated) else self._made(function, stated)
        raise TypeError(f"{self._kind}.{overloads[0].name}: {error}")

    def _made(self, function: ast.FunctionDef, stated: Any) -> Any:
        returns = ast.unparse(function.returns) if function.returns else "None"
        return stated if stated is not None else self._trt.make(returns)


def is_property(found: list[Any]) -> bool:
    """Tell whether a member is a property."""
    decorators = (ast.unparse(item) for function in found for item in function.decorator_list)
    return any(word == "property" or word.endswith(".setter") for word in decorators)


class StandIn(types.ModuleType):
    """The module `tensorrt`.

    Attributes:
        log: Every call and assignment: name and arguments.
        stated: What a member is or returns, by class and name; a function is called.
    """

    float32, float16, int32 = "FLOAT", "HALF", "INT32"
    BASES: ClassVar = ("ILogger", "IInt8EntropyCalibrator2", "IProgressMonitor")

    def __init__(self, version: str, stated: dict[tuple[str, str], Any]) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.log: list[tuple[Any, ...]] = []
        self.stated = stated
        self._gone = NOT_IN_11 if int(version.split(".")[0]) >= 11 else {}
        for name in self.BASES:
            setattr(self, name, type(name, (), {"ERROR": 1, "Severity": int}))
        if self._gone:
            del self.IInt8EntropyCalibrator2
        for name in ("BuilderFlag", "NetworkDefinitionCreationFlag", "MemoryPoolType", "DeviceType", "TensorIOMode"):
            setattr(self, name, self._enumeration(name))

    def _enumeration(self, name: str) -> Any:
        """Make an enumeration; the numbers of its members are those that follow its name in the stubs."""
        gone = self._gone.get(name, set())
        known = [item.target.id for item in classes()[name].body if isinstance(item, ast.AnnAssign)]
        values = {member: index for index, member in enumerate(known) if member.isupper() and member not in gone}
        return SimpleNamespace(**values, __members__=values)

    def members(self, kind: str) -> dict[str, list[ast.stmt]]:
        gone = self._gone.get(kind, set())
        return {name: found for name, found in members(kind).items() if name not in gone}

    def make(self, kind: str) -> Any:
        """Return something of a type."""
        plain = {"None": None, "bool": True, "int": 0, "str": "", "list[str]": []}
        return plain[kind] if kind in plain else Recorded(self, kind)

    def _create(self, kind: str, *values: Any) -> Recorded:
        for function in members(kind)["__init__"]:
            signature(function).bind(*values)
        self.log.append((kind,))
        return Recorded(self, kind)

    def Builder(self, *values: Any) -> Recorded:
        return self._create("Builder", *values)

    def OnnxParser(self, *values: Any) -> Recorded:
        return self._create("OnnxParser", *values)

    def Runtime(self, *values: Any) -> Recorded:
        return self._create("Runtime", *values)

    def Dims(self, sizes: list[int]) -> tuple[int, ...]:
        return tuple(sizes)

    def nptype(self, kind: Any) -> Any:
        return {"FLOAT": np.float32, "HALF": np.float16}[kind]

    def calls(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of every call of a name."""
        return [arguments for called, *arguments in self.log if called == name]


LAYERS = ["/model.0/conv/Conv", "/model.22/Sigmoid", "/model.22/dfl/Softmax", "(Unnamed Layer* 7)"]
"""Of every network that the stand-in reads."""


@dataclass
class HostMemory:
    """CUDA's functions on the memory of this machine: copies are real, nothing computes."""

    blocks: dict[int, ctypes.Array] = field(default_factory=dict)

    def require_gpu(self) -> None:
        pass

    @contextlib.contextmanager
    def stream(self):
        stream = Stream(cuda=self, handle=7)
        yield stream
        stream.free()
        assert not self.blocks

    def allocate(self, byte_count):
        block = ctypes.create_string_buffer(byte_count)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address):
        del self.blocks[address]

    def copy(self, target, source, byte_count, kind, stream):
        assert stream == 7
        assert (target if kind == 1 else source) in self.blocks
        ctypes.memmove(target, source, byte_count)

    def wait(self, stream):
        assert stream == 7


def install(monkeypatch: pytest.MonkeyPatch, version: str, **stated: Any) -> StandIn:
    """Let `import tensorrt` find the stand-in, and memory of this machine be a GPU's; keywords are CLASS__MEMBER."""
    trt = StandIn(
        version,
        {
            ("INetworkDefinition", "num_layers"): len(LAYERS),
            ("INetworkDefinition", "get_layer"): lambda index: layer(index),
            ("Builder", "build_serialized_network"): b"ptrt plan",
            ("ITimingCache", "serialize"): b"timings",
            **{tuple(key.split("__")): value for key, value in stated.items()},
        },
    )

    def layer(index: int) -> Recorded:
        trt.stated["ILayer", "name"] = LAYERS[index]
        trt.stated["ILayer", "num_outputs"] = 1
        trt.stated["ILayer", "get_output"] = lambda _: SimpleNamespace(dtype=trt.float32)
        return trt.make("ILayer")

    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(tensorrt_library, "load_cuda", HostMemory)
    return trt
