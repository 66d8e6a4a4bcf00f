"""Several runs in one table and one page, with the controls that each of them has and lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yolo_prune import __version__
from yolo_prune.report.pages import page
from yolo_prune.report.plots import compared
from yolo_prune.report.records import HASHES, MODELS, PRECISION, Model, Run
from yolo_prune.report.summary import in_words
from yolo_prune.report.table import quantity, render

CONTROLS = {
    "control": ("control: true", "the slim shapes, trained from random weights"),
    "direct": ("direct: {}", "the dense model, pruned once without the method"),
    "smaller": ("smaller: MODEL", "the next smaller scale, trained as long"),
}
"""How a run is asked for what honesty compares it with."""

SAME: Mapping[str, tuple[Callable[[Run], Any], str]] = {
    "data": (lambda run: run.settings.get("data"), "their mAP cannot be compared"),
    "content of the data yaml": (lambda run: _data_sha256(run), "their mAP cannot be compared"),
    "imgsz": (lambda run: run.settings.get("imgsz"), "neither mAP nor MACs can be compared"),
    "model": (lambda run: run.settings.get("model"), "they did not start from the same network"),
    "seed": (lambda run: run.settings.get("seed"), "chance differs"),
    "machine": (lambda run: run.machine.get("cpu"), "their milliseconds cannot be compared"),
    "threads": (lambda run: run.settings.get("threads"), "their milliseconds cannot be compared"),
}
"""What compared runs should have in common, how it is read, and what follows where it differs."""

ACCURACY = ("data", "content of the data yaml", "imgsz")
"""Those without which mAP means something else."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of one of the runs.

    Attributes:
        run: What the run is called.
        model: The model.
        kept: Fraction of the MACs of its run's dense model.
    """

    run: str
    model: Model
    kept: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        runs: By what they are called.
    """

    runs: Mapping[str, Run]

    @property
    def splits(self) -> list[str]:
        """Every split that a run measured on."""
        return list(dict.fromkeys(split for run in self.runs.values() for split in run.splits))

    @property
    def backends(self) -> list[str]:
        """Every backend that a run timed on."""
        return list(dict.fromkeys(backend for run in self.runs.values() for backend in run.backends))

    def rows(self) -> list[Row]:
        """Return every model of every run."""
        return list(self._rows())

    def _rows(self) -> Iterator[Row]:
        for name, run in self.runs.items():
            dense = run.model("dense")
            whole = dense.macs if dense else None
            for model in run.models:
                kept = model.macs / whole if model.macs is not None and whole else None
                yield Row(run=name, model=model, kept=kept)

    def lacking(self) -> dict[str, list[tuple[str, str]]]:
        """Return, by run, the setting that asks for each control that it lacks, and what that is."""
        found = {
            name: [how for control, how in CONTROLS.items() if run.model(control) is None]
            for name, run in self.runs.items()
        }
        return {name: lacks for name, lacks in found.items() if lacks}

    def differences(self) -> list[str]:
        """Return what the runs do not have in common, and what follows from it."""
        found = {what: self._values(what) for what in SAME}
        return [
            f"{what} differs ({', '.join(values)}): {SAME[what][1]}"
            for what, values in found.items()
            if len(values) > 1
        ]

    def _values(self, what: str) -> list[str]:
        """Return the different values of something that runs should have in common, of those that tell it."""
        found = [SAME[what][0](run) for run in self.runs.values()]
        return list(dict.fromkeys(str(value) for value in found if value is not None))

    @property
    def comparable(self) -> bool:
        """Whether the mAP of one run says anything beside that of another."""
        return all(len(self._values(what)) < 2 for what in ACCURACY)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        runs = {name: run.to_json() for name, run in self.runs.items()}
        return {"runs": runs, "differences": self.differences(), "lacking": self.lacking()}

    def table(self) -> str:
        """Return one row a model, then what has to be known to read them."""
        headings = [f"{PRECISION} {split}" for split in self.splits]
        columns = ["run", "model", "epochs", "MACs", "kept", "params", *headings, *self.backends]
        rows = [self._cells(row) for row in self.rows()]
        text = render(columns, rows, words=["model", *self.backends])
        text += f"{TIMED}\n" if self.backends else ""
        text += "".join(f"{difference}\n" for difference in self.differences())
        return text + "".join(
            f"{run} lacks a control, `{setting}`: {what}\n"
            for run, lacks in self.lacking().items()
            for setting, what in lacks
        )

    def _cells(self, row: Row) -> list[str]:
        model = row.model
        cells = [row.run, model.name, str(model.epochs)]
        cells += [_shown(model.macs, quantity), _shown(row.kept, lambda kept: f"{kept:.1%}")]
        cells += [_shown(model.params, quantity)]
        for split in self.splits:
            cells.append(_shown(model.precisions.get(split, {}).get(PRECISION), lambda value: f"{value:.3f}"))
        return cells + [speed(model, backend) for backend in self.backends]


TIMED = "speed against the dense model of the same run, which was timed in turns with it"


def speed(model: Model, backend: str) -> str:
    """Return what may be said of the speed of a model against the dense one of its run."""
    ratio = model.speed_up.get(backend)
    return in_words(ratio) if ratio else "-"


def _shown(value: float | None, show: Callable[[float], str]) -> str:
    return "-" if value is None else show(value)


def _data_sha256(run: Run) -> str | None:
    """Return the start of the hash of the data yaml; None in an older record."""
    digest = (run.settings.get(HASHES) or {}).get(str(run.settings.get("data")))
    return None if digest is None else str(digest)[:12]


def called(folders: Sequence[Run]) -> dict[str, Run]:
    """Return runs by the name of their folder, or by its path where names are the same."""
    names = [run.folder.absolute().name for run in folders]
    return {name if names.count(name) == 1 else str(run.folder): run for name, run in zip(names, folders, strict=True)}


def render_comparison(comparison: Comparison) -> str:
    """Return the page of a comparison."""
    rows = comparison.rows()
    return page(
        "compare.html",
        title=", ".join(comparison.runs) if len(comparison.runs) < 4 else f"{len(comparison.runs)} runs",
        comparison=comparison,
        rows=rows,
        names=MODELS,
        plots=[
            compared([row.model for row in rows], split, front=comparison.comparable) for split in comparison.splits
        ],
        precision=PRECISION,
        speed=speed,
        timed=TIMED,
        folders=[(name, str(run.folder)) for name, run in comparison.runs.items()],
        version=__version__,
    )
