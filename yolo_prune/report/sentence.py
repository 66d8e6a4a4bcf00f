"""What a run found, in plain words."""

from __future__ import annotations

from yolo_prune.report.records import PRECISION, Model, Run
from yolo_prune.report.summary import in_words


def sentences(run: Run) -> list[str]:
    """Return what became of the model, in a few sentences; "faster" only where the record's intervals part."""
    dense, slim = run.model("dense"), run.model("slim")
    if slim is None or dense is None:
        return ["This run has pruned nothing yet."]
    return [*_size(dense, slim), *_stripes(run), *_accuracy(run, dense, slim), *_speed(slim)]


def _size(dense: Model, slim: Model) -> list[str]:
    if not (dense.macs and dense.params) or slim.macs is None or slim.params is None:
        return []
    return [
        f"The slim model keeps {slim.macs / dense.macs:.1%} of the MACs and {slim.params / dense.params:.1%} of the "
        "parameters."
    ]


def _stripes(run: Run) -> list[str]:
    """Return the share of living stripes, where their training came to an end: no export is that small."""
    return [
        f"Its living stripes are {course.macs[-1][1]:.1%} of the MACs that their training began with, which is no "
        "latency: an export computes the dead ones, too."
        for course in run.methods
        if course.method == "stripes" and course.model == "slim" and course.macs
    ]


def _accuracy(run: Run, dense: Model, slim: Model) -> list[str]:
    figures = [
        (split, slim.precisions[split][PRECISION], dense.precisions[split][PRECISION])
        for split in run.splits
        if split in slim.precisions and split in dense.precisions
    ]
    told = [f"{after:.3f} on {split}, where the dense one has {before:.3f}" for split, after, before in figures]
    return [f"Its {PRECISION} is {'; '.join(told)}."] if told else []


def _speed(slim: Model) -> list[str]:
    told = [f"{backend} {in_words(ratio)}" for backend, ratio in slim.speed_up.items()]
    return [f"Timed in turns with the dense one: {'; '.join(told)}."] if told else ["Its latency was not measured."]
