"""ResRep inside the host's trainer: compactors in stock blocks, masks by a schedule, a slim network in the end.

Source: Ding et al., ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting, ICCV 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER, RANK

from yolo_prune.allocation import Budget, Constraints
from yolo_prune.channels import BoolArray, IntArray
from yolo_prune.errors import ConfigError
from yolo_prune.files import from_record, read_record, write_json
from yolo_prune.hosts.slim import MARKER, mark, unfinished
from yolo_prune.hosts.ultralytics.compactors import (
    add_compactors,
    compactor_weights,
    frozen_names,
    suitable,
    with_compactors,
    without_compactors,
)
from yolo_prune.hosts.ultralytics.networks import bare_copy, network_of
from yolo_prune.hosts.ultralytics.refusals import require_plain
from yolo_prune.hosts.ultralytics.resrep_conversion import NAME, RECORD, convert_run
from yolo_prune.hosts.ultralytics.run_files import forget_best
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.hosts.ultralytics.trainer import BEFORE_FINAL_EVAL, MODEL_SETUP, OPTIMIZER_BUILT
from yolo_prune.methods.resrep.forgetting import KEPT_STRENGTH, PARAM_GROUP, Forgetting, give_own_group, masked_channels
from yolo_prune.methods.resrep.options import ResRepOptions
from yolo_prune.methods.resrep.schedule import Course, Pull, choose
from yolo_prune.methods.resrep.targets import maskable, prunable, require_target, sole_producers


@dataclass(frozen=True)
class _State:
    """What masks were at the beginning of an epoch."""

    epoch: int
    masked: BoolArray
    settled: bool
    strength: float
    gone: bool


@dataclass
class ResRepTraining:
    """The callbacks of one training; its state lies in the network's marker, and so in every checkpoint.

    Attributes:
        options: How it prunes.
    """

    options: ResRepOptions
    _graph: Any = field(default=None, init=False)
    _targets: dict[str, IntArray] = field(default_factory=dict, init=False)
    _forgetting: Any = field(default=None, init=False)
    _imgsz_px: int = field(default=0, init=False)
    _reachable: float = field(default=0.0, init=False)
    _batch: int = field(default=0, init=False)
    _gone: bool = field(default=False, init=False)
    _epochs: list[dict[str, Any]] = field(default_factory=list, init=False)
    _before: _State | None = field(default=None, init=False)

    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        """Return what the host's trainer calls, by event. Picklable before training begins."""
        return {
            MODEL_SETUP: self.set_up,
            OPTIMIZER_BUILT: self.give_own_group,
            "on_pretrain_routine_end": self.begin,
            "on_train_epoch_start": self.begin_epoch,
            "on_train_batch_start": self.count,
            "on_train_epoch_end": self.end_epoch,
            BEFORE_FINAL_EVAL: self.convert,
        }

    def set_up(self, trainer: Any) -> None:
        """Put compactors into a network that has none yet; one that is read back has them.

        Raises:
            ConfigError: A training that cannot have compactors.
            InfeasibleTargetError: The target is out of reach.
        """
        require_plain(vars(trainer.args), f"method={NAME}")
        network = network_of(trainer.model)
        if trainer.resume:
            _require_own(network, trainer)
        self._graph = trace_model(without_compactors(bare_copy(trainer.model)))
        stride = max(int(network.stride.max()), 32)
        self._imgsz_px = math.ceil(int(trainer.args.imgsz) / stride) * stride  # as the host will round it
        found = with_compactors(network) if trainer.resume else suitable(network, frozen_names(trainer.args.freeze))
        producers = sole_producers(self._graph)
        self._targets = {path: producers[path] for path in found if path in producers}
        if not trainer.resume:
            self._targets = prunable(self._graph, self._targets, self.options.constraints)
        self._reachable = require_target(
            maskable(self._graph, self._targets),
            Budget(unit="macs", ratio=self.options.target, imgsz_px=self._imgsz_px),
            self.options.constraints,
        )
        if not trainer.resume:
            add_compactors(network, self._targets)
            mark(network, unfinished=NAME)
        LOGGER.info(
            f"resrep: compactors behind {len(self._targets)} of {len(self._graph.norms)} convolutions with a batch "
            f"norm; without every row that may go, {self._reachable:.1%} of the MACs are left"
        )

    def give_own_group(self, trainer: Any) -> None:
        """Give the compactors a parameter group of their own."""
        give_own_group(trainer.optimizer, list(compactor_weights(trainer.model, self._targets).values()))

    def begin(self, trainer: Any) -> None:
        """Check that masked rows will be gone in the end, hook the optimizer, and begin, or read, the record.

        Raises:
            ConfigError: The training is too short for the settings, or is resumed with others.
        """
        record = read_record(trainer.save_dir / RECORD) if trainer.resume else None
        course = _course(trainer)
        weights = compactor_weights(trainer.model, self._targets)
        _require_trained(weights)
        if record is None:
            pull = self._chosen(course)
        else:
            _require_same_course(record, course)
            pull = Pull(strength=record["strength"], momentum=record["momentum"])
        self._forgetting = Forgetting(
            self._graph, self._targets, weights,
            course=course, pull=pull, target=self.options.target, constraints=self.options.constraints,
            imgsz_px=self._imgsz_px, interval=self.options.interval,
        )  # fmt: skip
        self._forgetting.attach(trainer.optimizer)
        if record is not None:
            self._restore(network_of(trainer.model))
            self._epochs = [row for row in record["epochs"] if row["epoch"] <= trainer.start_epoch]
        self._write(trainer)

    def begin_epoch(self, trainer: Any) -> None:
        """Go back to the masks of the epoch's beginning where the host repeats it; follow a smaller batch."""
        forgetting, before = self._forgetting, self._before
        if before is not None and before.epoch == trainer.epoch:
            forgetting.restore(before.masked, settled=before.settled, strength=before.strength)
            self._gone = before.gone
        if len(trainer.train_loader) != forgetting.course.batches:  # out of memory, so the host halved the batch
            course = _course(trainer)
            forgetting.pull = self._chosen(course)
            forgetting.strength = forgetting.pull.strength
            forgetting.follow(course)
            self._write(trainer)
        self._before = _State(trainer.epoch, forgetting.masked, forgetting.settled, forgetting.strength, self._gone)
        self._batch = 0

    def count(self, trainer: Any) -> None:
        """Say which iteration begins: the learning rates of all of them are known."""
        self._forgetting.iteration = trainer.epoch * self._forgetting.course.batches + self._batch
        self._batch += 1

    def end_epoch(self, trainer: Any) -> None:
        """Carry masked rows into the average, which lags behind, and note where the training is.

        Until all of them are gone, the best network and the patience with it begin anew: what scores well before, with
        its masked rows still heard, is another network than the one that is kept.
        """
        forgetting = self._forgetting
        forgetting.end()
        forgetting.carry(compactor_weights(trainer.ema.ema, self._targets))
        if not self._gone:
            forget_best(trainer)
        self._gone = forgetting.gone
        state = {"settled": forgetting.settled, "strength": forgetting.strength, "gone": self._gone}
        for model in (network_of(trainer.model), network_of(trainer.ema.ema)):
            mark(model, **{NAME: {**state, "masked": forgetting.masked_rows()}})
        self._epochs = [row for row in self._epochs if row["epoch"] <= trainer.epoch]
        self._epochs.append({"epoch": trainer.epoch + 1, **state, **self._figures()})
        self._write(trainer)

    def convert(self, trainer: Any) -> None:
        """Make slim checkpoints of the best and the last one."""
        convert_run(trainer.save_dir)

    def _figures(self) -> dict[str, float]:
        forgetting = self._forgetting
        return {
            "masked": forgetting.share(),
            "macs": forgetting.macs(),
            "largest_masked": forgetting.largest_masked(),
            "smallest_kept": forgetting.smallest_kept(),
        }

    def _chosen(self, course: Course) -> Pull:
        """Return how hard rows are pulled, and say so."""
        pull = choose(course, strength=self.options.strength, momentum=self.options.momentum)
        LOGGER.info(
            f"resrep: strength {pull.strength:.3g} and momentum {pull.momentum:g}; {len(course.steps)} optimizer "
            f"steps, masks grow in epochs {course.mask_from / course.batches + 1:.1f} to "
            f"{course.mask_until / course.batches + 1:.1f} of {course.epochs}"
        )
        if pull.strength > KEPT_STRENGTH:
            LOGGER.warning(
                f"resrep: so few steps need a strength above {KEPT_STRENGTH:g} for masked rows; others have that at "
                "most. More epochs, or nbs= as small as batch=, let rows compete for longer"
            )
        return pull

    def _restore(self, network: nn.Module) -> None:
        """Go on with the masks that a checkpoint carries."""
        state = getattr(network, MARKER)[NAME]
        masked = masked_channels(self._graph, self._targets, state["masked"])
        self._forgetting.restore(masked, settled=state["settled"], strength=state["strength"])
        self._gone = state["gone"]

    def _write(self, trainer: Any) -> None:
        if RANK not in {-1, 0}:
            return
        forgetting = self._forgetting
        record = {
            "options": asdict(self.options),
            "strength": forgetting.pull.strength,
            "momentum": forgetting.pull.momentum,
            "batches": forgetting.course.batches,
            "accumulate": forgetting.course.accumulate,
            "imgsz_px": self._imgsz_px,
            "reachable": self._reachable,
            "epochs": self._epochs,
        }
        write_json(trainer.save_dir / RECORD, record, replace=True)


