"""`PrunePlan`: every choice of a prune, as a file. Applying a plan decides nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from yolo_prune.channels import BoolArray, ChannelGraph, IntArray
from yolo_prune.errors import PlanError
from yolo_prune.files import write_json

FORMAT = "yolo_prune.plan/1"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network costs.

    Attributes:
        macs: Multiply-adds of one deployed forward at `imgsz_px`, batch 1.
        params: Trainable parameters of the checkpoint.
    """

    macs: int
    params: int


@dataclass(frozen=True, kw_only=True)
class GroupChoice:
    """The kept channels of one group.

    Attributes:
        width: Channels of the group before pruning.
        keep: Indices of the kept ones within the group, ascending; none where a whole head goes.
    """

    width: int
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = list(self.keep) == sorted(set(self.keep))
        if not ascending or (self.keep and not 0 <= self.keep[0] <= self.keep[-1] < self.width):
            raise PlanError(
                f"kept indices {list(self.keep)[:8]}... for width {self.width}",
                expected=f"indices in ascending order, without repeats, in 0..{self.width - 1}",
            )


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Which channels stay.

    Attributes:
        source_sha256: Hash of the checkpoint that the plan belongs to.
        imgsz_px: Image side at which MACs are counted.
        groups: Choices by group name; groups that are absent keep every channel.
        before: Cost of the dense model.
        after: Predicted cost of the slim model.
        choice: How the plan was chosen (criterion, allocation, target, constraints), for the record only.
    """

    source_sha256: str
    imgsz_px: int
    groups: Mapping[str, GroupChoice]
    before: Cost
    after: Cost
    choice: Mapping[str, Any] = field(default_factory=dict)

    def keep_mask(self, graph: ChannelGraph) -> BoolArray:
        """Return the keep mask, shape (channels,), checked against the graph.

        Raises:
            PlanError: A group is unknown or has another width, or the mask breaks a lock or a tie.
        """
        keep = np.ones(graph.channel_count, dtype=bool)
        index = graph.group_names()
        for name, chosen in self.groups.items():
            if name not in index or graph.groups[index[name]].width != chosen.width:
                found = graph.groups[index[name]].width if name in index else "no such group"
                raise PlanError(
                    f"plan names group '{name}' of width {chosen.width}; this model has: {found}",
                    expected="a plan made for this very model",
                    remedy="make a new plan from this checkpoint",
                )
            channels = graph.groups[index[name]].channels
            keep[channels] = False
            keep[channels[np.array(chosen.keep, dtype=np.int64)]] = True
        graph.check_keep(keep)
        costs = (cost_at(graph, graph.widths(), self.imgsz_px), cost_at(graph, graph.kept_widths(keep), self.imgsz_px))
        if costs != (self.before, self.after):
            raise PlanError(
                f"plan claims {self.before} before and {self.after} after",
                expected=f"{costs[0]} and {costs[1]}, what these widths cost",
                remedy="make a new plan; this one was edited",
            )
        return keep

    def require_source(self, sha256: str) -> None:
        """Refuse to be applied to another checkpoint than the one that it was made for."""
        if sha256 != self.source_sha256:
            raise PlanError(
                f"plan belongs to checkpoint {self.source_sha256[:12]}, this one is {sha256[:12]} (SHA-256)",
                expected="the checkpoint that the plan was made from",
                remedy="make a new plan from this checkpoint",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "format": FORMAT,
            **asdict(self),
            "groups": {name: asdict(group) for name, group in self.groups.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> PrunePlan:
        """Read a plan from JSON values.

        Raises:
            PlanError: Not a plan of this format, or a malformed one.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            found = value.get("format", "no 'format'") if isinstance(value, dict) else type(value).__name__
            raise PlanError(f"not a plan: {found}", expected=f"a JSON object with format '{FORMAT}'")
        try:
            groups = {
                str(name): GroupChoice(width=_whole(group["width"]), keep=tuple(map(_whole, list(group["keep"]))))
                for name, group in value["groups"].items()
            }
            return cls(
                source_sha256=str(value["source_sha256"]),
                imgsz_px=_whole(value["imgsz_px"]),
                groups=groups,
                before=Cost(**{unit: _whole(cost) for unit, cost in value["before"].items()}),
                after=Cost(**{unit: _whole(cost) for unit, cost in value["after"].items()}),
                choice=dict(value["choice"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"malformed plan: {error!r}", expected="a plan written by this tool") from error

    def save(self, path: Path) -> None:
        """Write the plan as a new JSON file."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> PrunePlan:
        """Read a plan.

        Raises:
            PlanError: No such file, not JSON, or not a plan.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read plan '{path}': {error}", expected="a plan written by this tool") from error
        return cls.from_json(value)


def _whole(value: Any) -> int:
    """Return a whole number that is not negative, as JSON holds it: nothing is rounded or read from text."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} where a whole number is due")
    return value


def cost_at(graph: ChannelGraph, kept: IntArray, imgsz_px: int) -> Cost:
    """Return the cost at kept widths, shape (groups,)."""
    macs, params = graph.cost.macs(kept, imgsz_px=imgsz_px), graph.cost.params(kept)
    return Cost(macs=round(float(macs)), params=round(float(params)))


def plan_from_keep(
    graph: ChannelGraph, keep: BoolArray, *, source_sha256: str, imgsz_px: int, choice: Mapping[str, Any]
) -> PrunePlan:
    """Write a keep mask down as a plan, with its predicted cost.

    Raises:
        PlanError: The mask breaks a lock or a tie.
    """
    graph.check_keep(keep)

    groups = {
        group.name: GroupChoice(width=group.width, keep=tuple(int(i) for i in np.flatnonzero(keep[group.channels])))
        for group in graph.groups
        if not keep[group.channels].all()
    }
    return PrunePlan(
        source_sha256=source_sha256,
        imgsz_px=imgsz_px,
        groups=groups,
        before=cost_at(graph, graph.widths(), imgsz_px),
        after=cost_at(graph, graph.kept_widths(keep), imgsz_px),
        choice=dict(choice),
    )
