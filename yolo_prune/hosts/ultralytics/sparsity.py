"""Sparsity training inside the host's trainer: callbacks that hook its optimizer and watch the scales."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from ultralytics.utils import LOGGER, RANK

from yolo_prune.channels import ChannelGraph
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.ultralytics.checkpoints import DEPLOYED_TASKS, task_of
from yolo_prune.hosts.ultralytics.collection import images_of, recalibrate_on
from yolo_prune.hosts.ultralytics.networks import bare_copy, network_of
from yolo_prune.hosts.ultralytics.records import FILES
from yolo_prune.hosts.ultralytics.run_files import forget_best
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.importance.base import FloatArray
from yolo_prune.methods.slimming.course import PICTURE, RECORD, SETTLING, PenaltyCourse, sparsity_record
from yolo_prune.methods.slimming.penalty import penalised_channels
from yolo_prune.methods.slimming.strength import Sparsity
from yolo_prune.methods.steps import learning_rates

Scope: TypeAlias = Literal["backbone", "neck", "head"]
SCOPES: tuple[Scope, ...] = ("backbone", "neck", "head")


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
    _course: PenaltyCourse | None = field(default=None, init=False)
    _network: Any = field(default=None, init=False)
    _lr_sums: FloatArray = field(default_factory=lambda: np.zeros(0), init=False)

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
        self._course = PenaltyCourse(
            self.options, trainer.save_dir, imgsz_px=int(trainer.args.imgsz), writes=RANK in {-1, 0}
        )
        self._attach(trainer)
        self._lr_sums = self._learning_rates(trainer)  # now: warm-up changes what the trainer says of itself
        self._course.start(trainer.start_epoch if trainer.resume else 0)

    def begin_epoch(self, trainer: Any) -> None:
        """Set the strength of the epoch; look anew at a network that was pruned since.

        The best network is the last one, which the scales are read from: an earlier one has the higher mAP because its
        scales are larger. A training that also prunes keeps its own best among the slim ones.
        """
        course = self._known_course()
        if not (trainer.save_dir / FILES["pruning"][0]).is_file():
            forget_best(trainer)
        if self._network is not network_of(trainer.model):
            self._attach(trainer)
        for key in course.figures():
            (trainer.metrics or {}).pop(key, None)  # the host's columns are those of the first epoch
        if len(self._lr_sums) != trainer.epochs:  # `time=` lets the host change its mind
            self._lr_sums = self._learning_rates(trainer)
        plan = course.begin_epoch(trainer.epoch, self._lr_sums)
        if plan:
            LOGGER.info(plan)

    def end_epoch(self, trainer: Any) -> None:
        """Carry zeros into the EMA, which lags behind, and measure its norms anew; measure, write, warn."""
        course = self._known_course()
        if trainer.ema is not None:
            course.carry_zeros(dict(network_of(trainer.ema.ema).named_parameters()))
            _settle(trainer)
        warnings = course.end_epoch()
        if RANK in {-1, 0}:
            for warning in warnings:
                LOGGER.warning(f"sparsity, epoch {trainer.epoch + 1}: {warning}")

    def tell_loggers(self, trainer: Any) -> None:
        """Lay the figures where the host's integrations (TensorBoard, MLflow, W&B) find them."""
        if trainer.metrics is not None:  # on several GPUs, the first process alone has them
            trainer.metrics.update(self._known_course().figures())

    def finish(self, trainer: Any) -> None:
        """Draw the picture and register it with the host's plots."""
        record = trainer.save_dir / RECORD
        if self.draw is None or not trainer.args.plots or not record.is_file():
            return
        picture = trainer.save_dir / PICTURE
        self.draw(json.loads(record.read_text(encoding="utf-8")), picture)
        trainer.on_plot(picture)

    def _attach(self, trainer: Any) -> None:
        """Trace the network that is trained and hook the optimizer."""
        self._network = network_of(trainer.model)
        graph = trace_model(bare_copy(trainer.model))
        chosen = penalised_channels(graph, groups_in(graph, self._network, self.options.scope))
        self._known_course().attach(graph, dict(self._network.named_parameters()), chosen, trainer.optimizer)

    def _learning_rates(self, trainer: Any) -> FloatArray:
        batches = len(trainer.train_loader)
        return learning_rates(
            self._known_course().penalty.mean_setting("initial_lr"),
            trainer.lf,
            epochs=int(trainer.epochs),
            batches=batches,
            warmup=trainer._get_warmup_iterations(batches),
            accumulate=trainer.accumulate,
        )

    def _known_course(self) -> PenaltyCourse:
        assert self._course is not None  # the host calls `begin` first
        return self._course


def _settle(trainer: Any) -> None:
    """Measure the batch-norm statistics of the average anew, before it is validated and saved; see `SETTLING`."""
    network = network_of(trainer.ema.ema)
    if RANK in {-1, 0} and task_of(network) in DEPLOYED_TASKS:
        with contextlib.suppress(ConfigError):  # weights that are not finite: the host goes back to the epoch before
            recalibrate_on(network, images_of(trainer, batches=SETTLING))


def groups_in(graph: ChannelGraph, network: Any, scope: tuple[Scope, ...]) -> list[int]:
    """Return the indices of the groups whose first producer lies in some parts of a network.

    The yaml's `backbone` counts the layers of the backbone; the last layer is the head, what lies between is the neck.
    """
    backbone, last = len(network.yaml["backbone"]), len(network.model) - 1

    def part(name: str) -> Scope:
        layer = int(name.split(".")[1])
        return "head" if layer == last else "backbone" if layer < backbone else "neck"

    return [index for index in graph.free_groups() if part(graph.groups[index].name) in scope]


def sparsity_options_of(folder: Path) -> SparsityOptions | None:
    """Return how the scales of a run in a folder are penalised; None if they are not.

    Raises:
        ConfigError: The record is damaged.
    """
    record = sparsity_record(folder)
    if record is None:
        return None
    options = record["options"]
    return SparsityOptions(**{**options, "scope": tuple(options["scope"])})
