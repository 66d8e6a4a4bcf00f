"""`sensitivity`: what each channel group costs, by the recalibrated mAP of the model with that group alone cut.

Groups that can only be cut together are measured together. The result is `sensitivity.json` in the folder, by which
`prune sensitivity=` takes much where it costs little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_prune.allocation.paths import DropCurve
from yolo_prune.channels import ChannelGraph, IntArray
from yolo_prune.configuration import setting
from yolo_prune.errors import ConfigError
from yolo_prune.files import write_json
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.pipeline.candidates import Candidates, CandidatesConfig, check
from yolo_prune.report import render
from yolo_prune.search.sensitivities import Sensitivities

RESULT = "sensitivity.json"
DENSE = 0
"""Number of the dense model."""


@dataclass(kw_only=True)
class SensitivityConfig(CandidatesConfig):
    """Settings of `sensitivity`."""

    fractions: list[float] = setting([0.25, 0.5, 0.75], help="fractions of a group that are cut")


@dataclass(frozen=True, kw_only=True)
class SensitivityResult:
    """What groups cost, and where that stands."""

    found: Sensitivities
    path: Path
    config: SensitivityConfig

    def to_json(self) -> dict[str, Any]:
        """Return the drops as plain values."""
        return self.found.to_json()

    def table(self) -> str:
        """Return one row a group, the one that costs most first."""
        ranked = sorted(self.found.drops.items(), key=lambda item: -max(item[1].drops, default=0.0))
        rows = [
            [name, *(f"{drop:+.3f} at -{gone:.0%}" for gone, drop in zip(curve.removed, curve.drops, strict=True))]
            for name, curve in ranked
        ]
        most = max((len(row) for row in rows), default=1)
        text = render(["group", *[""] * (most - 1)], [[*row, *[""] * (most - len(row))] for row in rows])
        config = self.config
        data = f" data={config.data}" if CRITERIA[config.criterion].needs else ""
        return (
            text
            + f"what the recalibrated mAP50-95 of {self.found.dense:.3f} on held-out training images loses; "
            + "below 0 it rose\n"
            + f"by it: yolo-prune prune model={config.model} sensitivity={self.path} "
            + f"criterion={config.criterion}{data} target_macs=0.5 out=slim.pt\n"
        )


def sensitivity(config: SensitivityConfig) -> SensitivityResult:
    """Score the model with one set of tied groups cut at a time.

    Raises:
        YoloPruneError: Bad input, or a folder of other candidates; what was scored stays.
    """
    constraints = check(config)
    for fraction in config.fractions or [0.0]:
        if not 0.0 < fraction < 1.0:
            raise ConfigError(f"fractions={config.fractions}", expected="numbers above 0 and below 1")
    with Candidates(config, constraints, kind="sensitivity", results=(RESULT,)) as candidates:
        tasks, notes = _tasks(candidates, sorted(config.fractions))
        candidates.score(tasks, notes)
        candidates.require_none_failed()
    found = Sensitivities(
        source_sha256=candidates.source_sha256,
        criterion=config.criterion,
        dense=candidates.lines[DENSE]["score"],
        drops=curves(candidates.graph, {number: candidates.lines[number] for number in tasks}),
    )
    path = candidates.folder / RESULT
    write_json(path, found.to_json(), replace=True)
    return SensitivityResult(found=found, path=path, config=config)


def _tasks(candidates: Candidates, fractions: list[float]) -> tuple[dict[int, IntArray], dict[int, dict[str, Any]]]:
    """Return the widths of every cut by number, and of what they are a cut; multiples can make two cuts one."""
    widths = candidates.graph.widths()
    tasks, notes = {DENSE: widths}, {DENSE: dict[str, Any](unit=None)}
    for unit, members in enumerate(candidates.solver.units):
        before = widths
        for place, fraction in enumerate(fractions, start=1):
            wish = widths.astype(float)
            wish[members.groups] *= 1.0 - fraction
            cut = candidates.solver.settle(wish)
            if not np.array_equal(cut, before):
                number = unit * len(fractions) + place
                tasks[number], notes[number], before = cut, {"unit": unit}, cut
    return tasks, notes


def curves(graph: ChannelGraph, lines: Mapping[int, Mapping[str, Any]]) -> dict[str, DropCurve]:
    """Return the drop of the score by group, at the fractions of it that went.

    Args:
        graph: The channel graph.
        lines: The dense model's line under `DENSE`, and those of the cuts, by number.
    """
    widths, dense = graph.widths(), lines[DENSE]["score"]
    points: dict[str, dict[float, float]] = {}
    for number in sorted(lines):
        removed = 1.0 - np.array(lines[number]["widths"]) / widths
        for index in np.flatnonzero(removed):
            found, gone = points.setdefault(graph.groups[index].name, {}), float(removed[index])
            # Two cuts of tied groups can leave one of them alike: the worse one counts.
            found[gone] = max(found.get(gone, -np.inf), dense - lines[number]["score"])
    return {
        name: DropCurve(removed=tuple(sorted(found)), drops=tuple(found[gone] for gone in sorted(found)))
        for name, found in points.items()
    }
