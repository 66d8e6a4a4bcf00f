"""The course of a sparsity training: the strength of each epoch, what it did, and the record from which it goes on.

A host makes one in every process that trains, hands it the network, its graph and its optimizer, and says when epochs
begin and end. Source: network slimming, Liu et al. 2017, eq. 1; `methods.slimming.penalty` applies the penalty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.files import from_record, write_json
from yolo_prune.importance.base import FloatArray
from yolo_prune.methods.slimming.health import (
    SILENT,
    EpochHealth,
    GroupHealth,
    HealthTable,
    group_health,
    macs_without,
    warnings_of,
)
from yolo_prune.methods.slimming.penalty import ScalePenalty, carry_zeros, channel_scales
from yolo_prune.methods.slimming.strength import AutoStrength, Sparsity, schedule_factor

RECORD, TABLE, PICTURE = "sparsity.json", "sparsity.csv", "sparsity.png"
"""What a run leaves in its folder: its state, one row a group and epoch, and the scales over the epochs."""

BINS = 50

SETTLING = 16
"""Batches on which hosts measure the statistics of norms anew after each epoch, at most.

Training averages them over some thirty batches, in which the penalty moves every scale. Each layer then misjudges what
the one before it sends, and over sixty layers these errors multiply: mAP reads zero, and the network is well.
"""


class PenaltyCourse:
    """The penalty of one training, epoch by epoch.

    Args:
        sparsity: How scales are penalised.
        folder: The run's folder, for its record.
        imgsz_px: Side of the images, at which MACs are counted.
        writes: Whether this process writes the record (the first of several GPUs does).

    Attributes:
        history: The start, then every epoch that is done.
    """

    def __init__(self, sparsity: Sparsity, folder: Path, *, imgsz_px: int, writes: bool) -> None:
        self.sparsity, self._folder, self._imgsz_px, self._writes = sparsity, folder, imgsz_px, writes
        self.history: list[EpochHealth] = []
        self._auto, self._table = AutoStrength(share=sparsity.share), HealthTable(folder / TABLE)
        self._penalty: ScalePenalty | None = None
        self._typical: float | None = None
        self._told = False

    def attach(
        self, graph: ChannelGraph, parameters: Mapping[str, Tensor], chosen: BoolArray, optimizer: Optimizer
    ) -> None:
        """Penalise the scales of a network; once more after it was pruned, since its channels are others then.

        Args:
            graph: Its channel graph.
            parameters: Its parameters by name, wherever they are.
            chosen: Which channels are penalised, shape (channels,).
            optimizer: Its optimizer, which is hooked.

        Raises:
            ConfigError: Nothing can be penalised, or a subgradient with an adaptive optimizer.
        """
        if self._penalty is not None:
            self._penalty.detach()
        self._graph, self._parameters = graph, parameters
        self._penalty = ScalePenalty(graph, parameters, chosen, mode=self.sparsity.mode)
        self._penalty.attach(optimizer)
        self._penalty.typical = self._typical

    def start(self, done: int = 0) -> None:
        """Look at the scales before the first epoch, or go on from the record.

        Args:
            done: Epochs that a resumed training has behind it. The record may know of one more, whose checkpoint was
                never written.

        Raises:
            ConfigError: The record is damaged.
        """
        record = sparsity_record(self._folder) if done else None
        if record is None:
            scales = self._scales()[self.penalty.chosen]
            self._typical, self._largest = float(np.median(scales)), float(scales.max())
            self._below = SILENT * self._typical
            self._measure(epoch=0)
        else:
            self._below, self._largest = record["silent_below"], record["largest"]
            self._typical = self._below / SILENT
            self.history = [EpochHealth(**epoch) for epoch in record["epochs"] if epoch["epoch"] <= done]
            self._table.load(done)
        self.penalty.typical = self._typical
        self._write()

    def begin_epoch(self, epoch: int, lr_sums: FloatArray) -> str | None:
        """Set the strength of an epoch.

        Args:
            epoch: Its number, from 0; the same again if the host repeats it.
            lr_sums: Sum of the learning rates of each epoch's steps, shape (epochs,).

        Returns:
            What is going to happen; None where it was told before, since the strength is given.
        """
        self.penalty.forget()
        self._epoch, self.history = epoch, [done for done in self.history if done.epoch <= epoch]
        # Measured, not remembered: after a cut the channels are others, and a resumed network is its moving average.
        epochs, last, self._from = len(lr_sums), self.history[-1], self._distance()
        factors = [schedule_factor(self.sparsity.schedule, one / epochs) for one in range(epoch, epochs)]
        gain = self.penalty.momentum_gain()
        strength = self.sparsity.strength
        if strength is None:
            strength = self._auto.strength(
                self._from, float(np.dot(lr_sums[epoch:], factors)) * gain, arrived=last.arrived
            )
        self.penalty.strength = strength * factors[0]
        told, self._told = self._told, self.sparsity.strength is not None
        if told:
            return None
        how = "given" if self.sparsity.strength is not None else "auto"
        return (
            f"sparsity: strength {self.penalty.strength:.3g} ({how}, {self.sparsity.mode}, {self.sparsity.schedule}) "
            f"on {int(self.penalty.chosen.sum()):,} channels; kept up, it moves a scale by "
            f"{self.penalty.strength * float(lr_sums[epoch:].sum()) * gain:.3g} until the end; "
            f"{self.sparsity.share:.0%} of them are below {self._from:.3g}"
        )

    def end_epoch(self) -> list[str]:
        """Measure, write the record, and return warnings, each with a remedy."""
        groups = self._measure(epoch=self._epoch + 1)
        self._write()
        return warnings_of(self.history, groups)

    def carry_zeros(self, average: Mapping[str, Tensor]) -> None:
        """Make scales of a moving average zero, in place, where those of the network are."""
        carry_zeros(self._graph, self._parameters, average)

    def figures(self) -> dict[str, float]:
        """Return the last epoch's figures by the name that loggers show."""
        last = self.history[-1]
        return {f"sparsity/{name}": getattr(last, name) for name in ("strength", "silent", "macs", "pull")}

    @property
    def penalty(self) -> ScalePenalty:
        """The penalty on the network of the last `attach`."""
        assert self._penalty is not None  # hosts attach first
        return self._penalty

    def _measure(self, *, epoch: int) -> list[GroupHealth]:
        """Append the figures of an epoch to the history and to the table."""
        penalty, scales, chosen = self.penalty, self._scales(), self.penalty.chosen
        silent = chosen & (np.nan_to_num(scales, nan=np.inf) < self._below)
        groups = group_health(
            self._graph, chosen, scales, penalty.mean_gradient(), strength=penalty.strength, below=self._below
        )
        distance = self._distance()
        nominal = penalty.strength * penalty.lr_sum * penalty.momentum_gain()
        moved = self._from - distance if self.history else 0.0
        pulls = [group.pull for group in groups if np.isfinite(group.pull)]
        self.history.append(
            EpochHealth(
                epoch=epoch,
                strength=penalty.strength,
                silent=float(silent.sum() / chosen.sum()),
                macs=macs_without(self._graph, silent, imgsz_px=self._imgsz_px),
                distance=distance,
                nominal=nominal,
                arrived=moved / nominal if nominal else 1.0,
                pull=float(np.median(pulls)) if pulls else 0.0,
                histogram=np.histogram(scales[chosen], bins=BINS, range=(0.0, self._largest))[0].tolist(),
            )
        )
        self._table.add(epoch, groups)
        return groups

    def _distance(self) -> float:
        return self._auto.wish(self._scales()[self.penalty.chosen])

    def _scales(self) -> FloatArray:
        return channel_scales(self._graph, self._parameters)

    def _write(self) -> None:
        if not self._writes:
            return
        record = {
            "options": asdict(self.sparsity),
            "silent_below": self._below,
            "largest": self._largest,
            "epochs": [epoch.to_json() for epoch in self.history],
        }
        write_json(self._folder / RECORD, record, replace=True)
        self._table.write()


def forget_record(folder: Path) -> None:
    """Delete what an earlier run left in a folder that is used again: it would be taken for this run's state."""
    for name in (RECORD, TABLE, PICTURE):
        (folder / name).unlink(missing_ok=True)


def sparsity_record(folder: Path) -> dict[str, Any] | None:
    """Return what a run's folder tells of its sparsity training; None where it tells nothing.

    Raises:
        ConfigError: The record is damaged.
    """
    return from_record(folder / RECORD, _checked)


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record in which everything is there that a training goes on from."""
    Sparsity(**{key: record["options"][key] for key in ("strength", "mode", "schedule", "share")})
    for epoch in record["epochs"]:
        EpochHealth(**epoch)
    float(record["silent_below"]), float(record["largest"])
    return record
