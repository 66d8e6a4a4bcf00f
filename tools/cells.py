"""Experiments as cells of an append-only record: what is there is not run again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from yolo_prune.files import append_line, read_lines

Cell = TypeVar("Cell")


def run_missing(record: Path, cells: Iterable[Cell], run: Callable[[Cell], dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the cells that a record lacks, one a line; return all of its lines.

    Args:
        record: The record.
        cells: Dataclasses of plain values.
        run: From a cell to its line, which has it under `cell`.
    """
    wanted = list(dict.fromkeys(cells))
    for number, cell in enumerate(wanted, start=1):
        values = dataclasses.asdict(cell)  # type: ignore[call-overload]  # any dataclass
        if values not in [line["cell"] for line in read_lines(record)]:
            shown = ", ".join(f"{key}={value}" for key, value in values.items())
            print(f"[{number}/{len(wanted)}] {shown}", flush=True)
            append_line(record, run(cell))
    return read_lines(record)
