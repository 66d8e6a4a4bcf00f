"""What the classic code needs to run with current torch and numpy, undone afterwards where it could touch others.

The repository's newest version needs none of it; v7.0 and PyPI's 7.0.14 do. On their own they also need the variable
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1; here `reading` stands in for `torch.load`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.ImageFont import FreeTypeFont

from yolo_prune.errors import ConfigError
from yolo_prune.hosts.replacing import replaced

OPTIONAL_SDKS = ("roboflow", "roboflow.core", "roboflow.core.version")
"""Modules that PyPI's train.py imports whether or not they are used."""


def adapt_numpy() -> None:
    """Give numpy back its `trapz`, which was renamed in 2.0 and removed in 2.4."""
    if not hasattr(np, "trapz"):
        vars(np)["trapz"] = np.trapezoid


def adapt_pillow() -> None:
    """Give Pillow's fonts back their `getsize`, which was removed in 10: boxes are labelled with it."""
    if not hasattr(FreeTypeFont, "getsize"):
        FreeTypeFont.getsize = lambda self, text: self.getbbox(text)[2:]  # type: ignore[attr-defined]


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Let optional SDKs that are absent be imported; what is made of them refuses to be used.

    They are taken away again, so that nobody else takes them for installed.
    """
    absent = [] if importlib.util.find_spec("roboflow") else [name for name in OPTIONAL_SDKS if name not in sys.modules]
    sys.modules.update({name: _StandIn(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextlib.contextmanager
def also_named(modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """Let modules be imported by other names for a while: PyPI's package imports its own `models.yolo` by that name."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class _StandIn(types.ModuleType):
    """A module in which every name is a class that cannot be made."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": self._refuse})

    def _refuse(self, *_args: Any, **_kwargs: Any) -> None:
        package = self.__name__.partition(".")[0]
        raise ConfigError(f"package '{package}' is not installed", expected=package, remedy=f"pip install {package}")


def look_up_names_only(look_up: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap PyPI's `attempt_download_from_hub`: a file on the disk, or nothing, is not asked for on the network.

    The original asks for any path, and needs the package huggingface_hub to do so.
    """

    def attempt_download_from_hub(repo_id: Any, *args: Any, **kwargs: Any) -> Any:
        return None if not str(repo_id) or Path(str(repo_id)).exists() else look_up(repo_id, *args, **kwargs)

    return attempt_download_from_hub


@contextlib.contextmanager
def arguments(script: Path, words: Sequence[str]) -> Iterator[None]:
    """Let a script's parser find its words."""
    with replaced(sys, argv=[str(script), *words]):
        yield