def _course(trainer: Any) -> Course:
    groups = trainer.optimizer.param_groups
    (lr,) = [group["initial_lr"] for group in groups if group.get("param_group") == PARAM_GROUP]
    return Course(
        epochs=int(trainer.epochs),
        batches=len(trainer.train_loader),
        warmup_epochs=float(trainer.args.warmup_epochs),
        accumulate=int(trainer.accumulate),
        lr=float(lr),
        factor=trainer.lf,
    )


def _require_own(network: nn.Module, trainer: Any) -> None:
    """Refuse to resume from a network without compactors."""
    if unfinished(network) != NAME or not with_compactors(network):
        raise ConfigError(
            f"'{trainer.args.model}' has no compactors",
            expected="the last.pt of an interrupted training with method=resrep",
        )


def _require_trained(weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse frozen compactors, which would never forget."""
    stuck = [path for path, weight in weights.items() if not weight.requires_grad]
    if stuck:
        raise ConfigError(
            f"freeze= reaches {len(stuck)} compactors, first that of '{stuck[0]}'",
            expected="as many frozen layers as the run began with",
            remedy="leave freeze out with resume=true",
        )


def _require_same_course(record: Mapping[str, Any], course: Course) -> None:
    """Refuse to go on with other steps than those from which the strength was chosen."""
    found = {"batches": course.batches, "accumulate": course.accumulate}
    known = {key: record[key] for key in found}
    if found != known:
        raise ConfigError(
            f"resumed with {found['batches']} batches an epoch and {found['accumulate']} a step",
            expected=f"{known['batches']} and {known['accumulate']}, as the run began: its schedule depends on them",
            remedy="resume with the same data and batch",
        )


def resrep_options_of(folder: Path) -> ResRepOptions | None:
    """Return how the network of a run in a folder is pruned; None if it is not.

    Raises:
        ConfigError: The record is damaged.
    """
    return from_record(folder / RECORD, _options_in)


def _options_in(record: dict[str, Any]) -> ResRepOptions:
    options = record["options"]
    return ResRepOptions(**{**options, "constraints": Constraints(**options["constraints"])})
