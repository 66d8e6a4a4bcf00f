"""Sparsity training inside the host's trainer: callbacks that hook its optimizer and watch the scales."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from ultralytics.utils import LOGGER, RANK

from yolo_prune.channels import ChannelGraph
from yolo_prune.errors import ConfigError
from yolo_prune.files import write_json
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.hosts.ultralytics.trainer import network_of
from yolo_prune.importance.base import FloatArray
from yolo_prune.methods.health import (
    SILENT,
    EpochHealth,
    GroupHealth,
    HealthTable,
    group_health,
    macs_without,
    warnings_of,
)
from yolo_prune.methods.slimming import ScalePenalty, carry_zeros, channel_scales, penalised_channels
from yolo_prune.methods.strength import AutoStrength, Sparsity, schedule_factor

Scope: TypeAlias = Literal["backbone", "neck", "head"]
SCOPES: tuple[Scope, ...] = ("backbone", "neck", "head")

RECORD, TABLE, PICTURE = "sparsity.json", "sparsity.csv", "sparsity.png"
"""What a run leaves in its folder: its state, one row a group and epoch, and the scales over the epochs."""

BINS = 50


@dataclass(frozen=True, kw_only=True)
class SparsityOptions(Sparsity):
    """How scales are penalised, and where.

    Attributes:
        scope: Parts of the network whose groups are penalised.

    Raises:
        ConfigError: A value that is out of range or unknown.
    """

    scope: tuple[Scope, ...] = SCOPES

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scope or not set(self.scope) <= set(SCOPES):
            raise ConfigError(f"sparsity scope [{','.join(self.scope)}]", expected=f"some of {', '.join(SCOPES)}")


@dataclass
class SparsityTraining:
    """The callbacks of one sparsity training; made anew, or from its record, in every process that trains.

    Attributes:
        options: How scales are penalised.
        draw: Draws the picture from the record and writes it to a path; no picture without.
    """

    options: SparsityOptions
    draw: Callable[[dict[str, Any], Path], None] | None = None
    _run: _Run | None = field(default=None, init=False)

    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        """Return what the host's trainer calls, by event. Picklable before training begins."""
        return {
            "on_pretrain_routine_end": self.begin,
            "on_train_epoch_start": self.begin_epoch,
            "on_train_epoch_end": self.end_epoch,
            "on_fit_epoch_end": self.tell_loggers,
            "on_train_end": self.finish,
        }

    def begin(self, trainer: Any) -> None:
        """Trace the network that is trained and hook the optimizer; go on from the record where training is resumed."""
        self._run = _Run(self.options, trainer)

    def begin_epoch(self, trainer: Any) -> None:
        """Set the strength of the epoch; look anew at a network that was pruned since."""
        run = self._known_run()
        if run.network is not network_of(trainer.model):
            run.look_again(trainer)
        run.begin_epoch(trainer)

    def end_epoch(self, trainer: Any) -> None:
        """Carry zeros into the EMA, measure, write, warn."""
        self._known_run().end_epoch(trainer)

    def tell_loggers(self, trainer: Any) -> None:
        """Lay the figures where the host's integrations (TensorBoard, MLflow, W&B) find them."""
        if trainer.metrics is not None:  # on several GPUs, the first process alone has them
            trainer.metrics.update(self._known_run().figures())

    def finish(self, trainer: Any) -> None:
        """Draw the picture and register it with the host's plots."""
        record = trainer.save_dir / RECORD
        if self.draw is None or not trainer.args.plots or not record.is_file():
            return
        picture = trainer.save_dir / PICTURE
        self.draw(json.loads(record.read_text(encoding="utf-8")), picture)
        trainer.on_plot(picture)

    def _known_run(self) -> _Run:
        assert self._run is not None  # the host calls `begin` first
        return self._run


