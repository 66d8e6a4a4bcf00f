"""The figures of candidates: how well scores rank what fine-tunes bring, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata, spearmanr
from svg_picture import svg_picture

from yolo_prune.importance import FloatArray
from yolo_prune.report import render

PLACE = ("model", "data", "criterion", "target_macs", "largest", "epochs", "batches", "seed", "imgsz_px", "batch")
"""What candidates that are compared with each other share."""

SCORES = {"recalibrated": "recalibrated", "as_pruned": "as pruned"}

DRAWS = 10_000
"""Resamples of the candidates, for the interval of a difference."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much one score ranks candidates better than another one.

    Attributes:
        value: Difference of the two rank correlations.
        low: 2.5th percentile of it over resampled candidates.
        high: 97.5th percentile.
        undefined: Share of the resamples in which a score is the same for all candidates; they are left out.
    """

    value: float
    low: float
    high: float
    undefined: float

    def in_words(self) -> str:
        """Return it with its interval."""
        left_out = f", {self.undefined:.0%} of the draws undefined" if self.undefined >= 0.005 else ""
        return f"{self.value:+.2f} ({self.low:+.2f}..{self.high:+.2f}{left_out})"


def difference(first: npt.ArrayLike, second: npt.ArrayLike, tuned: npt.ArrayLike) -> Difference:
    """Compare the rank correlations of two scores with what fine-tunes brought, by a paired bootstrap.

    Args:
        first: One score a candidate, shape (candidates,).
        second: Another one.
        tuned: mAP after the fine-tunes.
    """
    values = np.array([first, second, tuned], dtype=np.float64)
    count = values.shape[1]
    drawn = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    one, other, after = (rankdata(row[np.vstack([np.arange(count), drawn])], axis=1) for row in values)
    found = _correlation(one, after) - _correlation(other, after)
    known = found[1:][np.isfinite(found[1:])]
    low, high = np.percentile(known, [2.5, 97.5])
    return Difference(value=float(found[0]), low=float(low), high=float(high), undefined=1.0 - len(known) / DRAWS)


def _correlation(ranks: FloatArray, after: FloatArray) -> FloatArray:
    """Return Pearson's correlation of every row, shape (rows,); NaN where a row has one value."""
    ranks, after = (values - values.mean(axis=1, keepdims=True) for values in (ranks, after))
    scale = np.sqrt((ranks**2).sum(axis=1) * (after**2).sum(axis=1))
    return np.divide((ranks * after).sum(axis=1), scale, out=np.full(len(scale), np.nan), where=scale > 0)


@dataclass(frozen=True, kw_only=True)
class SearchFigures:
    """Scored and fine-tuned candidates, and how fast and how rightly candidates are priced.

    Attributes:
        lines: Of the record, of all three kinds.
    """

    lines: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {"lines": self.lines}

    def table(self, *, markdown: bool = False) -> str:
        """Return Spearman's rank correlation of both scores with the mAP after the fine-tune."""
        rows = []
        for group in self._groups():
            cell, tuned = group[0]["cell"], [line["fine_tuned"] for line in group]
            both = [[line[key] for line in group] for key in SCORES]
            known = all(len(set(values)) > 1 for values in (*both, tuned))
            rows.append(
                [f"{cell['data']}, {cell['imgsz_px']} px, {cell['target_macs']:.0%} MACs", cell["criterion"],
                 str(len(group)), str(cell["epochs"]), f"{min(tuned):.3f}..{max(tuned):.3f}",
                 *(_rank(scores, tuned) for scores in both),
                 difference(both[0], both[1], tuned).in_words() if known else "undefined",
                 _rank([line["macs"] for line in group], tuned)]
            )  # fmt: skip
        head = ["candidates of", "criterion", "number", "epochs", "mAP50-95 val after them"]
        head += [*(f"Spearman, {name}" for name in SCORES.values()), "difference (95%)", "Spearman, MACs"]
        told = "".join(_pricing(line) for line in self.lines)
        return render(head, rows, markdown=markdown) + ("\n" if markdown and told else "") + told

    def draw(self, path: Path) -> None:
        """Draw scores against what the fine-tune brought, one panel a score and row."""
        groups = self._groups()
        if not groups:
            return
        with svg_picture(path, size=(10, 4 * len(groups))) as figure:
            panels = figure.subplots(len(groups), len(SCORES), squeeze=False)
            for row, group in zip(panels, groups, strict=True):
                for axes, (key, name) in zip(row, SCORES.items(), strict=True):
                    _scatter(axes, group, key, name)

    def _groups(self) -> list[list[dict[str, Any]]]:
        """Return the candidates that are compared with each other, at least three."""
        found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for line in self.lines:
            if "fine_tuned" in line:
                found.setdefault(tuple(line["cell"][key] for key in PLACE), []).append(line)
        return [group for group in found.values() if len(group) > 2]


def _rank(scores: Sequence[float], tuned: Sequence[float]) -> str:
    """Say how scores, or costs, rank what fine-tunes brought; equal ones rank nothing."""
    distinct = len(set(scores))
    if distinct > 1 and len(set(tuned)) > 1:
        found = spearmanr(scores, tuned)
        told = f"{found.statistic:+.2f} (p {found.pvalue:.3f})"
    else:
        told = f"undefined: all {'scores' if distinct == 1 else 'mAPs'} equal"
    return f"{told}, {distinct} distinct"


def _pricing(line: dict[str, Any]) -> str:
    """Say what a line tells of pricing; nothing of a candidate."""
    cell = line["cell"]
    where = f"model {cell['model']} at {cell['imgsz_px']} px"
    if "a_second" in line:
        return f"priced on one core ({line['machine']['cpu']}), {where}: {line['a_second']:,} candidates a second\n"
    if "equal" in line:
        return f"MACs counted by a forward pass = priced, {where}: {line['equal']} of {cell['candidates']}\n"
    return ""


def _scatter(axes: Any, group: list[dict[str, Any]], key: str, name: str) -> None:
    cell = group[0]["cell"]
    axes.scatter([line[key] for line in group], [line["fine_tuned"] for line in group])
    axes.set(
        title=f"{cell['criterion']}, {name}",
        xlabel="mAP50-95 on held-out training images, before",
        ylabel=f"mAP50-95 on val after {cell['epochs']} epochs",
    )
    axes.locator_params(axis="x", nbins=4)
