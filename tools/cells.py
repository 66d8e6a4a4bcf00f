"""Experiments as cells of an append-only record: what is there is not run again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from yolo_prune.errors import YoloPruneError
from yolo_prune.files import append_line, read_lines

Cell = TypeVar("Cell")


def run_missing(
    record: Path,
    cells: Iterable[Cell],
    run: Callable[[Cell], dict[str, Any]],
    *,
    cannot_be: tuple[type[YoloPruneError], ...] = (),
) -> list[dict[str, Any]]:
    """Run the cells that a record lacks, one a line; return all of its lines.

    Args:
        record: The record.
        cells: Dataclasses of plain values.
        run: From a cell to its line, which has it under `cell`.
        cannot_be: Errors that are the result of a cell: its line says so under `failed`. Any other one ends the work.
    """
    wanted = list(dict.fromkeys(cells))
    for number, cell in enumerate(wanted, start=1):
        values = _as_read_back(dataclasses.asdict(cell))  # type: ignore[call-overload]  # any dataclass
        if values not in [completed(line["cell"], type(cell)) for line in read_lines(record)]:
            print(f"[{number}/{len(wanted)}] {_in_words(values)}", flush=True)
            try:
                line = run(cell)
            except cannot_be as error:
                line = {"cell": values, "failed": error.found}
                print(f"failed: {error.found}", flush=True)
            append_line(record, line)
    return read_lines(record)


def completed(recorded: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return a cell of a record, whole: a field that is younger than its line had the value of its default.

    Args:
        recorded: The cell as it was read.
        kind: Its dataclass.
    """
    defaults = {
        field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING
    }
    return {**_as_read_back(defaults), **recorded}


def data_name(data: str) -> str:
    """Return what a record calls a data set: the folder of its yaml, from wherever that is named."""
    return Path(data).resolve().parent.name


def cell_key(cell: Any) -> str:
    """Return a short name for a cell: another value of any field gives another one."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(cell)).encode()).hexdigest()[:8]


def failures(records: Iterable[Mapping[str, Any]]) -> str:
    """Return a line for every cell that cannot be, which says why; nothing where all can."""
    return "".join(f"failed: {_in_words(one['cell'])}: {one['failed']}\n" for one in records if "failed" in one)


def _as_read_back(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as a record gives them back: lists, no tuples."""
    read: dict[str, Any] = json.loads(json.dumps(values))
    return read


def _in_words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