class _Run:
    """What one process knows of a sparsity training."""

    def __init__(self, options: SparsityOptions, trainer: Any) -> None:
        self.options, self.auto = options, AutoStrength(share=options.share)
        self.imgsz_px = int(trainer.args.imgsz)
        self.history: list[EpochHealth] = []
        self.penalty = self._penalty_on(trainer)
        self.table = HealthTable(trainer.save_dir / TABLE)
        self.lr_sums = learning_rates(trainer, initial=self.penalty.mean_setting("initial_lr"))
        record = _read(trainer.save_dir / RECORD) if trainer.resume else None
        if record is None:
            self._start()
        else:
            self._go_on(record, done=trainer.start_epoch)
        self._write(trainer)

    def look_again(self, trainer: Any) -> None:
        """Follow a network that was pruned since: other channels, which have another way to go."""
        self.penalty.detach()
        self.penalty = self._penalty_on(trainer)
        distance = self.auto.wish(self._norms()[self.penalty.chosen])
        self.history[-1] = dataclasses.replace(self.history[-1], distance=distance)

    def _penalty_on(self, trainer: Any) -> ScalePenalty:
        """Trace the network that is trained and hook the optimizer."""
        self.network = network_of(trainer.model)
        self.graph = trace_model(copy.deepcopy(self.network).cpu().float().eval())
        chosen = penalised_channels(self.graph, groups_in(self.graph, self.network, self.options.scope))
        penalty = ScalePenalty(self.graph, dict(self.network.named_parameters()), chosen, mode=self.options.mode)
        penalty.attach(trainer.optimizer)
        return penalty

    def _start(self) -> None:
        norms = self._norms()
        self.below = SILENT * float(np.median(norms[self.penalty.chosen]))
        self.largest = float(norms[self.penalty.chosen].max())
        self._measure(epoch=0, base=0.0)

    def _go_on(self, record: dict[str, Any], *, done: int) -> None:
        self.below, self.largest = record["silent_below"], record["largest"]
        self.history = [EpochHealth(**epoch) for epoch in record["epochs"] if epoch["epoch"] <= done]
        self.table.load(done)

    def begin_epoch(self, trainer: Any) -> None:
        """Set the strength of the epoch that begins."""
        for key in self.figures():
            (trainer.metrics or {}).pop(key, None)  # the host's columns are those of the first epoch
        if len(self.lr_sums) != trainer.epochs:  # `time=` lets the host change its mind
            self.lr_sums = learning_rates(trainer, initial=self.penalty.mean_setting("initial_lr"))
        self.penalty.forget()
        self.history = self.history[: trainer.epoch + 1]  # an epoch that the host repeats counts once
        factor = schedule_factor(self.options.schedule, trainer.epoch / trainer.epochs)
        self.penalty.strength = factor * self._base(trainer)
        if trainer.epoch == trainer.start_epoch or self.options.strength is None:
            LOGGER.info(self._plan(trainer))

    def _base(self, trainer: Any) -> float:
        """Return the strength before the schedule."""
        if self.options.strength is not None:
            return self.options.strength
        left = range(trainer.epoch, trainer.epochs)
        factors = [schedule_factor(self.options.schedule, epoch / trainer.epochs) for epoch in left]
        reach = float(np.dot(self.lr_sums[trainer.epoch : trainer.epochs], factors)) * self.penalty.momentum_gain()
        last = self.history[-1]
        return self.auto.strength(last.distance, reach, arrived=last.arrived)

    def _plan(self, trainer: Any) -> str:
        chosen, last = int(self.penalty.chosen.sum()), self.history[-1]
        budget = self.penalty.strength * float(self.lr_sums[trainer.epoch :].sum()) * self.penalty.momentum_gain()
        how = "auto" if self.options.strength is None else "given"
        return (
            f"sparsity: strength {self.penalty.strength:.3g} ({how}, {self.options.mode}, {self.options.schedule}) on "
            f"{chosen:,} scales; kept up, it moves a scale by {budget:.3g} until the end; "
            f"{self.options.share:.0%} of them are below {last.distance:.3g}"
        )

    def end_epoch(self, trainer: Any) -> None:
        """Carry zeros into the EMA, which lags behind; measure, write, warn."""
        if trainer.ema is not None:
            average = network_of(trainer.ema.ema)
            carry_zeros(self.graph, dict(self.network.named_parameters()), dict(average.named_parameters()))
        groups = self._measure(epoch=trainer.epoch + 1, base=self.penalty.strength)
        self._write(trainer)
        if RANK in {-1, 0}:
            for warning in warnings_of(self.history, groups):
                LOGGER.warning(f"sparsity, epoch {trainer.epoch + 1}: {warning}")

    def _measure(self, *, epoch: int, base: float) -> list[GroupHealth]:
        """Append the figures of an epoch to the history and to the table."""
        norms, chosen = self._norms(), self.penalty.chosen
        silent = chosen & (np.nan_to_num(norms, nan=np.inf) < self.below)
        groups = group_health(self.graph, chosen, norms, self.penalty.mean_gradient(), strength=base, below=self.below)
        distance = self.auto.wish(norms[chosen])
        nominal = base * self.penalty.lr_sum * self.penalty.momentum_gain()
        moved = self.history[-1].distance - distance if self.history else 0.0
        pulls = [group.pull for group in groups if np.isfinite(group.pull)]
        self.history.append(
            EpochHealth(
                epoch=epoch,
                strength=base,
                silent=float(silent.sum() / chosen.sum()),
                macs=macs_without(self.graph, silent, imgsz_px=self.imgsz_px),
                distance=distance,
                nominal=nominal,
                arrived=moved / nominal if nominal else 1.0,
                pull=float(np.median(pulls)) if pulls else 0.0,
                histogram=np.histogram(norms[chosen], bins=BINS, range=(0.0, self.largest))[0].tolist(),
            )
        )
        self.table.add(epoch, groups)
        return groups

    def _norms(self) -> FloatArray:
        return channel_scales(self.graph, dict(self.network.named_parameters()))

    def figures(self) -> dict[str, float]:
        """Return the last epoch's figures by the name that loggers show."""
        last = self.history[-1]
        return {
            "sparsity/strength": last.strength,
            "sparsity/silent": last.silent,
            "sparsity/macs": last.macs,
            "sparsity/pull": last.pull,
        }

    def _write(self, trainer: Any) -> None:
        if RANK not in {-1, 0}:
            return
        record = {
            "options": asdict(self.options),
            "silent_below": self.below,
            "largest": self.largest,
            "epochs": [epoch.to_json() for epoch in self.history],
        }
        write_json(trainer.save_dir / RECORD, record, replace=True)
        self.table.write()


