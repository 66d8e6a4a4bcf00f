"""The plots of a report, one function each: from records to a drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from yolo_prune.report.figures import COLOURS, MARKERS, Plot, drawing
from yolo_prune.report.records import (
    PRECISION,
    Candidate,
    MethodCourse,
    Model,
    Run,
    SparsityCourse,
    Tuned,
    Width,
)
from yolo_prune.report.table import quantity

HALF, WIDE = (4.7, 3.3), (9.6, 3.0)
"""Sizes in inches: of a plot that a phone shows whole, and of one that it scrolls."""

LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
"""Dashes and markers of lines that share a model's colour."""

RIDGES = 9
"""Epochs whose distribution is drawn."""


def colour(name: str) -> str:
    """Return the colour of a model; others than the known ones share one."""
    return COLOURS.get(name, COLOURS["accent"])


def latencies(run: Run) -> Plot:
    """Draw medians, quartiles and the range from the 5th to the 95th percentile, by backend and model."""
    plot = Plot(
        name="latency",
        title="Latency by backend",
        description="Dot: median; thick: quartiles; thin: 5th to 95th percentile of interleaved timings, in ms.",
    )
    rows = [(backend, model) for backend in run.backends for model in run.models if backend in model.latency_ms]
    with drawing(plot, size=(HALF[0], 0.8 + 0.34 * len(rows))) as (axes,):
        for place, (backend, model) in enumerate(rows):
            found = model.latency_ms[backend]
            axes.plot([found.p5, found.p95], [place, place], color=colour(model.name), linewidth=1.2)
            axes.plot([found.p25, found.p75], [place, place], color=colour(model.name), linewidth=6, alpha=0.45)
            axes.plot(found.median, place, MARKERS.get(model.name, "o"), color=colour(model.name), markersize=6)
        axes.set_yticks(range(len(rows)), [f"{backend}, {model.name}" for backend, model in rows])
        axes.set(xlabel="latency in ms", xlim=(0.0, None), ylim=(len(rows) - 0.5, -0.5))
        axes.grid(visible=False, axis="y")
    return plot


def accuracy(run: Run, split: str) -> Plot:
    """Draw mAP against MACs and against the latency of every backend."""
    plot = Plot(
        name="accuracy",
        title=f"{PRECISION} on {split} against cost",
        description="Up and to the left is better. A line joins the models that no other one beats in both.",
        wide=True,
    )
    panels = ["MACs", *run.backends]
    with drawing(plot, columns=len(panels), size=(max(HALF[0], 2.4 * len(panels)), WIDE[1])) as drawn:
        for axes, panel in zip(drawn, panels, strict=True):
            points = [(model, _cost(model, panel), _precision(model, split)) for model in run.models]
            _scatter_models(axes, [point for point in points if None not in point[1:]])  # type: ignore[misc]
            if panel == "MACs":
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
            axes.set(xlabel="MACs" if panel == "MACs" else f"{panel}, ms", xlim=(0.0, None))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.sharey(drawn[0])
            axes.label_outer()
        drawn[0].set_ylabel(f"{PRECISION} {split}")
    return plot


def _cost(model: Model, panel: str) -> float | None:
    latency = model.latency_ms.get(panel)
    return model.macs if panel == "MACs" else latency.median if latency else None


def _precision(model: Model, split: str) -> float | None:
    return model.precisions.get(split, {}).get(PRECISION)


def _scatter_models(axes: Axes, points: Sequence[tuple[Model, float, float]]) -> None:
    front = pareto([(cost, value) for _, cost, value in points])
    axes.plot([cost for cost, _ in front], [value for _, value in front], color=COLOURS["line"], linewidth=1.5)
    for model, cost, value in points:
        axes.plot(cost, value, MARKERS.get(model.name, "o"), color=colour(model.name), markersize=8)
        axes.annotate(model.name, (cost, value), (0, -13), textcoords="offset points", fontsize=9, ha="center")
    axes.margins(x=0.2, y=0.25)


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points, as (cost, value), that no other one beats: costs no more, worth no less, and not equal."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def widths(layers: Sequence[Width]) -> Plot:
    """Draw the widths of all layers before and after."""
    plot = Plot(
        name="widths",
        title="Widths by layer",
        description="Outline: channels before pruning; filled: after. Layers from the input to the head.",
        wide=True,
    )
    places = np.arange(len(layers))
    with drawing(plot, size=WIDE) as (axes,):
        after = [0 if layer.after is None else layer.after for layer in layers]
        axes.bar(places, after, width=0.75, color=COLOURS["slim"], label="slim")
        axes.step(
            np.append(places, len(layers)) - 0.5, [*(layer.before for layer in layers), layers[-1].before],
            where="post", color=COLOURS["dense"], linewidth=1.4, label="dense",
        )  # fmt: skip
        ticks = _first_of_each_block([layer.name for layer in layers])
        axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=9)
        axes.set(xlabel="top-level layer", ylabel="channels", xlim=(-0.5, len(layers) - 0.5))
        axes.grid(visible=False, axis="x")
        axes.figure.legend(loc="outside upper right", ncols=2)
    return plot


