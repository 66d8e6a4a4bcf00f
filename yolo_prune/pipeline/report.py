"""`report` and `compare`: pages of runs, from their records alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_prune.configuration import json_setting, setting
from yolo_prune.errors import ConfigError
from yolo_prune.files import new_file, require_new_outputs
from yolo_prune.report.comparison import Comparison, called, render_comparison
from yolo_prune.report.reading import read_run
from yolo_prune.report.records import Run
from yolo_prune.report.report import render_report
from yolo_prune.report.sentence import sentences

REPORT = "report.html"
"""The page in a run's folder."""


@dataclass(kw_only=True)
class ReportConfig:
    """Settings of `report`."""

    run: str = setting(help="folder of a run, finished or not")
    out: str | None = setting(None, help=f"HTML file, must not exist; default: {REPORT} in the run's folder, anew")
    search: str | None = setting(None, help="folder of a search; default: the one whose plan the run applied")
    correlation: str | None = setting(None, help="candidates that were also fine-tuned, of tools/bench_search.py")
    json: str | None = json_setting("the figures")


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page that was written."""

    run: Run
    path: Path

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return self.run.to_json()

    def table(self) -> str:
        """Return what the run found, in words, and where the page stands."""
        lacks = [f"the report lacks {what}" for what in self.run.missing]
        return "\n".join([" ".join(sentences(self.run)), *lacks, f"report: {self.path}", ""])


def report(config: ReportConfig) -> Report:
    """Write the page of a run.

    Raises:
        YoloPruneError: No run, a damaged record, or a page that cannot be written.
    """
    require_new_outputs({"out": config.out, "json": config.json})
    run = read_run(
        Path(config.run),
        search=Path(config.search) if config.search else None,
        tuned=Path(config.correlation) if config.correlation else None,
    )
    path = Path(config.out) if config.out else Path(config.run) / REPORT
    with new_file(path, replace=config.out is None) as temporary:
        temporary.write_text(render_report(run), encoding="utf-8")
    return Report(run=run, path=path)


@dataclass(kw_only=True)
class CompareConfig:
    """Settings of `compare`."""

    runs: str = setting(help="folders of runs, comma-separated")
    out: str | None = setting(None, help="also write the page into this HTML file; must not exist")
    json: str | None = json_setting("the figures")


def compare(config: CompareConfig) -> Comparison:
    """Lay runs beside each other.

    Raises:
        YoloPruneError: No run, a damaged record, or a page that cannot be written.
    """
    require_new_outputs({"out": config.out, "json": config.json})
    folders = [Path(name.strip()) for name in config.runs.split(",") if name.strip()]
    if len({folder.resolve() for folder in folders}) != len(folders) or not folders:
        raise ConfigError(f"runs={config.runs}", expected="at least one folder of a run, each once")
    comparison = Comparison(runs=called([read_run(folder) for folder in folders]))
    if config.out:
        with new_file(Path(config.out)) as temporary:
            temporary.write_text(render_comparison(comparison), encoding="utf-8")
    return comparison
