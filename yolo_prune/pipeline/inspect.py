"""`inspect`: what may be cut of a model, what not and why, and what each channel is worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_prune.channels import ChannelGraph, ChannelGroup
from yolo_prune.configuration import json_setting, setting
from yolo_prune.files import require_new_outputs
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.ultralytics.checkpoints import load_model
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.pipeline.picture import picture_of
from yolo_prune.report import quantity, render
from yolo_prune.report.groups import GroupRow, Member, shortened
from yolo_prune.report.picture import write_picture


@dataclass(kw_only=True)
class InspectConfig:
    """Settings of `inspect`."""

    model: str = setting(help="checkpoint (.pt) or a yaml name of the host, e.g. yolov8n.yaml")
    imgsz: int = setting(640, help="image side at which MACs are counted", unit="px")
    picture: str | None = setting(None, help="also draw the channel graph into this HTML file; must not exist")
    json: str | None = json_setting("the table")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found."""

    model: str
    imgsz_px: int
    macs: int
    params: int
    prunable_macs_share: float
    rows: tuple[GroupRow, ...]
    operators_without_rule: dict[str, int]
    operators_at_outputs: tuple[str, ...]
    untraced_parameters: tuple[str, ...]
    picture: str | None

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    def table(self) -> str:
        """Return the groups, then, by the numbers that their rows name, why some are locked or tied."""
        channels = Counter[str]()
        for row in self.rows:
            channels[row.lock] += row.width
        locks = {reason: number for number, reason in enumerate(filter(None, channels), start=1)}
        places = dict.fromkeys(tie for row in self.rows for tie in row.ties)
        ties = {tie: number for number, tie in enumerate(places, start=1)}
        cells = [
            [row.name, str(row.width), str(len(row.tensors())), quantity(row.macs_per_channel),
             quantity(row.params_per_channel), _state(row, locks, ties), shortened(row.layers(), at_most=3)]
            for row in self.rows
        ]  # fmt: skip
        columns = ["channel group", "width", "tensors", "MACs/channel", "params/channel", "may be cut", "members"]
        lines = [render(columns, cells, words=["members"]), f"{self.totals()}\n"]
        lines += [f"locked {number}: {reason} (channels: {channels[reason]})\n" for reason, number in locks.items()]
        lines += [f"tied {number}: {tie}\n" for tie, number in ties.items()]
        lines += self._without_rule()
        lines += [f"never traced: {name}\n" for name in self.untraced_parameters]
        lines += [f"picture: {self.picture}\n"] if self.picture else []
        return "".join(lines)

    def totals(self) -> str:
        """Return what the whole model costs, in a line."""
        return (
            f"{self.model}: {quantity(self.macs)} MACs at {self.imgsz_px} px, {quantity(self.params)} parameters, "
            f"{self.prunable_macs_share:.1%} of the MACs can be pruned"
        )

    def _without_rule(self) -> list[str]:
        """Name the operators without a rule, and those whose rule would free no channel that they touched."""
        harmless = ", but it touched only channels that reach the model's output, which are locked in any case"
        return [
            f"no rule: {operator} (calls: {calls}){harmless if operator in self.operators_at_outputs else ''}\n"
            for operator, calls in self.operators_without_rule.items()
        ]


def _state(row: GroupRow, locks: Mapping[str, int], ties: Mapping[str, int]) -> str:
    """Return whether a group may be cut, with the numbers of the reasons why not, or not alone."""
    if row.lock:
        return f"{row.state} {locks[row.lock]}"
    return " ".join([row.state, ", ".join(str(ties[tie]) for tie in dict.fromkeys(row.ties))]).strip()


def inspect(config: InspectConfig) -> Inspection:
    """Trace a model and describe its channel groups; draw them if asked for.

    Raises:
        YoloPruneError: The model cannot be read or traced, or the picture cannot be written.
    """
    require_new_outputs({"picture": config.picture, "json": config.json})
    model: Any = load_model(config.model)
    require_imgsz(config.imgsz, stride=int(model.stride.max()))
    return inspection_of(model, trace_model(model), config)


def inspection_of(model: Any, graph: ChannelGraph, config: InspectConfig) -> Inspection:
    """Describe the channel groups of a traced model; draw them if asked for.

    Raises:
        OutputError: The picture cannot be written.
    """
    widths = graph.widths()
    inspection = Inspection(
        model=config.model,
        imgsz_px=config.imgsz,
        macs=round(float(graph.cost.macs(widths, imgsz_px=config.imgsz))),
        params=round(float(graph.cost.params(widths))),
        prunable_macs_share=prunable_macs_share(graph, imgsz_px=config.imgsz),
        rows=group_rows(graph, imgsz_px=config.imgsz),
        operators_without_rule=dict(graph.report.operators_without_rule),
        operators_at_outputs=graph.report.operators_at_outputs,
        untraced_parameters=graph.report.untraced_parameters,
        picture=config.picture,
    )
    if config.picture:
        picture = picture_of(model, graph, inspection.rows, title=config.model, summary=inspection.totals())
        write_picture(Path(config.picture), picture)
    return inspection


def prunable_macs_share(graph: ChannelGraph, *, imgsz_px: int) -> float:
    """Return the share of MACs that shrinks when every free channel is gone: 1 - cost of the locked rest."""
    rest = np.where([bool(group.lock) for group in graph.groups], graph.widths(), 0)
    return 1.0 - float(graph.cost.macs(rest, imgsz_px=imgsz_px) / graph.cost.macs(graph.widths(), imgsz_px=imgsz_px))


def group_rows(graph: ChannelGraph, *, imgsz_px: int) -> tuple[GroupRow, ...]:
    """Return one record per channel group, in the order of the graph's groups."""
    widths, size = graph.widths(), len(graph.groups)
    one_less = widths - np.eye(size, dtype=np.int64)
    macs = graph.cost.macs(widths, imgsz_px=imgsz_px) - graph.cost.macs(one_less, imgsz_px=imgsz_px)
    params = graph.cost.params(widths) - graph.cost.params(one_less)
    return tuple(
        GroupRow(
            name=group.name,
            width=group.width,
            members=_members(graph, group),
            lock=group.lock,
            ties=tuple(tie.where for tie in graph.ties if index in tie.members()),
            macs_per_channel=round(float(macs[index])),
            params_per_channel=round(float(params[index])),
        )
        for index, group in enumerate(graph.groups)
    )


def _members(graph: ChannelGraph, group: ChannelGroup) -> tuple[Member, ...]:
    """Return the axes of a group; each of its channels takes as many entries of them as the first."""
    first = group.channels[0]
    return tuple(
        Member(tensor=name, dim=dim, entries_per_channel=int((graph.axes[name, dim].channels == first).sum()))
        for name, dim in group.axes
    )
