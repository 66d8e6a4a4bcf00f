"""The penalty of network slimming inside a classic training: its strength by epoch, its zeros in the EMA, its record.

The record, `sparsity.json` in the run's folder, holds the settings and what each epoch did, so that a resumed run goes
on with both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from yolo_prune.errors import ConfigError
from yolo_prune.files import write_json
from yolo_prune.hosts.yolov5.surgery import trace_model
from yolo_prune.importance.base import FloatArray
from yolo_prune.methods.slimming import ScalePenalty, carry_zeros, channel_scales, penalised_channels
from yolo_prune.methods.strength import AutoStrength, Sparsity, schedule_factor
from yolo_prune.surgery.copying import copied

RECORD = "sparsity.json"
"""The record's name."""


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What one epoch did.

    Attributes:
        epoch: Its number, from 0.
        strength: s during the epoch.
        batches: Batches.
        steps: Optimizer steps.
        lr_sum: Sum of their learning rates for scales.
        arrived: Share of the movement that the penalty alone would make that was seen in the scales.
        zero_share: Share of the penalised channels that are zero after it.
    """

    epoch: int
    strength: float
    batches: int
    steps: int
    lr_sum: float
    arrived: float
    zero_share: float


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long a training is and how its learning rate falls.

    Attributes:
        epochs: Its epochs.
        start: The first that is to come, more than 0 when it is resumed.
        lr_factor: From epoch to the share of the initial learning rate.
        warmup: From the batches of an epoch to those of warm-up, during which the learning rate of scales rises from 0.
    """

    epochs: int
    start: int
    lr_factor: Callable[[int], float]
    warmup: Callable[[int], int]

    def mean_lr_factor(self, epoch: int, batches: int) -> float:
        """Return the share of the initial learning rate that scales have on average in an epoch of so many batches."""
        risen = np.arange(epoch * batches, (epoch + 1) * batches) / self.warmup(batches)
        return self.lr_factor(epoch) * float(np.minimum(risen, 1.0).mean())


class SparsityRun:
    """The penalty of one training.

    Args:
        sparsity: Its settings.
        course: Its epochs.
        folder: Where the record stands.
        writes: Whether this process writes it (the first of several GPUs does).
    """

    def __init__(self, sparsity: Sparsity, course: Course, folder: Path, *, writes: bool) -> None:
        self.sparsity, self.course, self.folder, self.writes = sparsity, course, folder, writes
        # A killed run may have recorded an epoch whose checkpoint was never written.
        self.history = [record for record in read_record(folder)[1] if record.epoch < course.start]
        self.epoch = course.start
        self._auto, self._in_epoch = AutoStrength(share=sparsity.share), False

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Hook the optimizer of a model; its channel graph is traced on a copy, wherever the model is.

        Raises:
            ConfigError: Nothing can be penalised, or a subgradient with an adaptive optimizer.
        """
        self.graph = trace_model(copied(model).cpu().float().eval())
        self.chosen = penalised_channels(self.graph)
        self.parameters = dict(model.named_parameters())
        self.penalty = ScalePenalty(self.graph, self.parameters, self.chosen, mode=self.sparsity.mode)
        self.penalty.attach(optimizer)
        self.optimizer = optimizer
        self.write()

    def epoch_starts(self, *_: Any, **__: Any) -> None:
        """Set the strength of the coming epoch."""
        if self._in_epoch:  # of several GPUs, only the first is told that an epoch ends
            self.epoch_ends()
        self._in_epoch = True
        self.penalty.forget()
        self._batches, self._nominal, self._counted = 0, 0.0, 0.0
        self._distance = self._auto.wish(self._norms())
        level, factor = self.sparsity.strength, self._factor(self.epoch)
        self._strength = (self._chosen_level() if level is None else level) * factor
        self._most = math.inf if level is not None else self._strength * self._expected_lr_sum(self.epoch)
        self.penalty.strength = self._strength

    def batch_starts(self, *_: Any, **__: Any) -> None:
        """Count a batch; a chosen strength fades where an epoch has more steps than the one before it."""
        self._batches += 1
        self._count_steps()
        if math.isfinite(self._most) and self._counted:
            mean_lr = self._counted / self.penalty.steps
            self.penalty.strength = min(self._strength, max(self._most - self._nominal, 0.0) / mean_lr)

    def epoch_ends(self, *_: Any, **__: Any) -> None:
        """Write down what the epoch did."""
        norms, penalty = self._norms(), self.penalty
        self._count_steps()
        nominal = self._nominal * self.penalty.momentum_gain()
        moved = self._distance - self._auto.wish(norms)
        self.history.append(
            EpochRecord(
                epoch=self.epoch,
                strength=self._strength,
                batches=self._batches,
                steps=penalty.steps,
                lr_sum=penalty.lr_sum,
                arrived=moved / nominal if nominal else 1.0,
                zero_share=float((norms == 0.0).mean()),
            )
        )
        self.epoch, self._in_epoch = self.epoch + 1, False
        self.write()

    def _count_steps(self) -> None:
        """Add what the steps since the last count moved, as far as the penalty goes."""
        self._nominal += self.penalty.strength * (self.penalty.lr_sum - self._counted)
        self._counted = self.penalty.lr_sum

    def carry_zeros(self, average: nn.Module) -> None:
        """Make scales that are zero in the trained model zero in its moving average."""
        carry_zeros(self.graph, self.parameters, dict(average.named_parameters()))

    def write(self) -> None:
        """Write the record."""
        if self.writes:
            epochs = [asdict(record) for record in self.history]
            write_json(self.folder / RECORD, {"settings": asdict(self.sparsity), "epochs": epochs}, replace=True)

    def _norms(self) -> FloatArray:
        tensors: dict[str, Tensor] = {name: tensor.detach().cpu() for name, tensor in self.parameters.items()}
        return channel_scales(self.graph, tensors)[self.chosen]

    def _factor(self, epoch: int) -> float:
        return schedule_factor(self.sparsity.schedule, epoch / self.course.epochs)

    def _chosen_level(self) -> float:
        """Return the strength, before its schedule, that covers what is left; 0 in the first epoch, to measure it."""
        to_come = range(self.epoch, self.course.epochs)
        lr_left = sum(self._expected_lr_sum(epoch) * self._factor(epoch) for epoch in to_come)
        if not lr_left:
            return 0.0
        last = self.history[-1]
        arrived = last.arrived if last.strength else 1.0
        return self._auto.strength(self._distance, lr_left * self.penalty.momentum_gain(), arrived=arrived)

    def _expected_lr_sum(self, epoch: int) -> float:
        """Return the sum of the learning rates of an epoch with as many steps as the last one; 0 before the first."""
        if not self.history:
            return 0.0
        last = self.history[-1]
        initial = max(group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups)
        return last.steps * initial * self.course.mean_lr_factor(epoch, last.batches)


def read_record(folder: Path) -> tuple[Sparsity | None, list[EpochRecord]]:
    """Return the settings and the epochs that a run's folder tells of; none where it has no record.

    Raises:
        ConfigError: The record is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return None, []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Sparsity(**content["settings"]), [EpochRecord(**record) for record in content["epochs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot read '{file}': {error!r}",
            expected="the record of a training with --sparsity",
            remedy="start a new training",
        ) from error
