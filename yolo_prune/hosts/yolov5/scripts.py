"""The classic code's own scripts, run as they are in an environment that is prepared for them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from yolo_prune.errors import ConfigError
from yolo_prune.hosts.refusals import host_errors_as
from yolo_prune.hosts.replacing import replaced
from yolo_prune.hosts.yolov5.reading import restricted
from yolo_prune.hosts.yolov5.shims import also_named, arguments, look_up_names_only
from yolo_prune.hosts.yolov5.source import Classic

TOP_LEVEL = ("models", "models.common", "models.experimental", "models.yolo")
"""What PyPI's package also imports as if it were a repository; two copies of a class would not know each other."""

LOOK_UP = "attempt_download_from_hub"
"""What PyPI's package asks for checkpoints by name."""


@contextlib.contextmanager
def prepared(classic: Classic, script: Any, words: Sequence[str]) -> Iterator[None]:
    """Give a script its words, the restricted reader, and, for PyPI's package, files that are not looked up elsewhere.

    Args:
        classic: The code.
        script: The script's module.
        words: Its flags.
    """
    modules = [script, classic.module("utils.downloads"), classic.module("models.common")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(arguments(Path(script.__file__), words))
        stack.enter_context(replaced(script, ROOT=classic.root))  # its own is relative to where it was imported
        stack.enter_context(restricted(classic))
        stack.enter_context(also_named({name: classic.module(name) for name in TOP_LEVEL}))
        for module in modules:
            if hasattr(module, LOOK_UP):
                stack.enter_context(replaced(module, **{LOOK_UP: look_up_names_only(getattr(module, LOOK_UP))}))
        yield


def run_script(classic: Classic, name: str, words: Sequence[str]) -> None:
    """Run val, detect or export.

    Raises:
        ConfigError: It stopped with an error.
    """
    script = classic.module(name)
    with (
        prepared(classic, script, words),
        host_errors_as(
            ConfigError,
            f"{name}.py of YOLOv5 stopped",
            expected="flags and files that it accepts",
            remedy="correct them; --debug shows where it stopped",
        ),
    ):
        if inspect.signature(script.main).parameters:  # PyPI's main() reads its words itself
            script.main(script.parse_opt())
        else:
            script.main()
