"""`search`: the best of many plans, by the mAP of slim networks with recalibrated batch norms (EagleEye).

The best one is a plan, `best.json` in the search's folder, which `prune plan=` applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_prune.allocation import Budget
from yolo_prune.configuration import require_choice, require_least, setting
from yolo_prune.files import write_json
from yolo_prune.pipeline.candidates import Candidates, CandidatesConfig, check
from yolo_prune.plan import PrunePlan
from yolo_prune.report import quantity, render
from yolo_prune.search.sampling import Candidate, Sampler
from yolo_prune.search.strategies import STRATEGIES

BEST = "best.json"


@dataclass(kw_only=True)
class SearchConfig(CandidatesConfig):
    """Settings of `search`."""

    target_macs: float = setting(help="fraction of the MACs that is kept, e.g. 0.5")
    candidates: int = setting(50, help="plans that are scored")
    strategy: str = setting("random", help=f"how they are chosen: {', '.join(STRATEGIES)}")
    largest: float = setting(0.7, help="largest fraction of a group that is drawn")


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What `search` found.

    Attributes:
        lines: The record: every candidate.
        plan: The best one.
        path: Where it stands.
        model: The checkpoint that it belongs to.
        images: Training images for recalibration and for scoring.
    """

    lines: list[dict[str, Any]]
    plan: PrunePlan
    path: Path
    model: str
    images: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Return the candidates and the best plan as plain values."""
        return {"candidates": self.lines, "best": self.plan.to_json(), "images": self.images}

    def table(self) -> str:
        """Return the best ten candidates, how they were drawn, and what to do next."""
        best = sorted(self.lines, key=_rank)[:10]
        rows = [
            [str(line["number"]), quantity(line["macs"]), quantity(line["params"]), f"{line['score']:.3f}"]
            for line in best
        ]
        scores, drawn = [line["score"] for line in self.lines], [line for line in self.lines if line["tries"]]
        moved = sum(line["moved"] for line in drawn)
        accepted = (len(drawn) - moved) / max(sum(line["tries"] for line in drawn), 1)
        return (
            render(["candidate", "MACs", "params", "mAP50-95 held out"], rows)
            + f"{len(self.lines)} candidates: {min(scores):.3f} to {max(scores):.3f}, median {np.median(scores):.3f}\n"
            + f"{len(drawn)} drawn at random: {accepted:.1%} of the draws met the budget, "
            + f"{moved} candidates were moved onto it\n"
            + f"norms recalibrated on some of {self.images[0]} training images, scored on {self.images[1]} others\n"
            + f"the best plan: yolo-prune prune model={self.model} plan={self.path} out=slim.pt\n"
        )


def search(config: SearchConfig) -> SearchResult:
    """Score plans and write the best one.

    Raises:
        YoloPruneError: Bad input, or a folder of another search; what was scored stays.
    """
    constraints = check(config)
    require_choice("strategy", config.strategy, STRATEGIES)
    require_least(config, candidates=1)
    budget = Budget(unit="macs", ratio=config.target_macs, imgsz_px=config.imgsz)
    with Candidates(config, constraints, kind="search", result=BEST, also_may_change=("candidates",)) as candidates:
        return _searched(config, budget, candidates)


def _searched(config: SearchConfig, budget: Budget, candidates: Candidates) -> SearchResult:
    candidates.require_reachable(budget)
    sampler = Sampler(candidates.graph, candidates.solver, budget, largest=config.largest, seed=config.seed)
    strategy = STRATEGIES[config.strategy](sampler)
    for numbers in strategy.rounds(config.candidates):
        scored = {number: (np.array(line["widths"]), line["score"]) for number, line in candidates.lines.items()}
        drawn = {candidate.number: candidate for candidate in strategy.propose(numbers, scored)}
        candidates.score(
            {number: candidate.widths for number, candidate in drawn.items()},
            {number: _how(candidate) for number, candidate in drawn.items()},
        )
    lines = candidates.record.in_order()
    best = min(lines, key=_rank)
    plan = candidates.plan(np.array(best["widths"]), {"candidates": len(lines), "score": best["score"]})
    write_json(candidates.folder / BEST, plan.to_json(), replace=True)
    return SearchResult(
        lines=lines, plan=plan, path=candidates.folder / BEST, model=config.model, images=candidates.counts
    )


def _how(candidate: Candidate) -> dict[str, Any]:
    return {"tries": candidate.tries, "moved": candidate.moved}


def _rank(line: Mapping[str, Any]) -> tuple[float, int]:
    """Order candidates: the best score first, then the lower number."""
    return -line["score"], line["number"]
