"""Stripe-wise pruning inside the host's trainer: skeletons beside the weights, and a stock network when it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from ultralytics.utils import LOGGER, RANK

from yolo_prune.errors import ConfigError, InfeasibleTargetError
from yolo_prune.files import from_record, read_record, write_json
from yolo_prune.hosts.slim import UNFINISHED, mark
from yolo_prune.hosts.ultralytics.networks import bare_copy, network_of
from yolo_prune.hosts.ultralytics.records import FILES
from yolo_prune.hosts.ultralytics.refusals import require_plain
from yolo_prune.hosts.ultralytics.run_files import forget_best, renew_best
from yolo_prune.hosts.ultralytics.stripe_layers import METHOD, StripePrices, dead_stripes, layers_of, striped_paths
from yolo_prune.hosts.ultralytics.stripes_finish import finish_run
from yolo_prune.hosts.ultralytics.trainer import BEFORE_FINAL_EVAL, MODEL_SETUP, OPTIMIZER_BUILT
from yolo_prune.importance.base import FloatArray
from yolo_prune.methods.steps import learning_rates
from yolo_prune.methods.stripes.options import StripeOptions, falling_epochs
from yolo_prune.methods.stripes.ranking import StripeFloors, StripeRanking
from yolo_prune.methods.stripes.skeleton import SkeletonSteps, grow_skeleton, require_sgd

(RECORD,) = FILES[METHOD]
"""What a run leaves in its folder: its settings, the cost at the start, and what was left after each epoch."""

TINY = 1e-12
"""Keeps a training without a step from dividing by zero."""


@dataclass
class StripeTraining:
    """The callbacks of one training whose stripes are pruned.

    Attributes:
        options: How they are.
    """

    options: StripeOptions
    _steps: SkeletonSteps | None = field(default=None, init=False)
    _prices: StripePrices | None = field(default=None, init=False)
    _network: Any = field(default=None, init=False)
    _strength: float = field(default=0.0, init=False)
    _epochs: list[dict[str, Any]] = field(default_factory=list, init=False)

    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        """Return what the host's trainer calls, by event. Picklable before training begins."""
        return {
            MODEL_SETUP: self.grow,
            OPTIMIZER_BUILT: self.set_apart,
            "on_pretrain_routine_end": self.begin,
            "on_train_epoch_start": self.begin_epoch,
            "on_train_epoch_end": self.end_epoch,
            BEFORE_FINAL_EVAL: self.finish,
        }

    def grow(self, trainer: Any) -> None:
        """Give the network its skeletons, unless it is resumed and has them.

        Raises:
            ConfigError: A training in which the network is another one than its weights say, or no stripes.
        """
        require_plain(vars(trainer.args), f"method={METHOD}")
        network = network_of(trainer.model)
        if not layers_of(network):
            for path in striped_paths(network):
                grow_skeleton(network.get_submodule(path))
            mark(network, **{UNFINISHED: METHOD})

    def set_apart(self, trainer: Any) -> None:
        """Move the skeletons into a group of their own, without weight decay.

        Raises:
            ConfigError: The optimizer is not SGD.
        """
        optimizer = trainer.optimizer
        require_sgd(optimizer)
        skeletons = {id(layer.skeleton): layer.skeleton for layer in layers_of(network_of(trainer.model)).values()}
        for group in optimizer.param_groups:
            group["params"] = [tensor for tensor in group["params"] if id(tensor) not in skeletons]
        like = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        group = {**like, "params": list(skeletons.values()), "weight_decay": 0.0, "param_group": METHOD}
        optimizer.add_param_group(group)

    def begin(self, trainer: Any) -> None:
        """Price the stripes, check that the target can be reached and the strength moves skeletons far enough.

        Raises:
            ConfigError: The strength does not let a skeleton come down to the threshold, or every stripe is frozen.
            InfeasibleTargetError: Floors, or layers without stripes, cost more than the target.
        """
        network = network_of(trainer.model)
        layers = {path: layer for path, layer in layers_of(network).items() if layer.conv.weight.requires_grad}
        if not layers:
            raise ConfigError("every convolution with stripes is frozen", expected="one that is trained")
        self._network, self._prices = network, StripePrices(bare_copy(trainer.model), int(trainer.args.imgsz))
        self._steps = SkeletonSteps(layers, threshold=self.options.threshold)
        self._steps.attach(trainer.optimizer)
        record = read_record(trainer.save_dir / RECORD) if trainer.resume else None
        if record is not None:
            self._strength = float(record["strength"])
            self._epochs = [epoch for epoch in record["epochs"] if epoch["epoch"] <= trainer.start_epoch]
            if RANK in {-1, 0}:
                renew_best(trainer.last, trainer.best, structure=dead_stripes)
            return
        self._require_reachable()
        self._strength = self._chosen_strength(trainer)
        self._write(trainer)
        self._tell(f"{len(layers)} layers with {self._total():,} stripes, strength {self._strength:.3g}")

    def begin_epoch(self, trainer: Any) -> None:
        """Let the weakest stripes die that are above what the epoch may cost, and set the strength."""
        steps, options = self._known_steps(), self.options
        if options.target is not None and trainer.epoch < falling_epochs(trainer.epochs):
            trainer.stopper.best_epoch = trainer.epoch  # to stop early would be to stop above the target
        kept = options.kept_in(trainer.epoch, trainer.epochs)
        if options.target is not None and self._kept() > kept:
            dying = self._ranking().within(kept * self._known_prices().dense_macs, self._price)
            steps.kill(dying, trainer.optimizer)
        reached = options.target is not None and self._kept() <= options.target
        steps.strength = 0.0 if reached else self._strength

    def end_epoch(self, trainer: Any) -> None:
        """Carry the dead into the average, and let the best checkpoint be one in which they are dead."""
        steps, dead = self._known_steps(), self._dead()
        if trainer.ema is not None:
            average = layers_of(network_of(trainer.ema.ema))
            steps.carry({path: average[path] for path in steps.layers})
        done = [epoch for epoch in self._epochs if epoch["epoch"] <= trainer.epoch]  # the host may repeat an epoch
        if dead > (done[-1]["dead"] if done else 0):
            forget_best(trainer)
        now = {"epoch": trainer.epoch + 1, "strength": steps.strength, "dead": dead, "kept_macs": self._kept()}
        self._epochs = [*done, now]
        self._write(trainer)
        self._tell(f"{dead:,} of {self._total():,} dead, {self._kept():.1%} of the MACs, counted in stripes")
        target = self.options.target
        if target is not None and trainer.epoch + 1 == trainer.epochs and self._kept() > target:
            LOGGER.warning(f"stripes: floors kept the training from its target of {target:.1%} of the MACs")

    def finish(self, trainer: Any) -> None:
        """Make the run's checkpoints stock ones: no skeletons, dead filters removed where the network allows it."""
        finish_run(trainer.save_dir)

    def _price(self, dying: Mapping[str, Tensor]) -> float:
        """Return the MACs that are left without some stripes, at the side of the training's images."""
        return self._known_prices().macs(self._network, dying)

    def _kept(self) -> float:
        """Return the fraction of the MACs of the network with all its stripes that is left."""
        return self._price({}) / self._known_prices().dense_macs

    def _ranking(self) -> StripeRanking:
        return StripeRanking(self._known_steps().layers, self._known_prices().per_stripe, self.options.floors)

    def _require_reachable(self) -> None:
        target = self.options.target
        if target is None:
            return
        ranking = self._ranking()
        least = self._price(ranking.first(len(ranking))) / self._known_prices().dense_macs
        if least > target:
            raise InfeasibleTargetError(
                f"target_macs={target} cannot be reached by stripes",
                expected=f"at least {np.ceil(least * 1e4) / 1e4:.4f}: 1x1 and the head's last layers have no stripes, "
                "and min_channels and max_fraction keep some",
                remedy="raise the target, or prune channels first: yolo-prune prune",
            )

    def _chosen_strength(self, trainer: Any) -> float:
        """Return the strength: given, or what brings unopposed skeletons far enough while stripes die.

        Raises:
            ConfigError: A given one with which no skeleton can die, and no target that stripes could die for.
        """
        options, lr_sums, gain = self.options, self._learning_rates(trainer), _gain(trainer)
        if options.strength is None:
            falling = float(lr_sums[: falling_epochs(trainer.epochs)].sum())
            return options.distance() / max(falling * gain, TINY)
        reach = options.strength * float(lr_sums.sum()) * gain
        if options.target is None and reach < options.distance():
            needed = options.strength * options.distance() / max(reach, TINY)
            raise ConfigError(
                f"stripes.strength={options.strength:g} moves a skeleton by {reach:.2g} in this training",
                expected=f"{options.distance():g}, from 1 down to the threshold: strength {needed:.2g} or more",
                remedy="stripes.strength=auto, a stronger one, more epochs, or target_macs=",
            )
        return options.strength

    def _learning_rates(self, trainer: Any) -> FloatArray:
        batches = len(trainer.train_loader)
        return learning_rates(
            float(_group(trainer)["initial_lr"]),
            trainer.lf,
            epochs=int(trainer.epochs),
            batches=batches,
            warmup=trainer._get_warmup_iterations(batches),
            accumulate=trainer.accumulate,
        )

    def _dead(self) -> int:
        return sum(int((~layer.alive()).sum()) for layer in self._known_steps().layers.values())

    def _total(self) -> int:
        return sum(layer.skeleton.numel() for layer in self._known_steps().layers.values())

    def _tell(self, message: str) -> None:
        if RANK in {-1, 0}:
            LOGGER.info(f"stripes: {message}")

    def _write(self, trainer: Any) -> None:
        if RANK not in {-1, 0}:
            return
        record = {"options": asdict(self.options), "macs": self._known_prices().dense_macs}
        record |= {"imgsz_px": int(trainer.args.imgsz), "stripes": self._total(), "strength": self._strength}
        record["epochs"] = self._epochs
        write_json(trainer.save_dir / RECORD, record, replace=True)

    def _known_prices(self) -> StripePrices:
        assert self._prices is not None  # as below
        return self._prices

    def _known_steps(self) -> SkeletonSteps:
        assert self._steps is not None  # the host calls `begin` first
        return self._steps


def _group(trainer: Any) -> dict[str, Any]:
    """Return the skeletons' group of parameters."""
    group: dict[str, Any] = next(
        group for group in trainer.optimizer.param_groups if group.get("param_group") == METHOD
    )
    return group


def _gain(trainer: Any) -> float:
    """Return by what momentum multiplies a gradient in the long run."""
    return float(1.0 / (1.0 - min(trainer.args.momentum, 0.999)))


def stripe_options_of(folder: Path) -> StripeOptions | None:
    """Return how the stripes of a run in a folder are pruned; None if they are not.

    Raises:
        ConfigError: The record is damaged.
    """
    return from_record(folder / RECORD, _options_in)


def _options_in(record: dict[str, Any]) -> StripeOptions:
    options = record["options"]
    return StripeOptions(**{**options, "floors": StripeFloors(**options["floors"])})
