"""Classic checkpoints hold live modules: they are unpickled by an allow-list, so that foreign code never runs.

Allowed are torch's layers and tensors, numpy's numbers and arrays, plain containers, and the modules of the classic
code itself. Layers are made empty and filled, as pickles of torch do; their constructors are not called, because
`DetectionModel` evaluates the words of the yaml that it is given. For the same reason a checkpoint's own yaml may hold
names only.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo_prune.errors import CheckpointError
from yolo_prune.hosts.refusals import first_line
from yolo_prune.hosts.replacing import replaced
from yolo_prune.hosts.yolov5.source import Classic

PLAIN = (
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
)
"""What is no layer and may be called: it makes values and does nothing else."""

PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
"""Paths among the flags that a checkpoint remembers; whichever system wrote them, they are read as this one's."""

RENAMED = {"__builtin__": "builtins", "numpy.core.multiarray": "numpy._core.multiarray"}
"""Modules by the names that older Python and numpy wrote."""

WORD = re.compile(r"[A-Za-z_][\w.]*")
ACTIVATION = re.compile(r"(torch\.)?nn\.\w+\([\w.=, ]*\)")
"""What the classic code may evaluate of a yaml: names, and an activation with plain arguments."""

_torch_load = torch.load  # the real one, also while `restricted` stands in for it


class _ForeignError(Exception):
    """A pickle names something that is not allowed."""


def load(classic: Classic, path: Path, map_location: Any = "cpu") -> Any:
    """Return what a checkpoint file holds; its layers are those of `classic`, whichever copy of YOLOv5 wrote it.

    Raises:
        CheckpointError: No such file, not a checkpoint, damaged, foreign classes, or a yaml with code in it.
    """
    if not path.is_file():
        raise CheckpointError(f"no file '{path}'", expected="a .pt checkpoint of classic YOLOv5")
    if not _is_checkpoint(path):
        raise _unreadable(path, "it is no complete archive as torch 1.6 and newer save it")
    try:
        content = _torch_load(path, map_location=map_location, pickle_module=_pickle_of(classic), weights_only=False)
    except Exception as error:  # damaged and foreign files reach torch's loader as half a dozen types
        raise _unreadable(path, first_line(error)) from error
    for value in content.values() if isinstance(content, dict) else ():
        _require_plain_yaml(path, getattr(value, "yaml", None))
    return content


@contextlib.contextmanager
def restricted(classic: Classic) -> Iterator[None]:
    """Let the classic code's own `torch.load` read by the same allow-list."""

    def torch_load(f: Any, map_location: Any = None, **_: Any) -> Any:
        if isinstance(f, (str, os.PathLike)):
            return load(classic, Path(f), map_location)
        return _torch_load(f, map_location=map_location, weights_only=True)

    with replaced(torch, load=torch_load):
        yield


def _is_checkpoint(path: Path) -> bool:
    """Return whether a file is a pickle in an archive; TorchScript has constants beside, and code of its own."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return not any(name.endswith("/constants.pkl") for name in archive.namelist())


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"cannot read '{path}': {reason}",
        expected="a .pt checkpoint of classic YOLOv5 that names torch's and YOLOv5's classes only",
        remedy="check that the file is complete and was saved by its train.py; its code was not run",
    )


def _pickle_of(classic: Classic) -> Any:
    """Return a pickle module for torch whose unpickler knows the allow-list."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return _allowed(classic, RENAMED.get(module, module), name)

    found = types.ModuleType("restricted_pickle")
    vars(found)["Unpickler"] = Unpickler
    return found


def _allowed(classic: Classic, module: str, name: str) -> Any:
    if (module, name) in PLAIN:
        return getattr(importlib.import_module(module), name)
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if module in ("pathlib", "pathlib._local") and name in PATHS:
        return Path
    if (module, name) == ("builtins", "getattr"):
        raise _ForeignError("it holds bound methods (builtins.getattr), as fused and segmentation models do")
    layer = _layer(classic, module, name)
    if layer is None:
        raise _ForeignError(f"it names '{module}.{name}', which belongs to neither torch nor YOLOv5")
    return _empty(layer)


def _layer(classic: Classic, module: str, name: str) -> type[nn.Module] | None:
    """Return a layer of torch or of the classic code."""
    file = module.removeprefix("yolov5.")
    if module.startswith("torch.nn.modules."):
        found = getattr(sys.modules.get(module), name, None)
    elif file.startswith("models.") and (classic.root / f"{file.replace('.', '/')}.py").is_file():
        found = getattr(classic.module(file), name, None)
    else:
        return None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _empty(layer: type[nn.Module]) -> type:
    """Return a stand-in that makes empty layers, whose constructor a pickle cannot call."""

    def new(_cls: type, *arguments: Any) -> nn.Module:
        if arguments:
            raise _ForeignError(f"it calls the constructor of '{layer.__module__}.{layer.__name__}'")
        return layer.__new__(layer)

    return type(layer.__name__, (), {"__new__": new})


def _require_plain_yaml(path: Path, yaml: Any) -> None:
    """Refuse a model description with words that the classic code would evaluate as more than names."""
    if yaml is None:
        return
    if not isinstance(yaml, dict):
        raise _unreadable(path, f"its yaml is a {type(yaml).__name__}")
    layers = _words([yaml.get("backbone"), yaml.get("head")])
    activation = yaml.get("activation")
    wrong = [word for word in layers if not WORD.fullmatch(word)]
    if activation and not ACTIVATION.fullmatch(str(activation)):
        wrong.append(str(activation))
    if wrong:
        raise _unreadable(path, f"its yaml holds {wrong[0]!r} where a name is due")


def _words(value: Any) -> Iterable[str]:
    """Yield every text in nested lists."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _words(item)
    elif isinstance(value, str):
        yield value
