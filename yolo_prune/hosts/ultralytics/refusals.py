"""What the host raises, said in our words.

Its loaders, trainers and converters raise half a dozen types, and none of them says what to do. Errors of ours that are
raised inside pass through as they are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

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
