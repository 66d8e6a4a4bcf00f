"""The report of a run: one HTML file, readable without a network, without scripts, and on paper."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import spearmanr

from yolo_prune import __version__
from yolo_prune.report import plots
from yolo_prune.report.embedded import embedded
from yolo_prune.report.figures import Plot
from yolo_prune.report.methods import TOLD
from yolo_prune.report.pages import page
from yolo_prune.report.records import HASHES, MODELS, PRECISION, Candidate, MethodCourse, Model, Run, Tuned
from yolo_prune.report.sentence import sentences
from yolo_prune.report.summary import in_words


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure that is read first: before, after, and what became of it."""

    name: str
    before: float
    after: float
    change: str
    digits: int | None = None


def render_report(run: Run) -> str:
    """Return the page of a run."""
    return page(
        "report.html",
        run=run,
        title=title_of(run),
        sentences=sentences(run),
        tiles=list(_tiles(run)),
        names=MODELS,
        plots=_plots(run),
        pictures=[(found, embedded(run.folder, found)) for found in run.detections],
        in_words=in_words,
        conditions=conditions(run),
        rank=_rank(run.tuned),
        methods=[(course, TOLD[course.method], facts_of(course, run)) for course in run.methods],
        made_with=list(made_with(run)),
        settings=yaml.safe_dump(settings_of(run), sort_keys=False, allow_unicode=True),
        commands=commands(run),
        version=__version__,
    )


def title_of(run: Run) -> str:
    """Return what a run is called: its model and its folder."""
    return f"{Path(str(run.settings.get('model', 'model'))).name}, {run.folder.absolute().name}"


def _tiles(run: Run) -> Iterator[Tile]:
    dense, slim = run.model("dense"), run.model("slim")
    if dense is None or slim is None:
        return
    for name, before, after in (("MACs", dense.macs, slim.macs), ("Parameters", dense.params, slim.params)):
        if before and after is not None:
            yield Tile(name=name, before=before, after=after, change=f"{after / before:.1%} kept")
    for split in run.splits:
        if split in dense.precisions and split in slim.precisions:
            was, now = dense.precisions[split][PRECISION], slim.precisions[split][PRECISION]
            yield Tile(name=f"{PRECISION} {split}", before=was, after=now, change=f"{now - was:+.3f}", digits=3)
    for backend, ratio in slim.speed_up.items():
        yield from _timed(backend, dense, slim, ratio)


def _timed(backend: str, dense: Model, slim: Model, ratio: Mapping[str, Any]) -> Iterator[Tile]:
    if backend in dense.latency_ms and backend in slim.latency_ms:
        before, after = dense.latency_ms[backend].median, slim.latency_ms[backend].median
        yield Tile(name=f"{backend}, ms", before=before, after=after, change=in_words(ratio), digits=1)


def _plots(run: Run) -> dict[str, list[Plot]]:
    """Return the plots of every section that has what it draws."""
    split = next((split for split in run.splits), None)
    precise = [model for model in run.models if model.macs is not None and split in model.precisions]
    return {
        "latency": [plots.latencies(run)] if run.backends else [],
        "accuracy": [plots.accuracy(run, str(split))] if precise else [],
        "widths": [plots.widths(run.widths)] if run.widths else [],
        "sparsity": [
            plot for course in run.sparsity if course.epochs for plot in (plots.scales(course), plots.silence(course))
        ],
        "methods": [plots.courses(lines)] if (lines := [one for one in run.methods if len(one.macs) > 1]) else [],
        "search": _searched(run.search),
        "correlation": [plots.correlation(run.tuned)] if run.tuned else [],
    }


def _searched(found: Sequence[Candidate]) -> list[Plot]:
    """Return the pictures of a search: its front in MACs, and in latency where that was predicted."""
    timed = any(candidate.latency is not None for candidate in found)
    return [plots.candidates(found), *([plots.predicted(found)] if timed else [])] if found else []


def conditions(run: Run) -> str:
    """Return under which conditions latencies were measured, as far as the records tell."""
    units = {"imgsz": "px", "runs": "runs", "threads": "threads"}
    told = [f"{run.settings[key]} {unit}" for key, unit in units.items() if key in run.settings]
    machine = [str(run.machine["cpu"])] if "cpu" in run.machine else []
    return f"{', '.join(['Batch 1', *told, *machine])}."


def facts_of(course: MethodCourse, run: Run) -> tuple[tuple[str, str], ...]:
    """Return what is told of a method: its record's facts, and what an export computes where it counts otherwise."""
    dense, slim = run.model("dense"), run.model("slim")
    if TOLD[course.method].computed or dense is None or slim is None or not dense.macs or slim.macs is None:
        return course.facts
    return (*course.facts, ("MACs of an export", f"{slim.macs / dense.macs:.1%} of the dense model's"))


def _rank(tuned: tuple[Tuned, ...]) -> dict[str, float | None]:
    """Return Spearman's rank correlation of the scores with what the fine-tunes brought; none of fewer than three.

    It is None where all are equal, so that nothing is ranked.
    """
    if len(tuned) < 3:
        return {}
    after = [one.fine_tuned for one in tuned]
    scores = {"recalibrated": [one.recalibrated for one in tuned], "as pruned": [one.as_pruned for one in tuned]}
    return {
        name: float(spearmanr(score, after).statistic) if min(len(set(score)), len(set(after))) > 1 else None
        for name, score in scores.items()
    }


def settings_of(run: Run) -> dict[str, Any]:
    """Return what the settings file of the run said; its record also holds hashes of the files that it names."""
    return {key: value for key, value in run.settings.items() if key != HASHES}


def made_with(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the versions, the machine and the hashes that the records tell."""
    yield "yolo_prune", run.version or "not recorded"
    yield from facts(run.machine)
    for name, digest in (run.settings.get(HASHES) or {}).items():
        yield f"SHA-256 of {name}", str(digest)


def facts(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the entries of a record as (name, value), those of its parts under both names."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from facts(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", str(value)


def commands(run: Run) -> list[str]:
    """Return what to type to run this again and to use its result."""
    folder, best = shlex.quote(str(run.folder)), shlex.quote(str(run.folder / "slim" / "weights" / "best.pt"))
    typed = [f"yolo-prune run settings.yaml out={folder}", f"yolo-prune report run={folder}"]
    if run.model("slim") is not None:
        typed.append(f"yolo-prune export model={best} imgsz={run.settings.get('imgsz', 640)} out=exports")
    return typed
