"""What a run found, in plain words."""

from __future__ import annotations

from yolo_prune.report.methods import TOLD
from yolo_prune.report.records import PRECISION, MethodCourse, Model, Run
from yolo_prune.report.summary import in_words


def sentences(run: Run) -> list[str]:
    """Return what became of the model, in a few sentences; "faster" only where the record's intervals part."""
    dense, slim = run.model("dense"), run.model("slim")
    if slim is None or dense is None:
        return ["This run has pruned nothing yet."]
    return [*_size(dense, slim), *_of_methods(run), *_accuracy(run, dense, slim), *_speed(slim)]


def _size(dense: Model, slim: Model) -> list[str]:
    if not (dense.macs and dense.params) or slim.macs is None or slim.params is None:
        return []
    return [
        f"The slim model keeps {slim.macs / dense.macs:.1%} of the MACs and {slim.params / dense.params:.1%} of the "
        "parameters."
    ]


def _of_methods(run: Run) -> list[str]:
    """Return what the methods that made the slim model have to add, where their training came to an end."""
    told = [(TOLD[course.method].sentence, course.macs[-1][1]) for course in run.methods if _made_slim(course)]
    return [sentence.format(kept=kept) for sentence, kept in told if sentence]


def _made_slim(course: MethodCourse) -> bool:
    return course.model == "slim" and bool(course.macs)


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
