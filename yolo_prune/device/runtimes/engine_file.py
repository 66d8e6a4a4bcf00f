"""The file of an engine: what the host notes about itself, then TensorRT's plan.

The layout is the host's, so that stock `YOLO("slim.engine")` reads it: the length of a JSON text as four bytes,
little-endian, the text, the plan. `trtexec` writes and reads the plan alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yolo_prune.device.runtimes.base import unreadable
from yolo_prune.files import new_file

_LENGTH = 4


@dataclass(frozen=True)
class EngineFile:
    """An engine as it lies on the disk.

    Attributes:
        plan: What TensorRT deserialises.
        metadata: What is noted before it; empty for a plan alone.
    """

    plan: bytes
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> EngineFile:
        """Read an engine, with or without metadata.

        Raises:
            ConfigError: It is missing, empty, or its metadata are damaged.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise unreadable(path, error.strerror or error) from error
        plan_at, metadata = _header(path, data)
        if plan_at >= len(data):
            raise unreadable(path, "it holds no plan")
        return cls(plan=data[plan_at:], metadata=metadata)

    def write(self, path: Path, *, replace: bool = False) -> None:
        """Write an engine, complete or not at all.

        Raises:
            OutputError: Something stands there and `replace` is false, or it cannot be written.
        """
        text = json.dumps(self.metadata).encode("utf-8")
        with new_file(path, replace=replace) as temporary:
            temporary.write_bytes(len(text).to_bytes(_LENGTH, "little") + text + self.plan)


def _header(path: Path, data: bytes) -> tuple[int, Mapping[str, Any]]:
    """Return where the plan begins, and the metadata before it."""
    length = int.from_bytes(data[:_LENGTH], "little")
    text = data[_LENGTH : _LENGTH + length]
    if not text.startswith(b"{"):
        return 0, {}  # a plan begins with a mark of its own, never with the length of an object of JSON
    try:
        metadata = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise unreadable(path, f"its metadata are damaged ({error})") from error
    return _LENGTH + length, metadata
