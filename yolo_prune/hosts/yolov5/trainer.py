"""Classic training with our hooks: its own train.py, some of whose names stand for something else meanwhile.

`Model` returns the slim network instead of building the dense one, `smart_optimizer` hooks the penalty, `ModelEMA`
carries zeros, `create_dataloader` counts batches, and `train`, which main() calls when all flags are read and a resumed
run is found, sets these up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from yolo_prune.errors import ConfigError, YoloPruneError
from yolo_prune.hosts.refusals import first_line
from yolo_prune.hosts.replacing import replaced
from yolo_prune.hosts.slim import MARKER, is_slim, require_widths, widths
from yolo_prune.hosts.yolov5.checkpoints import require_trainable
from yolo_prune.hosts.yolov5.reading import load
from yolo_prune.hosts.yolov5.scripts import prepared
from yolo_prune.hosts.yolov5.source import Classic
from yolo_prune.hosts.yolov5.sparsity import SparsityRun, sparsity_in
from yolo_prune.methods.slimming.course import PICTURE, forget_record, sparsity_record
from yolo_prune.methods.slimming.strength import Sparsity

BESIDE = {
    "cache": None, "rect": False, "rank": -1, "workers": 0, "image_weights": False, "quad": False, "shuffle": True,
}  # fmt: skip
"""Flags of train.py's loader of training images for a second one, which runs between epochs; it augments alike."""

Draw: TypeAlias = Callable[[dict[str, Any], Path], None]


def train(classic: Classic, words: Sequence[str], sparsity: Sparsity | None, *, draw: Draw | None = None) -> Path:
    """Run the classic train.py.

    Args:
        classic: Its code.
        words: Its own flags.
        sparsity: The penalty, if any; a resumed run goes on with its own.
        draw: Draws the picture of a sparsity training from its record and writes it to a path; no picture without.

    Returns:
        The folder of the run.

    Raises:
        ConfigError: Its flags, its data or ours are wrong; once epochs run, its errors pass through.
        CheckpointError: The weights cannot be read.
    """
    script = classic.module("train")
    training = _Training(classic, script, sparsity, draw)
    with prepared(classic, script, words):
        options = script.parse_opt()
        try:
            with replaced(script, train=training):
                script.main(options, script.Callbacks())  # its default is one object for all trainings
        except YoloPruneError:
            raise
        except Exception as error:
            if training.begun:
                raise
            raise ConfigError(
                f"train.py of YOLOv5 refuses this training: {first_line(error)}",
                expected="flags and data that it accepts",
                remedy="correct them; --debug shows where it stopped",
            ) from error
    return training.folder


