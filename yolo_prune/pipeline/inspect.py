"""`inspect`: what may be cut of a model, what not and why, and what each channel is worth."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from yolo_prune.channels import ChannelGraph
from yolo_prune.configuration import json_setting, setting
from yolo_prune.hosts.ultralytics.checkpoints import load_model
from yolo_prune.hosts.ultralytics.inference import require_imgsz
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.report import quantity, render


@dataclass(kw_only=True)
class InspectConfig:
    """Settings of `inspect`."""

    model: str = setting(help="checkpoint (.pt) or a yaml name of the host, e.g. yolov8n.yaml")
    imgsz: int = setting(640, help="image side at which MACs are counted", unit="px")
    json: str | None = json_setting("the table")


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One channel group.

    Attributes:
        name: The group's name.
        width: Its channels.
        tensors: How many tensors a channel of it cuts.
        lock: Why it cannot be cut; empty if it can.
        ties: Where it needs the same count as another group.
        macs_per_channel: MACs that removing one channel frees.
        params_per_channel: Parameters that removing one channel frees.
    """

    name: str
    width: int
    tensors: int
    lock: str
    ties: tuple[str, ...]
    macs_per_channel: int
    params_per_channel: int


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
    untraced_parameters: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**vars(self), "rows": [vars(row) for row in self.rows]}

    def table(self) -> str:
        """Return the groups, then what is locked and why."""
        cells = [
            [row.name, str(row.width), str(row.tensors), quantity(row.macs_per_channel),
             quantity(row.params_per_channel), "locked" if row.lock else "tied" if row.ties else "free"]
            for row in self.rows
        ]  # fmt: skip
        columns = ["channel group", "width", "tensors", "MACs/channel", "params/channel", "may be cut"]
        lines = [render(columns, cells), self._totals()]
        reasons = Counter[str]()
        for row in self.rows:
            reasons[row.lock] += row.width
        lines += [f"locked: {reason} (channels: {count})\n" for reason, count in reasons.items() if reason]
        ties = dict.fromkeys(tie for row in self.rows for tie in row.ties)
        lines += [f"tied: {tie}\n" for tie in ties]
        lines += [f"no rule: {operator} (calls: {calls})\n" for operator, calls in self.operators_without_rule.items()]
        lines += [f"never traced: {name}\n" for name in self.untraced_parameters]
        return "".join(lines)

    def _totals(self) -> str:
        return (
            f"{self.model}: {quantity(self.macs)} MACs at {self.imgsz_px} px, {quantity(self.params)} parameters, "
            f"{self.prunable_macs_share:.1%} of the MACs can be pruned\n"
        )


def inspect(config: InspectConfig) -> Inspection:
    """Trace a model and describe its channel groups.

    Raises:
        YoloPruneError: The model cannot be read or traced.
    """
    model: Any = load_model(config.model)
    require_imgsz(config.imgsz, stride=int(model.stride.max()))
    graph = trace_model(model)
    widths = graph.widths()
    return Inspection(
        model=config.model,
        imgsz_px=config.imgsz,
        macs=round(float(graph.cost.macs(widths, imgsz_px=config.imgsz))),
        params=round(float(graph.cost.params(widths))),
        prunable_macs_share=prunable_macs_share(graph, imgsz_px=config.imgsz),
        rows=tuple(_rows(graph, config.imgsz)),
        operators_without_rule=dict(graph.report.operators_without_rule),
        untraced_parameters=graph.report.untraced_parameters,
    )


def prunable_macs_share(graph: ChannelGraph, *, imgsz_px: int) -> float:
    """Return the share of MACs that shrinks when every free channel is gone: 1 - cost of the locked rest."""
    rest = np.where([bool(group.lock) for group in graph.groups], graph.widths(), 0)
    return 1.0 - float(graph.cost.macs(rest, imgsz_px=imgsz_px) / graph.cost.macs(graph.widths(), imgsz_px=imgsz_px))


def _rows(graph: ChannelGraph, imgsz_px: int) -> list[GroupRow]:
    widths, size = graph.widths(), len(graph.groups)
    one_less = widths - np.eye(size, dtype=np.int64)
    macs = graph.cost.macs(widths, imgsz_px=imgsz_px) - graph.cost.macs(one_less, imgsz_px=imgsz_px)
    params = graph.cost.params(widths) - graph.cost.params(one_less)
    return [
        GroupRow(
            name=group.name,
            width=group.width,
            tensors=len({name for name, _ in group.axes}),
            lock=group.lock,
            ties=tuple(tie.where for tie in graph.ties if index in tie.members()),
            macs_per_channel=round(float(macs[index])),
            params_per_channel=round(float(params[index])),
        )
        for index, group in enumerate(graph.groups)
    ]