def groups_in(graph: ChannelGraph, network: Any, scope: tuple[Scope, ...]) -> list[int]:
    """Return the indices of the groups whose first producer lies in some parts of a network.

    The yaml's `backbone` counts the layers of the backbone; the last layer is the head, what lies between is the neck.
    """
    backbone, last = len(network.yaml["backbone"]), len(network.model) - 1

    def part(name: str) -> Scope:
        layer = int(name.split(".")[1])
        return "head" if layer == last else "backbone" if layer < backbone else "neck"

    return [index for index in graph.free_groups() if part(graph.groups[index].name) in scope]


def learning_rates(trainer: Any, *, initial: float) -> FloatArray:
    """Return the sum of the learning rates of each epoch's steps, shape (epochs,), as the host schedules them.

    Args:
        trainer: The host's trainer, set up.
        initial: Learning rate that the schedule multiplies.
    """
    batches, epochs = len(trainer.train_loader), int(trainer.epochs)
    warmup = trainer._get_warmup_iterations(batches)
    sums = np.zeros(epochs)
    for epoch in range(epochs):
        rate, iterations = initial * trainer.lf(epoch), epoch * batches + np.arange(batches)
        rates, accumulate = np.full(batches, rate), np.full(batches, float(trainer.accumulate))
        if warmup:
            rates = np.interp(iterations, [0, warmup], [0.0, rate])
            accumulate = np.interp(iterations, [0, warmup], [1.0, trainer.accumulate]).round().clip(1)
        sums[epoch] = float((rates / accumulate).sum())
    return sums


def options_of(folder: Path) -> SparsityOptions | None:
    """Return how the scales of a run in a folder are penalised; None if they are not."""
    record = _read(folder / RECORD)
    if record is None:
        return None
    options = record["options"]
    return SparsityOptions(**{**options, "scope": tuple(options["scope"])})


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
