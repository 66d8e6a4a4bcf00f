"""`search`: the best of many random plans, by the mAP of slim networks with recalibrated batch norms (EagleEye).

Every candidate is a line of `candidates.jsonl` in the search's folder, which is only ever appended to: killed, the same
command goes on. The best one is a plan, `best.json`, which `prune plan=` applies.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from yolo_prune.allocation import ATTENTION, Budget, Constraints
from yolo_prune.allocation.budget import lowest_go, solver_for
from yolo_prune.channels import BoolArray, ChannelGraph, IntArray
from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.errors import ConfigError
from yolo_prune.files import append_line, read_lines, write_json
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.collection import TrainingImages, collect_evidence
from yolo_prune.hosts.ultralytics.scoring import Scorer
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model
from yolo_prune.importance import CRITERIA, Evidence, FloatArray, score_channels
from yolo_prune.plan import PrunePlan, plan_from_keep
from yolo_prune.report import quantity, render
from yolo_prune.search.sampling import Candidate, Sampler

RECORD, SETTINGS, BEST = "candidates.jsonl", "search.json", "best.json"


@dataclass(kw_only=True)
class SearchConfig:
    """Settings of `search`."""

    model: str = setting(help="trained checkpoint (.pt) to prune")
    data: str = setting(help="data yaml; only its training images are looked at")
    out: str = setting(help="folder of the search; one that exists goes on")
    target_macs: float = setting(help="fraction of the MACs that is kept, e.g. 0.5")
    candidates: int = setting(50, help="random plans that are scored")
    criterion: str = setting("l1", help=f"which channels of a group go first: {', '.join(CRITERIA)}")
    largest: float = setting(0.7, help="largest fraction of a group that is drawn")
    seed: int = setting(0, help="seed of the plans, and of the images that are held out")
    held_out: float = setting(0.2, help="fraction of the training images that plans are scored on")
    batches: int = setting(
        100, help="batches that norms are recalibrated on, and that criteria which need data look at"
    )
    batch: int = setting(16, help="images of a batch")
    workers: int = setting(0, help="loader processes")
    device: str = setting("cpu", help="where candidates run")
    min_channels: int = setting(8, help="fewest that a group keeps", unit="channels")
    max_fraction: float = setting(0.9, help="largest fraction of a group that may go")
    round_to: int = setting(8, help="kept widths are multiples of this", unit="channels")
    attention: str = setting("width", help="what attention loses: width (of every head alike), heads (whole), none")
    imgsz: int = setting(640, help="image side", unit="px")
    json: str | None = json_setting("the result")


MAY_CHANGE = ("out", "candidates", "workers", "device", "json")
"""Settings that do not change what a candidate is, or what it is worth."""


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
        scores, moved = [line["score"] for line in self.lines], sum(line["moved"] for line in self.lines)
        accepted = (len(self.lines) - moved) / sum(line["tries"] for line in self.lines)
        return (
            render(["candidate", "MACs", "params", "mAP50-95 held out"], rows)
            + f"{len(self.lines)} candidates: {min(scores):.3f} to {max(scores):.3f}, median {np.median(scores):.3f}; "
            + f"{accepted:.1%} of the draws met the budget, {moved} candidates were moved onto it\n"
            + f"norms recalibrated on some of {self.images[0]} training images, scored on {self.images[1]} others\n"
            + f"the best plan: yolo-prune prune model={self.model} plan={self.path} out=slim.pt\n"
        )


def search(config: SearchConfig) -> SearchResult:
    """Score random plans and write the best one.

    Raises:
        YoloPruneError: Bad input, or a folder of another search; what was scored stays.
    """
    constraints = check(config)
    source = read_checkpoint(Path(config.model))
    graph = trace_model(source.model)
    images = TrainingImages(
        data=Path(config.data), imgsz_px=config.imgsz, batches=config.batches, batch=config.batch,
        workers=config.workers, device=config.device,
    )  # fmt: skip
    scores = _importance(config, source.model, graph, images)
    solver = solver_for(graph, constraints, scores)
    budget = Budget(unit="macs", ratio=config.target_macs, imgsz_px=config.imgsz)
    sampler = Sampler(graph, solver, budget, largest=config.largest, seed=config.seed)
    scorer = Scorer(source.model, images, held_out=config.held_out, seed=config.seed)
    folder = Path(config.out)
    _open(folder, {**_identity(config), "source_sha256": source.sha256})
    lines = read(folder)
    done = {line["number"] for line in lines}
    for number in range(config.candidates):
        if number not in done:
            line = _scored(sampler.draw(number), source.model, graph, scores, scorer, config.imgsz)
            append_line(folder / RECORD, line)
            lines.append(line)
            print(f"candidate {number + 1} of {config.candidates}: {line['score']:.3f}", flush=True)
    best = min(lines, key=_rank)
    keep = lowest_go(graph, scores, np.array(best["widths"]))
    choice = {**_identity(config), "search": "random", "candidates": len(lines), "score": best["score"]}
    plan = plan_from_keep(graph, keep, source_sha256=source.sha256, imgsz_px=config.imgsz, choice=choice)
    write_json(folder / BEST, plan.to_json(), replace=True)
    return SearchResult(lines=lines, plan=plan, path=folder / BEST, model=config.model, images=scorer.counts)


def check(config: SearchConfig) -> Constraints:
    """Check everything that can be checked before the checkpoint is read; return the constraints.

    Raises:
        ConfigError: An unknown name or a number out of range.
    """
    require_choice("criterion", config.criterion, CRITERIA)
    require_choice("attention", config.attention, ATTENTION)
    require_imgsz(config.imgsz)
    for name, least in (("candidates", 1), ("batches", 1), ("batch", 1), ("workers", 0), ("seed", 0)):
        if getattr(config, name) < least:
            raise ConfigError(f"{name}={getattr(config, name)}", expected=f"{least} or more")
    if not 0.0 < config.held_out < 1.0:
        raise ConfigError(f"held_out={config.held_out:g}", expected="a number above 0 and below 1")
    return Constraints(
        min_channels=config.min_channels,
        max_fraction=config.max_fraction,
        round_to=config.round_to,
        attention=config.attention,  # type: ignore[arg-type]  # checked above
    )


def _importance(config: SearchConfig, model: nn.Module, graph: ChannelGraph, images: TrainingImages) -> FloatArray:
    criterion = CRITERIA[config.criterion]
    if not criterion.needs:
        return score_channels(graph, Evidence.of(model), criterion)
    return score_channels(graph, collect_evidence(model, graph, images, needs=criterion.needs), criterion)


def _identity(config: SearchConfig) -> dict[str, Any]:
    """Return what decides the candidates and their scores; files by name, since the record may move."""
    values = {key: value for key, value in asdict(config).items() if key not in MAY_CHANGE}
    return {**values, "model": Path(config.model).name, "data": Path(config.data).name}


def _open(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder of a search, or go on in it.

    Raises:
        ConfigError: It belongs to a search with other settings.
    """
    path = folder / SETTINGS
    if not path.is_file():
        write_json(path, identity)
        return
    known = json.loads(path.read_text(encoding="utf-8"))
    others = [f"{key}={known.get(key)}" for key in identity if known.get(key) != identity[key]]
    if others:
        raise ConfigError(
            f"'{folder}' holds a search with other settings: {', '.join(others)}",
            expected="the same settings, to go on with it, or a new folder",
            remedy="choose another out=",
        )


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the candidates that a search scored, by number; one that a kill cut off is scored again."""
    lines = {line["number"]: line for line in read_lines(folder / RECORD)}
    return [lines[number] for number in sorted(lines)]


def _scored(
    candidate: Candidate, model: nn.Module, graph: ChannelGraph, scores: FloatArray, scorer: Scorer, imgsz_px: int
) -> dict[str, Any]:
    """Cut, recalibrate and score a candidate; return its line of the record."""
    started = time.perf_counter()
    keep: BoolArray = lowest_go(graph, scores, candidate.widths)
    widths: IntArray = graph.kept_widths(keep)
    return {
        "number": candidate.number,
        "score": scorer.score(slim_copy(model, graph, keep)),
        "macs": int(graph.cost.macs(widths, imgsz_px=imgsz_px)),
        "params": int(graph.cost.params(widths)),
        "tries": candidate.tries,
        "moved": candidate.moved,
        "widths": widths.tolist(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _rank(line: Mapping[str, Any]) -> tuple[float, int]:
    """Order candidates: the best score first, then the lower number."""
    return -line["score"], line["number"]
