"""Stages chained by files: each runs once, leaves a record, and is skipped when the record is there.

A record is written last, so a stage that was killed has none and runs again (a training resumes by itself).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_prune.claims import LOCK
from yolo_prune.errors import ConfigError, OutputError
from yolo_prune.files import is_temporary, write_json
from yolo_prune.pipeline.record import ANOTHER


@dataclass
class Stages:
    """The stages of one run folder.

    Attributes:
        folder: Where the run's files stand.
        names: Every stage in its order, for progress.
    """

    folder: Path
    names: Sequence[str]

    def open(self, settings: Mapping[str, Any]) -> None:
        """Begin the folder with these settings, or find it begun with the same ones.

        Raises:
            OutputError: The folder holds something that is not a run.
            ConfigError: It holds a run with other settings.
        """
        record = self.folder / "run.json"
        if record.is_file():
            found = _read(record, remedy=ANOTHER)
            changed = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
            if changed:
                raise ConfigError(
                    f"'{self.folder}' holds a run with other settings: {', '.join(changed)}",
                    expected="the settings of that run, to resume it",
                    remedy=ANOTHER,
                )
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"'{self.folder}' is a file", expected="a new or empty folder", remedy=ANOTHER)
        there = self.folder.iterdir() if self.folder.exists() else ()
        if any(path.name not in ("data", LOCK) and not is_temporary(path) for path in there):
            raise OutputError(
                f"'{self.folder}' is not empty and holds no run", expected="a new or empty folder", remedy=ANOTHER
            )
        write_json(record, dict(settings))

    def run(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the record of a stage, one of `names`, doing its work unless that was done."""
        record = self.folder / "stages" / f"{name}.json"
        progress = f"[{self.names.index(name) + 1}/{len(self.names)}] {name}"
        if record.is_file():
            print(f"{progress}: done before", flush=True)
            return _read(record, remedy=f"delete it, and the same command does stage '{name}' again")
        print(progress, flush=True)
        result = work()
        write_json(record, result)
        return result


def _read(record: Path, *, remedy: str) -> dict[str, Any]:
    """Read what a run wrote: its settings, or what came of a stage.

    Raises:
        OutputError: It is damaged.
    """
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise OutputError(f"'{record}' is not the record of a run", expected="what the run wrote", remedy=remedy)
    return found
