"""The figures of candidates: how well scores rank what fine-tunes bring, as a table and as a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from svg_picture import svg_picture

from yolo_prune.report import render

PLACE = ("model", "data", "criterion", "target_macs", "largest", "epochs", "batches", "seed", "imgsz_px", "batch")
"""What candidates that are compared with each other share."""

SCORES = {"recalibrated": "recalibrated", "as_pruned": "as pruned"}


@dataclass(frozen=True, kw_only=True)
class SearchFigures:
    """Scored and fine-tuned candidates.

    Attributes:
        lines: Of the record.
        pricing: Candidates priced a second, and counted ones; of this run, empty if there was none.
    """

    lines: list[dict[str, Any]]
    pricing: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {"candidates": self.lines, "pricing": self.pricing}

    def table(self, *, markdown: bool = False) -> str:
        """Return Spearman's rank correlation of both scores with the mAP after the fine-tune."""
        rows = []
        for group in self._groups():
            cell, tuned = group[0]["cell"], [line["fine_tuned"] for line in group]
            ranks = [spearmanr([line[key] for line in group], tuned) for key in SCORES]
            rows.append(
                [f"{cell['data']}, {cell['imgsz_px']} px, {cell['target_macs']:.0%} MACs", cell["criterion"],
                 str(len(group)), str(cell["epochs"]), f"{min(tuned):.3f}..{max(tuned):.3f}",
                 *(f"{rank.statistic:+.2f} (p {rank.pvalue:.3f})" for rank in ranks)]
            )  # fmt: skip
        head = ["candidates of", "criterion", "number", "epochs", "mAP50-95 val after them"]
        text = render([*head, *(f"Spearman, {name}" for name in SCORES.values())], rows, markdown=markdown)
        if self.pricing:
            text += f"priced on one core: {self.pricing['a_second']:,} candidates a second\n"
            if one := self.pricing.get("counted"):
                text += f"MACs counted by a forward pass = priced: {one['equal']} of {one['candidates']}\n"
        return text

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
            found.setdefault(tuple(line["cell"][key] for key in PLACE), []).append(line)
        return [group for group in found.values() if len(group) > 2]


def _scatter(axes: Any, group: list[dict[str, Any]], key: str, name: str) -> None:
    cell = group[0]["cell"]
    axes.scatter([line[key] for line in group], [line["fine_tuned"] for line in group])
    axes.set(
        title=f"{cell['criterion']}, {name}",
        xlabel="mAP50-95 on held-out training images, before",
        ylabel=f"mAP50-95 on val after {cell['epochs']} epochs",
    )
