"""`cliff`: how far a checkpoint can be cut before its recalibrated mAP breaks away.

The score of plans at evenly spaced budgets, then at budgets in the middle of the steepest stretch between two of them.
The plan at the upper end of that stretch is `edge.json` in the folder, which `prune plan=` applies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from yolo_prune.allocation import PATHS, Budget
from yolo_prune.allocation.budget import lowest_ratio, meet
from yolo_prune.channels import IntArray
from yolo_prune.configuration import require_choice, require_least, setting
from yolo_prune.errors import ConfigError
from yolo_prune.files import write_json
from yolo_prune.pipeline.candidates import Candidates, CandidatesConfig, check
from yolo_prune.plan import PrunePlan
from yolo_prune.report import quantity, render

EDGE = "edge.json"

NARROW = 0.01
"""A stretch of budgets that is not halved any more."""


@dataclass(kw_only=True)
class CliffConfig(CandidatesConfig):
    """Settings of `cliff`."""

    allocation: str = setting("global", help=f"how many channels go where: {', '.join(PATHS)}")
    lowest: float = setting(0.1, help="least fraction of the MACs that is tried")
    points: int = setting(9, help="budgets, evenly spaced below the dense model")
    halvings: int = setting(4, help="halvings of the steepest stretch")


@dataclass(frozen=True, kw_only=True)
class Cliff:
    """Where the score breaks away.

    Attributes:
        lines: The record: the dense model and every budget, the largest first.
        edge: The line at the upper end of the steepest stretch.
        foot: The line at its lower end.
        plan: The plan of the edge; None if that is the dense model.
        path: Where it stands.
        model: The checkpoint.
    """

    lines: list[dict[str, Any]]
    edge: dict[str, Any]
    foot: dict[str, Any]
    plan: PrunePlan | None
    path: Path
    model: str

    def to_json(self) -> dict[str, Any]:
        """Return the lines and the edge as plain values."""
        return {"budgets": self.lines, "edge": self.edge, "foot": self.foot}

    def table(self) -> str:
        """Return one row a budget, and where the cliff is."""
        dense = self.lines[0]
        rows = [
            [f"{line['macs'] / dense['macs']:.1%}", quantity(line["macs"]), quantity(line["params"]),
             f"{line['score']:.3f}", f"{line['score'] - dense['score']:+.3f}",
             {self.edge["number"]: "edge", self.foot["number"]: "foot"}.get(line["number"], "")]
            for line in self.lines
        ]  # fmt: skip
        kept = [line["macs"] / dense["macs"] for line in (self.edge, self.foot)]
        lost = self.edge["score"] - self.foot["score"]
        text = render(["MACs kept", "MACs", "params", "mAP50-95 held out", "change", ""], rows)
        text += (
            f"steepest from {kept[0]:.1%} to {kept[1]:.1%} of the MACs: {lost:.3f} of mAP50-95, before any fine-tune\n"
        )
        if self.plan is not None:
            text += f"the edge: yolo-prune prune model={self.model} plan={self.path} out=slim.pt\n"
        return text


def cliff(config: CliffConfig) -> Cliff:
    """Score budgets and find the steepest stretch.

    Raises:
        YoloPruneError: Bad input, or a folder of other candidates; what was scored stays.
    """
    constraints = check(config)
    require_choice("allocation", config.allocation, PATHS)
    require_least(config, points=1, halvings=0)
    if not 0.0 < config.lowest < 1.0:
        raise ConfigError(f"lowest={config.lowest:g}", expected="a number above 0 and below 1")
    with Candidates(config, constraints, kind="cliff", results=(EDGE,)) as candidates:
        return _walked(config, candidates)


def _walked(config: CliffConfig, candidates: Candidates) -> Cliff:
    for numbers in _rounds(config, candidates):
        widths = {number: _widths(candidates, config, ratio) for number, ratio in numbers.items()}
        candidates.score(widths, {number: {"ratio": ratio} for number, ratio in numbers.items()})
        candidates.require_none_failed()
    lines = _descending(candidates.lines.values())
    edge, foot = steepest(lines)
    plan, path = None, candidates.folder / EDGE
    if edge["number"]:
        plan = candidates.plan(np.array(edge["widths"]), {"target_macs": edge["ratio"], "score": edge["score"]})
        write_json(path, plan.to_json(), replace=True)
    return Cliff(lines=lines, edge=edge, foot=foot, plan=plan, path=path, model=config.model)


def _rounds(config: CliffConfig, candidates: Candidates) -> Iterator[dict[int, float]]:
    """Yield fractions of the MACs by number: the dense model and even steps, then one halving after the other."""
    lowest = max(config.lowest, lowest_ratio(candidates.graph, _budget(config, 0.5), candidates.solver))
    yield dict(enumerate(np.linspace(1.0, lowest, config.points + 1).tolist()))
    for number in range(config.points + 1, config.points + 1 + config.halvings):
        known = [candidates.lines[one] for one in range(number)]
        edge, foot = steepest(_descending(known))
        if edge["ratio"] - foot["ratio"] < NARROW:
            return
        yield {number: (edge["ratio"] + foot["ratio"]) / 2.0}


def _descending(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(lines, key=lambda line: (-line["macs"], line["number"]))


def steepest(lines: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ends of the stretch that loses most for the MACs that it saves, of lines with ever fewer MACs."""

    def slope(stretch: tuple[Mapping[str, Any], Mapping[str, Any]]) -> float:
        upper, lower = stretch
        return float((upper["score"] - lower["score"]) / (upper["macs"] - lower["macs"]))

    stretches = [pair for pair in pairwise(lines) if pair[0]["macs"] > pair[1]["macs"]]
    return max(stretches, key=slope, default=(lines[0], lines[-1]))


def _widths(candidates: Candidates, config: CliffConfig, ratio: float) -> IntArray:
    """Return the widths of a budget; the dense model's at 1."""
    if ratio >= 1.0:
        return candidates.graph.widths()
    budget = _budget(config, ratio)
    path = PATHS[config.allocation](candidates.graph, candidates.scores, candidates.solver, budget)
    return meet(candidates.graph, budget, candidates.solver, path)


def _budget(config: CliffConfig, ratio: float) -> Budget:
    return Budget(unit="macs", ratio=ratio, imgsz_px=config.imgsz)
