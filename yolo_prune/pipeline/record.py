"""Numbered lines in a folder that belongs to settings: what long work leaves behind, and goes on from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yolo_prune.claims import claimed
from yolo_prune.errors import ConfigError, OutputError
from yolo_prune.files import append_line, read_lines, write_json

SETTINGS = "settings.json"

ANOTHER = "choose another out="


class Record:
    """An append-only record, open to one process at a time: a context, which holds the folder once it is there.

    Args:
        folder: Where it stands; it is made with the first line.
        name: Its file.
        settings: What decides the lines, as plain values.
        results: Further files that the work will write into the folder.

    Attributes:
        folder: See above.
        lines: What is known, by number. A line that a kill cut off is not.

    Raises:
        ConfigError: The folder holds lines of other settings.
        OutputError: It holds something else, or is none.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], *, results: tuple[str, ...] = ()) -> None:
        self.folder, self._file, self._settings = folder, folder / name, dict(settings)
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"'{folder}' is a file", expected="a new or empty folder", remedy=ANOTHER)
        self._require_same(results)
        found = read_lines(self._file)
        if not all(isinstance(line, dict) and isinstance(line.get("number"), int) for line in found):
            raise OutputError(
                f"'{self._file}' has lines without a number", expected="lines that this command wrote", remedy=ANOTHER
            )
        lines = {line["number"]: line for line in found}
        self.lines: dict[int, dict[str, Any]] = {number: lines[number] for number in sorted(lines)}
        self._held, self._claimed = contextlib.ExitStack(), False

    def __enter__(self) -> Record:
        if self.folder.is_dir():
            self._claim()
            for line in read_lines(self._file):  # another process may have added some since
                self.lines[line["number"]] = line
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def begin(self) -> None:
        """Take the folder, with the settings in it: whatever else stands there then belongs to them.

        Raises:
            OutputError: Another process works there, or began it meanwhile.
        """
        if not self._claimed:
            self._claim()
            if (self.folder / SETTINGS).is_file():
                raise OutputError(
                    f"another process began '{self.folder}' meanwhile",
                    expected="one process at a time in a folder",
                    remedy="run the same command again to go on from its lines, or choose another out=",
                )
        if not (self.folder / SETTINGS).is_file():
            write_json(self.folder / SETTINGS, self._settings)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line, which has a `number`."""
        self.begin()
        append_line(self._file, line)
        self.lines[line["number"]] = dict(line)

    def _claim(self) -> None:
        self._held.enter_context(claimed(self.folder))
        self._claimed = True

    def in_order(self) -> list[dict[str, Any]]:
        """Return the lines by number."""
        return [self.lines[number] for number in sorted(self.lines)]

    def _require_same(self, results: tuple[str, ...]) -> None:
        path = self.folder / SETTINGS
        if not path.is_file():  # then nothing here is ours
            for file in (self._file, *(self.folder / name for name in results)):
                if file.exists():
                    raise OutputError(
                        f"'{file}' stands without '{path.name}'", expected="a new or empty folder", remedy=ANOTHER
                    )
            return
        try:
            known = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise OutputError(
                f"'{path}' cannot be read: {error}", expected="a new or empty folder", remedy=ANOTHER
            ) from error
        settings = json.loads(json.dumps(self._settings))  # as they are read back: lists, no tuples
        others = [f"{key}={known.get(key)}" for key in settings if known.get(key) != settings[key]]
        if others:
            raise ConfigError(
                f"'{self.folder}' was begun with other settings: {', '.join(others)}",
                expected="the same settings, to go on, or a new folder",
                remedy=ANOTHER,
            )