class _Training:
    """What main() calls instead of train.py's `train`.

    Attributes:
        begun: Whether epochs began.
        folder: The folder of the run.
    """

    def __init__(self, classic: Classic, script: Any, sparsity: Sparsity | None, draw: Draw | None) -> None:
        self._classic, self._script, self._given, self._draw = classic, script, sparsity, draw
        self._train, self._build = script.train, script.Model
        self._optimizer, self._average = script.smart_optimizer, script.ModelEMA
        self._loader = script.create_dataloader
        self.begun, self.folder = False, Path()
        self._slim: nn.Module | None = None
        self._run: SparsityRun | None = None
        self._models: list[Any] = []
        self._averaged: nn.Module | None = None
        self._beside: Callable[[], Iterable[Any]] = tuple

    def __call__(self, hyp: Any, opt: Any, device: Any, callbacks: Any) -> Any:
        """Train as train.py does."""
        self.folder, self._options, self._models = Path(opt.save_dir), opt, []
        content = self._weights(opt)
        first = int(content["epoch"]) + 1 if opt.resume else 0
        sparsity = self._settings(opt)
        self._run = self._new_run(sparsity, first) if sparsity else None
        callbacks.register_action("on_train_start", "yolo_prune", self._begin)
        callbacks.register_action("on_fit_epoch_end", "yolo_prune", lambda *_: self._require_widths("before saving"))
        if self._run:
            callbacks.register_action("on_train_start", "yolo_prune", self._run.training_starts)
            callbacks.register_action("on_train_epoch_start", "yolo_prune", self._run.epoch_starts)
            callbacks.register_action("on_train_epoch_end", "yolo_prune", self._end_epoch)
            callbacks.register_action("on_model_save", "yolo_prune", self._run.keep_last)
        average = _carrying(self._average, self)
        names = {"Model": self.model, "smart_optimizer": self.smart_optimizer, "ModelEMA": average}
        if self._run:  # of a network that is meant to lose mAP, the first epoch would be the best, and patience end
            stopping = self._script.EarlyStopping
            names["EarlyStopping"] = lambda **_: stopping(patience=0)
        with replaced(self._script, create_dataloader=self.create_dataloader, **names):
            results = self._train(hyp, opt, device, callbacks)
        record = sparsity_record(self.folder) if self._run and self._is_first() else None
        if record and self._draw and not opt.noplots:
            self._draw(record, self.folder / PICTURE)
        return results

    def model(self, cfg: Any, *args: Any, nc: int | None = None, anchors: Any = None, **kwargs: Any) -> nn.Module:
        """Return the slim network of `--weights`, or build a dense one as train.py does.

        Raises:
            ConfigError: The hyperparameters ask for another number of anchors than the slim network has.
        """
        if self._slim is None:
            return self._build(cfg, *args, nc=nc, anchors=anchors, **kwargs)
        model: Any = copy.deepcopy(self._slim).float()
        if anchors and round(anchors) != model.model[-1].na:
            raise ConfigError(
                f"anchors: {anchors} in --hyp with a slim checkpoint of {model.model[-1].na} anchors",
                expected="the slim checkpoint's own number of anchors",
                remedy="leave `anchors` out of the hyperparameters",
            )
        if nc:
            retarget_classes(model, nc)
        return model

    def smart_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Optimizer:
        """Make the optimizer as train.py does, and hook it."""
        self.watch(model)
        self._require_widths("after loading")
        optimizer: Optimizer = self._optimizer(model, *args, **kwargs)
        if self._run:
            self._run.attach(model, optimizer)
        return optimizer

    def create_dataloader(self, path: Any, imgsz: int, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """Make a loader as train.py does, and count its batches."""
        loader, dataset = self._loader(path, imgsz, batch_size, *args, **kwargs)
        if self._run and self._run.count_batches(loader, batch_size):
            flags = {**kwargs, **BESIDE}
            self._beside = lambda: self._loader(path, imgsz, min(batch_size, 16), *args, **flags)[0]
        return loader, dataset

    def averages_in(self, average: nn.Module) -> None:
        """Remember the moving average, whose widths must stay."""
        self._averaged = average
        self.watch(average)

    def _end_epoch(self, *_: Any, **__: Any) -> None:
        """Measure the average's norms anew before it is validated and saved; write down what the epoch did."""
        assert self._run is not None
        if self._averaged is not None:
            self._run.settle(self._averaged, self._beside())
        self._run.epoch_ends()

    def watch(self, model: nn.Module) -> None:
        """Remember a model whose widths must stay."""
        self._models.append(model)

    def carry_zeros(self, average: nn.Module) -> None:
        """Make zeros of the trained model zeros of its moving average."""
        if self._run:
            self._run.carry_zeros(average)

    def _weights(self, opt: Any) -> dict[str, Any]:
        """Read the weights that are on the disk; others are downloaded by train.py, and are dense."""
        self._slim = None
        path = Path(opt.weights)
        if not str(opt.weights).endswith(".pt") or not path.is_file():
            return {}
        content: dict[str, Any] = load(self._classic, path)
        if is_slim(content["model"]):
            self._slim = content["model"]
            require_trainable(content["model"], path)
            if opt.cfg:
                raise ConfigError(
                    f"--cfg {opt.cfg} with a slim checkpoint",
                    expected="the slim checkpoint's own shape: no yaml describes its widths",
                    remedy="leave --cfg out",
                )
        return content

    def _settings(self, opt: Any) -> Sparsity | None:
        """Return the penalty of this run: the one that is given, or a resumed run's own."""
        own = sparsity_in(self.folder) if opt.resume else None
        if opt.resume and self._given not in (None, own):
            raise ConfigError(
                f"--sparsity with --resume of a run that was started {f'with {own}' if own else 'without it'}",
                expected="the settings of that run, which it goes on with by itself",
                remedy="leave --sparsity out, or start a new training from the checkpoint with --weights",
            )
        sparsity = own if opt.resume else self._given
        if sparsity is None or opt.resume:
            return sparsity
        if sparsity.mode == "subgradient" and opt.optimizer != "SGD":
            raise ConfigError(
                f"--sparsity-mode subgradient with --optimizer {opt.optimizer}",
                expected="SGD: an adaptive optimizer divides the penalty by its own size, so its strength is lost",
                remedy="--optimizer SGD, or --sparsity-mode proximal, which works with any optimizer",
            )
        return sparsity

    def _new_run(self, sparsity: Sparsity, first: int) -> SparsityRun:
        if self._is_first() and not self._options.resume:
            forget_record(self.folder)  # of an earlier run, with --exist-ok
        return SparsityRun(sparsity, self._script, self._options, first=first)

    def _is_first(self) -> bool:
        """Return whether this process is the one of several that writes."""
        return self._script.RANK in (-1, 0)

    def _begin(self, *_: Any, **__: Any) -> None:
        self.begun = True

    def _require_widths(self, when: str) -> None:
        for model in self._models:
            if is_slim(model):
                require_widths(model, when)


def _carrying(average: type, training: _Training) -> Callable[..., Any]:
    """Return train.py's moving average with zeros carried into it."""

    class CarryingEMA(average):
        def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            super().__init__(model, *args, **kwargs)
            training.averages_in(self.ema)

        def update(self, model: nn.Module) -> None:
            super().update(model)
            training.carry_zeros(self.ema)

    return CarryingEMA


def retarget_classes(model: Any, classes: int) -> None:
    """Give the head another number of classes by replacing its last convolutions, in place."""
    head = model.model[-1]
    if head.nc == classes:
        return
    head.nc, head.no = classes, classes + 5
    for level, old in enumerate(head.m):
        head.m[level] = nn.Conv2d(old.in_channels, head.no * head.na, kernel_size=1).to(old.weight)
    model._initialize_biases()  # the start values of objectness and classes
    model.nc, model.names, model.yaml["nc"] = classes, {i: str(i) for i in range(classes)}, classes
    getattr(model, MARKER)["widths"] = widths(model)
