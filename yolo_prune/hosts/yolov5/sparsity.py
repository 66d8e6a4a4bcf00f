"""The penalty of network slimming inside a classic training, told by its train.py what it needs to know."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from yolo_prune.errors import ConfigError
from yolo_prune.files import new_file
from yolo_prune.hosts.randomness import seeded
from yolo_prune.hosts.yolov5.surgery import trace_model
from yolo_prune.methods.slimming.course import SETTLING, PenaltyCourse, sparsity_record
from yolo_prune.methods.slimming.penalty import penalised_channels
from yolo_prune.methods.slimming.strength import Sparsity
from yolo_prune.methods.steps import learning_rates
from yolo_prune.search import recalibrate
from yolo_prune.surgery.copying import copied

NOMINAL_BATCH = 64
"""Images that train.py gathers before a step."""


class SparsityRun:
    """The penalty of one training: what train.py's callbacks call.

    Args:
        sparsity: Its settings.
        script: The module train.py.
        options: Its flags, read.
        first: The first epoch that is to come, more than 0 when the run is resumed.
    """

    def __init__(self, sparsity: Sparsity, script: Any, options: Any, *, first: int) -> None:
        self._script, self._options, self._epoch = script, options, first
        self._course = PenaltyCourse(
            sparsity, Path(options.save_dir), imgsz_px=int(options.imgsz), writes=script.RANK in (-1, 0)
        )
        self._in_epoch, self._batches, self._batch = False, 0, 0

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Hook the optimizer of a model; its channel graph is traced on a copy, wherever the model is.

        Raises:
            ConfigError: Nothing can be penalised, or a subgradient with an adaptive optimizer.
        """
        graph = trace_model(copied(model).cpu().float().eval())
        self._course.attach(graph, dict(model.named_parameters()), penalised_channels(graph), optimizer)

    def count_batches(self, loader: Any, batch: int) -> bool:
        """Remember the first loader that train.py makes, which is that of its training images; return whether it is it.

        Args:
            loader: It.
            batch: Images of a batch in this process.
        """
        if self._batches:
            return False
        self._batches, self._batch = len(loader), batch * self._script.WORLD_SIZE
        return True

    def training_starts(self, *_: Any, **__: Any) -> None:
        """Know how the learning rate will go."""
        hyp, epochs = self._options.hyp, int(self._options.epochs)

        def factor(epoch: int) -> float:  # as train.py schedules it
            done = epoch / epochs
            falls = (1.0 - math.cos(math.pi * done)) / 2.0 if self._options.cos_lr else done
            return 1.0 + falls * (float(hyp["lrf"]) - 1.0)

        self._lr_sums = learning_rates(
            self._course.penalty.mean_setting("initial_lr"),
            factor,
            epochs=epochs,
            batches=self._batches,
            warmup=max(round(float(hyp["warmup_epochs"]) * self._batches), 100),
            accumulate=max(round(NOMINAL_BATCH / self._batch), 1),
        )
        self._course.start(self._epoch)

    def epoch_starts(self, *_: Any, **__: Any) -> None:
        """Set the strength of the coming epoch."""
        if self._in_epoch:  # of several GPUs, only the first is told that an epoch ends
            self.epoch_ends()
        self._in_epoch = True
        plan = self._course.begin_epoch(self._epoch, self._lr_sums)
        if plan:
            self._script.LOGGER.info(plan)

    def epoch_ends(self, *_: Any, **__: Any) -> None:
        """Write down what the epoch did, and warn."""
        for warning in self._course.end_epoch():
            self._script.LOGGER.warning(f"sparsity, epoch {self._epoch + 1}: {warning}")
        self._epoch, self._in_epoch = self._epoch + 1, False

    def keep_last(self, last: Path, _epoch: int, _final: bool, best_fitness: float, fitness: float) -> None:
        """Make the best checkpoint the last one, whose scales are the sparse ones, where train.py has not done so."""
        if fitness != best_fitness:
            with new_file(last.with_name("best.pt"), replace=True) as temporary:
                shutil.copyfile(last, temporary)

    def settle(self, average: nn.Module, batches: Iterable[Any]) -> None:
        """Measure the batch-norm statistics of the moving average anew; see `SETTLING`.

        Args:
            average: It, in float32.
            batches: What train.py's loaders yield.
        """
        device = next(average.parameters()).device
        images = (images.to(device).float() / 255 for images, *_ in itertools.islice(batches, SETTLING))
        with seeded(0), contextlib.suppress(ConfigError):  # weights that are not finite: train.py's own affair
            recalibrate(average, images, lambda network, batch: network(batch))

    def carry_zeros(self, average: nn.Module) -> None:
        """Make scales that are zero in the trained model zero in its moving average."""
        self._course.carry_zeros(dict(average.named_parameters()))


def sparsity_in(folder: Path) -> Sparsity | None:
    """Return how the scales of a run in a folder are penalised; None if they are not.

    Raises:
        ConfigError: The record is damaged.
    """
    record = sparsity_record(folder)
    return None if record is None else Sparsity(**record["options"])
