"""What the host raises, said in our words.

Its loaders, trainers and converters raise half a dozen types, and none of them says what to do. Errors of ours that are
raised inside pass through as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from yolo_prune.errors import CheckpointError, ConfigError
from yolo_prune.hosts.refusals import host_errors_as


def loading(name: str | Path) -> AbstractContextManager[None]:
    """Turn what the host's loaders raise into a `CheckpointError`; `name` is the user's name for the file."""
    return host_errors_as(
        CheckpointError,
        f"cannot load '{name}'",
        expected="a checkpoint that Ultralytics' YOLO() loads",
        remedy="check that the file is complete and was saved by Ultralytics",
    )


def training_refused() -> AbstractContextManager[None]:
    """Turn what the host raises before the first epoch into bad input: by then it looked at settings and data only."""
    return host_errors_as(
        ConfigError,
        "Ultralytics refuses this training",
        expected="settings and data that its trainer accepts",
        remedy="correct them; --debug shows where it stopped",
    )


def require_plain(args: Mapping[str, Any], what: str) -> None:
    """Refuse a training whose network the host wraps or changes, or whose length is not known.

    Args:
        args: The host's training arguments.
        what: The setting of ours that cannot do with it.

    Raises:
        ConfigError: `compile=`, `quantize=` or `time=`.
    """
    for key in ("compile", "quantize", "time"):
        if args.get(key):
            raise ConfigError(
                f"{what} with {key}={args[key]}",
                expected="a network that is neither compiled nor quantized, and a number of epochs",
                remedy=f"leave {key} out here; fine-tune the result with it",
            )