def _first_of_each_block(names: Sequence[str]) -> list[tuple[int, str]]:
    """Return place and number of the top-level layers (`model.2.cv1.conv` is of 2), without those that crowd."""
    blocks = [name.split(".")[1] if name.count(".") else name for name in names]
    ticks: list[tuple[int, str]] = []
    for place, block in enumerate(blocks):
        if not place or (blocks[place - 1] != block and place - ticks[-1][0] > len(names) // 40):  # room for its text
            ticks.append((place, block))
    return ticks


def scales(course: SparsityCourse) -> Plot:
    """Draw how batch-norm scales are distributed after some epochs, one ridge each."""
    plot = Plot(
        name=f"scales-{course.model}",
        title=f"Batch-norm scales over the epochs of the {course.model} model",
        description="A ridge is the distribution of the penalised scales after an epoch, the first one at the top; "
        "left of the dotted line a channel is silent.",
    )
    chosen = [course.epochs[index] for index in _spread(len(course.epochs), RIDGES)]
    edges = np.linspace(0.0, course.largest, len(chosen[0].histogram) + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    with drawing(plot, size=(HALF[0], 4.0)) as (axes,):
        for place, epoch in enumerate(chosen):
            height = np.sqrt(np.array(epoch.histogram) / max(sum(epoch.histogram), 1))
            base = float(-place)
            axes.fill_between(centres, base, base + 1.6 * height, color=COLOURS["slim"], alpha=0.35, linewidth=0)
            axes.plot(centres, base + 1.6 * height, color=COLOURS["slim"], linewidth=1.1)
        axes.axvline(course.silent_below, color=COLOURS["ink"], linestyle=":", linewidth=1)
        axes.set_yticks([-place for place in range(len(chosen))], [str(epoch.epoch) for epoch in chosen])
        axes.set(xlabel="batch-norm scale (height: root of share)", ylabel="after epoch", xlim=(0.0, course.largest))
        axes.grid(visible=False, axis="y")
    return plot


def _spread(length: int, count: int) -> list[int]:
    """Return at most `count` indices below `length`, the first and the last among them."""
    return sorted({int(index) for index in np.linspace(0, length - 1, min(length, count)).round()})


def silence(course: SparsityCourse) -> Plot:
    """Draw the share of silent channels, and the MACs without them, over the epochs."""
    plot = Plot(
        name=f"silent-{course.model}",
        title=f"Silent channels over the epochs of the {course.model} model",
        description="Solid: share of the penalised channels that are silent; dashed: MACs of the network without them.",
    )
    epochs = [epoch.epoch for epoch in course.epochs]
    with drawing(plot, size=(HALF[0], 4.0)) as (axes,):
        axes.plot(epochs, [epoch.silent for epoch in course.epochs], color=COLOURS["slim"], label="silent channels")
        axes.plot(
            epochs, [epoch.macs for epoch in course.epochs], "--", color=COLOURS["dense"], label="MACs without them"
        )
        axes.set(xlabel="epoch", ylabel="fraction", ylim=(0.0, 1.05))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.figure.legend(loc="outside upper center", ncols=2)
    return plot


def courses(found: Sequence[MethodCourse]) -> Plot:
    """Draw what was left of the MACs over the epochs of trainings that prune."""
    plot = Plot(
        name="methods",
        title="MACs over the epochs of training",
        description="Fraction of the MACs that a training began with; of stripes, those of the living ones.",
    )
    with drawing(plot, size=HALF) as (axes,):
        for course, (dashes, marker) in zip(found, cycle(LINES)):
            epochs, kept = zip(*course.macs, strict=True)
            (line,) = axes.plot(epochs, kept, color=colour(course.model), label=f"{course.method}, {course.model}")
            line.set(linestyle=dashes, marker=marker, markersize=4)
        axes.set(xlabel="epoch", ylabel="fraction of the MACs", ylim=(0.0, 1.05))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.figure.legend(loc="outside upper center", ncols=2)
    return plot


def candidates(found: Sequence[Candidate]) -> Plot:
    """Draw the candidates of a search: score against MACs, with those that no other one beats."""
    plot = Plot(
        name="search",
        title="Candidates of the search",
        description="Score on held-out training images against MACs; a line joins the candidates that no other beats.",
    )
    with drawing(plot, size=HALF) as (axes,):
        _scored(axes, [(candidate.macs, candidate.score) for candidate in found])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="MACs")
    return plot


def predicted(found: Sequence[Candidate]) -> Plot:
    """Draw the candidates of a search whose latencies were predicted: score against these."""
    plot = Plot(
        name="search-latency",
        title="Candidates of the search, by latency",
        description="Score against the latency that a profile predicts; a line joins those that no other beats.",
    )
    with drawing(plot, size=HALF) as (axes,):
        _scored(axes, [(one.latency, one.score) for one in found if one.latency is not None])
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(xlabel="predicted latency, of the dense model's")
    return plot


def _scored(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Draw candidates as (cost, score), the best of them, and the front that no other one beats."""
    best = max(points, key=lambda point: (point[1], -point[0]))
    axes.plot(*zip(*points, strict=True), "o", color=COLOURS["dense"], markersize=4, alpha=0.6, label="candidate")
    axes.plot(*zip(*pareto(points), strict=True), "-o", color=COLOURS["slim"], markersize=5, label="Pareto front")
    axes.plot(*best, "*", color=COLOURS["accent"], markersize=13, label="best")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(ylabel=f"{PRECISION}, held out")
    axes.figure.legend(loc="outside upper center", ncols=3)


def correlation(tuned: Sequence[Tuned]) -> Plot:
    """Draw scores of candidates against what they reached after a fine-tune."""
    plot = Plot(
        name="correlation",
        title="Scores of candidates against mAP after their fine-tunes",
        description="Rising from left to right: the score ranks candidates as fine-tuning would.",
    )
    after = [one.fine_tuned for one in tuned]
    with drawing(plot, size=HALF) as (axes,):
        axes.plot([one.recalibrated for one in tuned], after, "o", color=COLOURS["slim"], label="recalibrated")
        axes.plot([one.as_pruned for one in tuned], after, "^", color=COLOURS["dense"], label="as pruned")
        axes.set(xlabel=f"score: {PRECISION}, held out", ylabel=f"{PRECISION} after the fine-tune")
        axes.figure.legend(loc="outside upper center", ncols=2)
    return plot


def compared(models: Sequence[Model], split: str, *, front: bool) -> Plot:
    """Draw mAP against MACs of models of several runs, each with its place in the list, from 1.

    Args:
        models: Of all runs.
        split: On which mAP was measured.
        front: Whether to join those that no other one beats, which makes sense on the same data alone.
    """
    joined = "; a line joins the models that no other one beats in both" if front else ""
    plot = Plot(
        name=f"compared-{split}",
        title=f"{PRECISION} on {split} against MACs, all runs",
        description=f"Numbers are those of the table. Up and to the left is better{joined}.",
    )
    places: dict[tuple[str, int, float], list[int]] = {}
    for number, model in enumerate(models, start=1):
        value = _precision(model, split)
        if model.macs is not None and value is not None:
            places.setdefault((model.name, model.macs, value), []).append(number)
    with drawing(plot, size=HALF) as (axes,):
        best = pareto([(macs, value) for _, macs, value in places]) if front else []
        axes.plot([macs for macs, _ in best], [value for _, value in best], color=COLOURS["line"], linewidth=1.5)
        for (name, macs, value), numbers in places.items():
            axes.plot(macs, value, MARKERS.get(name, "o"), color=colour(name), markersize=8)
            text = ", ".join(map(str, numbers))
            axes.annotate(text, (macs, value), (0, -13), textcoords="offset points", fontsize=9, ha="center")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.15, y=0.15)
        axes.set(xlabel="MACs", ylabel=f"{PRECISION} {split}", xlim=(0.0, None))
    return plot
