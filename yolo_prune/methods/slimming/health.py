"""Is sparsity training doing its work? Figures of every epoch, and warnings that say what to change."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.files import new_file
from yolo_prune.importance.base import FloatArray

SILENT = 0.01
"""A channel is silent when its scale is below this fraction of the median scale at the start."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

STUCK = 0.1
"""Warn where less than this fraction of the nominal movement is seen."""

COLLAPSED = 0.05
"""Warn where the channels that are not silent would cost less than this fraction of the MACs."""

CLIFF = 0.9
"""Warn where more than this fraction of a group is silent: the next channels to go would close the layer."""


@dataclass(frozen=True, kw_only=True)
class GroupHealth:
    """Scales of one channel group.

    Attributes:
        group: Its name.
        width: Penalised channels.
        quantiles: Of the channels' scales, at `QUANTILES`.
        silent: Share of the channels below the threshold.
        pull: Strength of the penalty over the mean |task gradient|; NaN before the first step.
    """

    group: str
    width: int
    quantiles: tuple[float, ...]
    silent: float
    pull: float


@dataclass(frozen=True, kw_only=True)
class EpochHealth:
    """Scales of all penalised channels after an epoch.

    Attributes:
        epoch: Epochs that are done; 0 at the start.
        strength: Strength of the penalty in it.
        silent: Share of the penalised channels below the threshold.
        macs: MACs of the network without the silent channels, as a fraction of the whole.
        distance: How far scales still have to move for the wished share to be zero.
        nominal: How far the penalty alone would have moved them in this epoch.
        arrived: Share of that which is seen; 1 where nothing was asked.
        pull: Median over the groups.
        histogram: Channels in `bins` equal bins from 0 to the largest scale at the start.
    """

    epoch: int
    strength: float
    silent: float
    macs: float
    distance: float
    nominal: float
    arrived: float
    pull: float
    histogram: list[int]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def group_health(
    graph: ChannelGraph, chosen: BoolArray, norms: FloatArray, gradients: FloatArray, *, strength: float, below: float
) -> list[GroupHealth]:
    """Describe every penalised group.

    Args:
        graph: The channel graph.
        chosen: Which channels are penalised, shape (channels,).
        norms: Scale of each channel, shape (channels,).
        gradients: Mean |task gradient| of each channel's scales, shape (channels,).
        strength: Strength of the penalty.
        below: Scale under which a channel is silent.
    """
    found = []
    for group in graph.groups:
        members = group.channels[chosen[group.channels]]
        if len(members):
            gradient = float(gradients[members].mean())
            found.append(
                GroupHealth(
                    group=group.name,
                    width=len(members),
                    quantiles=tuple(float(value) for value in np.quantile(norms[members], QUANTILES)),
                    silent=float((norms[members] < below).mean()),
                    pull=strength / gradient if gradient else float("nan"),
                )
            )
    return found


def macs_without(graph: ChannelGraph, silent: BoolArray, *, imgsz_px: int) -> float:
    """Return the MACs that are left without some channels, as a fraction; every group keeps at least one.

    Ties and multiples are not looked at: a forecast, not a plan.

    Args:
        graph: The channel graph.
        silent: Which channels are gone, shape (channels,).
        imgsz_px: Side of the image.
    """
    kept = np.maximum(graph.kept_widths(~silent), 1)
    return float(graph.cost.macs(kept, imgsz_px=imgsz_px) / graph.cost.macs(graph.widths(), imgsz_px=imgsz_px))


def warnings_of(history: list[EpochHealth], groups: list[GroupHealth]) -> list[str]:
    """Return what goes wrong after an epoch, each with what to do.

    Args:
        history: Every epoch so far, the start first.
        groups: The groups after the last one.
    """
    start, now, found = history[0], history[-1], []
    nominal = sum(epoch.nominal for epoch in history[1:])
    moved = sum(epoch.arrived * epoch.nominal for epoch in history[1:])  # not from the start: a cut changes the scales
    if nominal > 0.2 * start.distance and moved < STUCK * nominal:
        found.append(
            f"nothing moves: the penalty alone would have moved scales by {nominal:.3g}, they moved by {moved:.3g}; "
            "raise `sparsity`, or use sparsity_mode=proximal, which no optimizer undoes"
        )
    if now.macs < COLLAPSED:
        found.append(
            f"everything collapses: without its silent channels the network keeps {now.macs:.1%} of its MACs; "
            "lower `sparsity` (with auto: sparsity_share=), train for more epochs, or let it decay with "
            "sparsity_schedule=cosine"
        )
    cliffs = sorted((group for group in groups if group.silent > CLIFF), key=lambda group: -group.silent)
    if cliffs:
        names = ", ".join(f"{group.group} ({group.silent:.0%})" for group in cliffs[:3])
        found.append(
            f"cliff ahead: {len(cliffs)} groups are almost silent, first {names}; "
            "prune with max_fraction below 0.9, or leave them out with sparsity_scope"
        )
    return found


class HealthTable:
    """One row for every group and epoch, in a CSV file.

    Args:
        path: The file.
    """

    HEAD = ("epoch", "group", "width", *(f"q{round(100 * q):02d}" for q in QUANTILES), "silent", "pull")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[tuple[Any, ...]] = []

    def load(self, done: int) -> None:
        """Read the rows of the epochs that are done."""
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as stream:
                self.rows = [tuple(row) for row in list(csv.reader(stream))[1:] if int(row[0]) <= done]

    def add(self, epoch: int, groups: list[GroupHealth]) -> None:
        """Add an epoch; rows of an earlier try at it go."""
        self.rows = [row for row in self.rows if int(row[0]) < epoch]
        for group in groups:
            figures = [f"{value:.6g}" for value in (*group.quantiles, group.silent, group.pull)]
            self.rows.append((epoch, group.group, group.width, *figures))

    def write(self) -> None:
        """Write the file, completely or not at all."""
        buffer = io.StringIO()
        csv.writer(buffer).writerows([self.HEAD, *self.rows])
        with new_file(self.path, replace=True) as temporary:
            temporary.write_text(buffer.getvalue(), encoding="utf-8")
