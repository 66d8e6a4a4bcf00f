"""`search`: the best of many plans, by the mAP of slim networks with recalibrated batch norms (EagleEye).

The best one is a plan, `best.json` in the search's folder, which `prune plan=` applies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_prune.allocation import Budget
from yolo_prune.allocation.latency import LatencyModel
from yolo_prune.configuration import require_choice, require_least, setting
from yolo_prune.export.profile import Profile, profile_file
from yolo_prune.files import sha256, write_json
from yolo_prune.pipeline.candidates import Candidates, CandidatesConfig, check
from yolo_prune.pipeline.prune_config import loaded_profile, target_of
from yolo_prune.plan import PrunePlan
from yolo_prune.report import quantity, render
from yolo_prune.search.sampling import Candidate, Sampler
from yolo_prune.search.strategies import STRATEGIES

BEST, LATENCIES = "best.json", "latencies.json"


@dataclass(kw_only=True)
class SearchConfig(CandidatesConfig):
    """Settings of `search`."""

    target_macs: float | None = setting(None, help="fraction of the MACs that is kept, e.g. 0.5")
    target_latency: float | None = setting(
        None, help="fraction of the dense model's latency, as profile= predicts it; instead of target_macs"
    )
    profile: str | None = setting(
        None, help="what `profile` wrote: predicts every candidate's latency, and says of what widths are multiples"
    )
    candidates: int = setting(50, help="plans that are scored")
    strategy: str = setting("random", help=f"how they are chosen: {', '.join(STRATEGIES)}")
    largest: float | None = setting(
        None, help="largest fraction of a group that is drawn; default: what the budget asks for on average"
    )


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """What a profile predicts of candidates; nothing was timed.

    Attributes:
        measured_on: Backend, image side, threads of the profile.
        cpu: Of its machine.
        fractions: Latency as a fraction of the dense model's, by the candidate's number.
    """

    measured_on: str
    cpu: str
    fractions: Mapping[int, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"measured_on": self.measured_on, "cpu": self.cpu, "fractions": list(self.fractions.items())}

    def in_words(self) -> str:
        """Return what the column of latencies says, in a line."""
        return (
            f"latency: predicted fraction of the dense model's, {self.measured_on}, {self.cpu}; not timed: "
            "yolo-prune benchmark times the slim model\n"
        )


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What `search` found.

    Attributes:
        lines: The record: every candidate.
        latencies: What a profile predicts of them; None without one.
        plan: The best one.
        path: Where it stands.
        model: The checkpoint that it belongs to.
        images: Training images for recalibration and for scoring.
    """

    lines: list[dict[str, Any]]
    latencies: Latencies | None
    plan: PrunePlan
    path: Path
    model: str
    images: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Return the candidates and the best plan as plain values."""
        predicted = self.latencies.to_json() if self.latencies else None
        return {
            "candidates": self.lines, "latencies": predicted, "best": self.plan.to_json(), "images": self.images,
        }  # fmt: skip

    def table(self) -> str:
        """Return the best ten candidates, how they were drawn, and what to do next."""
        best = sorted(self.lines, key=_rank)[:10]
        head = ["candidate", "MACs", "params", *(["latency"] if self.latencies else []), "mAP50-95 held out"]
        rows = [
            [str(line["number"]), quantity(line["macs"]), quantity(line["params"]),
             *([f"{self.latencies.fractions[line['number']]:.1%}"] if self.latencies else []), f"{line['score']:.3f}"]
            for line in best
        ]  # fmt: skip
        scores, drawn = [line["score"] for line in self.lines], [line for line in self.lines if line["tries"]]
        failed = sum("failure" in line for line in self.lines)
        moved = sum(line["moved"] for line in drawn)
        accepted = (len(drawn) - moved) / max(sum(line["tries"] for line in drawn), 1)
        return (
            render(head, rows)
            + f"{len(self.lines)} candidates: {min(scores):.3f} to {max(scores):.3f}, median {np.median(scores):.3f}\n"
            + (f"{failed} of them failed, and count as 0; the same command tries them again\n" if failed else "")
            + f"{len(drawn)} drawn at random: {accepted:.1%} of the draws met the budget, "
            + f"{moved} candidates were moved onto it\n"
            + f"norms recalibrated on some of {self.images[0]} training images, scored on {self.images[1]} others\n"
            + (self.latencies.in_words() if self.latencies else "")
            + f"the best plan: yolo-prune prune model={self.model} plan={self.path} out=slim.pt\n"
        )


def search(config: SearchConfig) -> SearchResult:
    """Score plans and write the best one.

    Raises:
        YoloPruneError: Bad input, or a folder of another search; what was scored stays.
    """
    target_of(config, ("macs", "latency"))
    profile = loaded_profile(config.profile, target_latency=config.target_latency, imgsz_px=config.imgsz)
    constraints = check(config, profile)
    require_choice("strategy", config.strategy, STRATEGIES)
    require_least(config, candidates=1)
    decided_by = {}
    if config.target_latency is not None:  # otherwise a profile only tells more of the same candidates
        decided_by["profile_sha256"] = sha256(profile_file(Path(str(config.profile))))
    with Candidates(
        config, constraints, kind="search", results=(BEST, LATENCIES), also_may_change=("candidates", "profile"),
        decided_by=decided_by,
    ) as candidates:  # fmt: skip
        return _searched(config, profile, candidates)


def _searched(config: SearchConfig, profile: Profile | None, candidates: Candidates) -> SearchResult:
    model = None if profile is None else LatencyModel(candidates.graph, profile.fit)
    budget = (
        Budget(unit="macs", ratio=config.target_macs, imgsz_px=config.imgsz)
        if config.target_macs is not None
        else Budget(unit="latency", ratio=config.target_latency or 0.0, imgsz_px=config.imgsz, latency=model)
    )
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
    latencies = None if profile is None or model is None else _predicted(profile, model, lines)
    if latencies is not None:
        write_json(candidates.folder / LATENCIES, latencies.to_json(), replace=True)
    return SearchResult(
        lines=lines,
        latencies=latencies,
        plan=plan,
        path=candidates.folder / BEST,
        model=config.model,
        images=candidates.counts,
    )


def _predicted(profile: Profile, model: LatencyModel, lines: Sequence[Mapping[str, Any]]) -> Latencies:
    """Return what a profile predicts of candidates."""
    fractions = model.predict(np.array([line["widths"] for line in lines]))
    return Latencies(
        measured_on=profile.in_words(),
        cpu=profile.machine.cpu,
        fractions={line["number"]: float(fraction) for line, fraction in zip(lines, fractions, strict=True)},
    )


def _how(candidate: Candidate) -> dict[str, Any]:
    return {"tries": candidate.tries, "moved": candidate.moved}


def _rank(line: Mapping[str, Any]) -> tuple[float, bool, int]:
    """Order candidates: the best score first, those that failed last, then the lower number."""
    return -line["score"], "failure" in line, line["number"]
