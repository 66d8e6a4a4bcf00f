"""README's figures from records, never typed by hand.

python tools/readme_tables.py                           rewrites the tables of README.md
python tools/readme_tables.py run=runs/bccd name=bccd   first adds a run's summary to tools/records

A table stands between `<!-- record: NAME -->` and `<!-- end -->`; NAME.json or NAME.jsonl in tools/records holds its
figures. The curves of the recipes are drawn into recipes.svg beside them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench_criteria import CriteriaFigures
from bench_export import ExportFigures
from bench_latency import LatencyFigures
from bench_speedups import SpeedupFigures
from coverage_figures import Coverage
from engine_figures import EngineFigures
from peer_figures import PeerFigures
from recipe_figures import Cells
from search_figures import SearchFigures

from yolo_prune.cli import script
from yolo_prune.configuration import setting
from yolo_prune.errors import ConfigError
from yolo_prune.files import new_file, read_lines, write_json
from yolo_prune.report.summary import summarize

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "tools" / "records"
BLOCK = re.compile(r"(<!-- record: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(kw_only=True)
class TablesConfig:
    """Settings of this tool."""

    run: str | None = setting(None, help="folder of a run whose summary becomes a record")
    name: str | None = setting(None, help="name of that record")


def render_record(name: str) -> str:
    """Return the Markdown table of a record.

    Raises:
        ConfigError: There is no such record.
    """
    if name in CELLS:
        return CELLS[name](read_lines(RECORDS / f"{name}.jsonl")).table(markdown=True)
    path = RECORDS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECORDS.glob("*.json")))
        raise ConfigError(f"README names record '{name}'", expected=f"one of: {known}")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if name == "coverage":
        return Coverage(records=record).table(markdown=True)
    return summarize(record, markdown=True) if "evaluations" in record else EngineFigures(**record).table(markdown=True)


class Figures(Protocol):
    """What a benchmark measured."""

    def table(self, *, markdown: bool = False) -> str:
        """Return it as a table."""
        ...


CELLS: dict[str, Callable[[list[dict[str, Any]]], Figures]] = {
    "recipes": lambda lines: Cells(records=lines, races=read_lines(RECORDS / "recipes_latency.jsonl")),
    "criteria": lambda lines: CriteriaFigures(records=lines),
    "latency": lambda lines: LatencyFigures(records=lines),
    "export": lambda lines: ExportFigures(records=lines),
    "speedups": lambda lines: SpeedupFigures(records=lines),
    "search": lambda lines: SearchFigures(lines=lines),
    "peers": lambda lines: PeerFigures(records=lines, races=read_lines(RECORDS / "peers_latency.jsonl")),
}
"""Benchmarks whose record is a line for each cell, by its name."""


def recipes() -> Cells:
    """Return the cells of recipes."""
    return Cells(records=read_lines(RECORDS / "recipes.jsonl"), races=[])


def candidates() -> SearchFigures:
    """Return candidates that were scored and fine-tuned."""
    return SearchFigures(lines=read_lines(RECORDS / "search.jsonl"))


def filled(text: str) -> str:
    """Return a text with every table made anew from its record."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{render_record(match[2])}\n{match[3]}", text)


def add_run(folder: Path, name: str) -> None:
    """Make a record of a run's summary, without the paths of the machine that it ran on.

    Raises:
        ConfigError: The folder holds no summary.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise ConfigError(f"no file '{path}'", expected="the folder of a run that is finished")
    summary = json.loads(path.read_text(encoding="utf-8"))
    for key in ("model", "data", "out"):
        summary["settings"][key] = Path(summary["settings"][key]).name
    for parity in summary["parity"].values():
        parity["artefact"] = Path(parity["artefact"]).name
    write_json(RECORDS / f"{name}.json", summary, replace=True)


def fill(config: TablesConfig) -> str:
    """Fill README.md and return what was done.

    Raises:
        ConfigError: `run` without `name` or the reverse, or a record that is not there.
    """
    if bool(config.run) != bool(config.name):
        raise ConfigError("one of run= and name= is missing", expected="both, to add a record, or neither")
    if config.run and config.name:
        add_run(Path(config.run), config.name)
    text = filled((ROOT / "README.md").read_text(encoding="utf-8"))
    with new_file(ROOT / "README.md", replace=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    recipes().draw(RECORDS / "recipes.svg")
    candidates().draw(RECORDS / "search.svg")
    return f"tables of README.md filled from {RECORDS.relative_to(ROOT)}\n"


if __name__ == "__main__":
    sys.exit(script("README's figures from records, never typed by hand.", TablesConfig, fill))
