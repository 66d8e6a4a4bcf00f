"""Fine-tuning of slim models: the stock trainer, except that it never rebuilds the network from its yaml."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import check_cfg
from ultralytics.engine import trainer as host_trainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.nn.modules.block import RealNVP
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, RANK, YAML
from ultralytics.utils.checks import check_yaml

from yolo_prune.claims import claimed
from yolo_prune.errors import CheckpointError, ConfigError, VerificationError
from yolo_prune.hosts.refusals import host_errors_as
from yolo_prune.hosts.replacing import replaced
from yolo_prune.hosts.slim import MARKER, is_slim, require_widths, widths
from yolo_prune.hosts.ultralytics.checkpoints import is_fused, require_deployable
from yolo_prune.hosts.ultralytics.evaluation import require_kpt_shape
from yolo_prune.hosts.ultralytics.networks import network_of
from yolo_prune.hosts.ultralytics.refusals import training_refused
from yolo_prune.hosts.ultralytics.run_files import (
    WholeFile,
    drop_rows,
    forget_run,
    is_resumable,
    renew_best,
    strip_whole,
)
from yolo_prune.hosts.ultralytics.zeros import ZeroKeeping

Callback: TypeAlias = Callable[[Any], None]
"""Called by the host's trainer with itself."""

MODEL_SETUP = "on_model_setup"
"""Event: the network is there, new or read back, and nothing holds it yet: no optimizer, average or other process."""

OPTIMIZER_BUILT = "on_optimizer_built"
"""Event: the optimizer is there, and no schedule of learning rates yet."""

BEFORE_FINAL_EVAL = "on_before_final_eval"
"""Event, in the first process alone: the last epoch is saved; `best.pt` and `last.pt` are about to be stripped."""


class SlimTrainerMixin:
    """Makes a stock trainer keep a slim network.

    The stock `get_model` builds the dense network from yaml and copies what fits, which silently drops every slim
    tensor. This one returns the slim network itself. Models without our marker train as they always did.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with training_refused():
            super().__init__(*args, **kwargs)
        self.last, self.best = WholeFile(self.last), WholeFile(self.best)  # type: ignore[has-type]

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Return the network to train.

        Raises:
            CheckpointError: The weights are fused.
            ConfigError: The data has another number of classes, and the slim network's head cannot follow.
            DataError: The data has other key points than the slim network.
        """
        if weights is None or not is_slim(weights):
            return super().get_model(cfg, weights, verbose)  # type: ignore[misc]
        model = trainable_copy(weights)
        data: dict[str, Any] = self.data  # type: ignore[attr-defined]
        require_kpt_shape(model, data, str(self.args.data))  # type: ignore[attr-defined]
        retarget_classes(model, data["nc"], data["names"])
        LOGGER.info(f"Training the slim network itself: {sum(p.numel() for p in model.parameters()):,} parameters")
        return model

    def setup_model(self) -> Any:
        """Make or read the network as the stock trainer does, then tell whoever changes it."""
        checkpoint = super().setup_model()  # type: ignore[misc]
        self.run_callbacks(MODEL_SETUP)  # type: ignore[attr-defined]
        return checkpoint

    def build_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Build the stock optimizer, then tell whoever has parameters with settings of their own."""
        self.optimizer: torch.optim.Optimizer = super().build_optimizer(*args, **kwargs)  # type: ignore[misc]
        self.run_callbacks(OPTIMIZER_BUILT)  # type: ignore[attr-defined]
        return self.optimizer

    def _setup_train(self) -> None:
        if not self.resume and RANK in {-1, 0}:  # type: ignore[attr-defined]
            forget_run(self.save_dir)  # type: ignore[attr-defined]
        with training_refused():
            super()._setup_train()  # type: ignore[misc]
        if self.resume and RANK in {-1, 0}:  # type: ignore[attr-defined]
            drop_rows(self.csv, after=self.start_epoch)  # type: ignore[attr-defined]
            renew_best(self.last, self.best)
        self._require_widths("after loading")
        if is_slim(network_of(self.model)):  # type: ignore[attr-defined]
            warn_of_few_steps(self)

    def _do_train(self, *args: Any) -> None:
        """Train in a folder that no other process trains in; of several processes of one training, the first holds it.

        Raises:
            OutputError: Another process trains there.
        """
        folder: Path = self.save_dir  # type: ignore[attr-defined]
        with claimed(folder) if RANK in {-1, 0} else contextlib.nullcontext():
            super()._do_train(*args)  # type: ignore[misc]

    def save_model(self) -> Any:
        """Save as the stock trainer does, after asserting that no width changed."""
        self._require_widths("before saving")
        return super().save_model()  # type: ignore[misc]

    def final_eval(self) -> None:
        """Strip the checkpoints and evaluate as the stock trainer does, which would strip them where they stand."""
        if RANK in {-1, 0}:
            self.run_callbacks(BEFORE_FINAL_EVAL)  # type: ignore[attr-defined]
        with replaced(host_trainer, strip_optimizer=strip_whole):
            super().final_eval()  # type: ignore[misc]

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Recover as the stock trainer does, unless the checkpoint that it goes back to is of another width.

        Raises:
            VerificationError: NaN in the epoch in which channels were removed.
        """
        try:
            recovered: bool = super()._handle_nan_recovery(epoch)  # type: ignore[misc]
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise VerificationError(
                f"NaN in epoch {epoch + 1}, before the narrower network had a checkpoint",
                expected="a finite loss after channels were removed",
                remedy="resume with the run's last.pt, or start anew with a lower lr0 or more, smaller steps",
            ) from error
        return recovered

    def _require_widths(self, when: str) -> None:
        trained, average = self.model, self.ema.ema if self.ema else None  # type: ignore[attr-defined]
        for model in (trained, average):
            network = network_of(model) if model is not None else None
            if network is not None and is_slim(network):
                require_widths(network, when)


class SlimDetectionTrainer(SlimTrainerMixin, DetectionTrainer):
    """The stock detection trainer for slim networks."""


class SlimSegmentationTrainer(SlimTrainerMixin, SegmentationTrainer):
    """The stock segmentation trainer for slim networks."""


class SlimPoseTrainer(SlimTrainerMixin, PoseTrainer):
    """The stock pose trainer for slim networks."""


class SlimOBBTrainer(SlimTrainerMixin, OBBTrainer):
    """The stock trainer of rotated boxes for slim networks."""


TRAINERS: dict[str, type[SlimTrainerMixin]] = {
    "detect": SlimDetectionTrainer,
    "segment": SlimSegmentationTrainer,
    "pose": SlimPoseTrainer,
    "obb": SlimOBBTrainer,
}
"""The trainer of each task."""


FEW_STEPS = 1000
"""Optimizer steps under which a slim network's training is told that more are to be had: a rule of thumb."""


def warn_of_few_steps(trainer: Any) -> None:
    """Say so where the host's gathering of batches leaves a small data set few optimizer steps.

    What they are worth is in the record of recipes: `direct` against `direct_often`.
    """
    # Warm-up gathers fewer batches, so these are a few steps too few.
    batches = len(trainer.train_loader) * (trainer.epochs - trainer.start_epoch)
    steps = batches // trainer.accumulate
    if RANK in {-1, 0} and trainer.accumulate > 1 and steps < FEW_STEPS:
        LOGGER.warning(
            f"about {steps} optimizer steps in {trainer.epochs} epochs: few for a network that lost channels, since "
            f"the host gathers {trainer.accumulate} batches for each; nbs={trainer.batch_size} takes {batches}"
        )


def trainable_copy(weights: nn.Module) -> nn.Module:
    """Return a float32 copy of a model as the stock trainer expects a new one.

    Raises:
        CheckpointError: The model is fused, so there are no batch norms to train.
    """
    if is_fused(weights):
        raise CheckpointError("a fused model cannot be trained", expected="a checkpoint that was not fused")
    model: Any = copy.deepcopy(weights).float()
    model.criterion = None  # built anew for this training's arguments
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".dfl" not in name  # stripped checkpoints are stored frozen
    return model


def retarget_classes(model: Any, classes: int, names: Mapping[int, str]) -> None:
    """Give the head another number of classes by replacing only the layers with an output a class, in place.

    Raises:
        ConfigError: The head has no such layers, as those that compare with words (YOLO-World, YOLOE) or queries.
    """
    head = model.model[-1]
    if head.nc == classes:
        return
    towers = _class_towers(head)
    if not towers or any(getattr(tower[-1], "out_channels", None) != head.nc for tower in towers):
        raise ConfigError(
            f"the data has {classes} classes, the checkpoint {head.nc}, and its head is a {type(head).__name__}",
            expected="as many classes: this head has no layer with an output for each of them",
            remedy="train the dense model on this data first, and prune it then",
        )
    LOGGER.info(f"The data has {classes} classes, the checkpoint {head.nc}: new last layers in the class towers")
    trained = {name: value.clone() for name, value in head.state_dict().items() if "cv2." in name}
    for tower in towers:
        tower[-1] = nn.Conv2d(tower[-1].in_channels, classes, kernel_size=1).to(tower[-1].weight)
    head.nc, head.no = classes, classes + head.reg_max * 4
    head.bias_init()  # the new layers' start values; it resets the trained box layers as well
    head.load_state_dict(trained, strict=False)
    model.nc, model.names, model.yaml["nc"] = classes, names, classes
    getattr(model, MARKER)["widths"] = widths(model)


def _class_towers(head: Any) -> list[Any]:
    """Return the sequences of layers that end with an output for each class."""
    towers = [tower for name in ("cv3", "one2one_cv3") for tower in getattr(head, name, None) or ()]
    semantic = getattr(getattr(head, "proto", None), "semseg", None)  # YOLO26's prototypes learn the classes as well
    return towers if semantic is None else [*towers, semantic]


def stock_keys() -> dict[str, Any]:
    """Return every training key of the host with its default."""
    return dict(DEFAULT_CFG_DICT)


def read_stock_yaml(path: Path) -> dict[str, Any]:
    """Return the training keys in a YAML file, as the host's `cfg=` reads it.

    Raises:
        ConfigError: It cannot be read.
    """
    with host_errors_as(ConfigError, f"cannot read cfg '{path}'", expected="a YAML file of training keys"):
        found: dict[str, Any] = YAML.load(check_yaml(str(path)))
    return found


def require_stock_values(stock: Mapping[str, Any]) -> None:
    """Refuse values of training keys whose type or range is wrong.

    Raises:
        ConfigError: With the host's own words.
    """
    with training_refused():
        check_cfg(dict(stock))


def train(
    model: str | Path, *, resume: bool = False, callbacks: Sequence[Mapping[str, Callback]] = (), **stock: Any
) -> Path:
    """Train with the stock trainer, slim networks included. Zeros that pruning left in the checkpoint stay zeros.

    Args:
        model: A checkpoint, dense or slim, a yaml name, or the `last.pt` of the run that is resumed.
        resume: Continue an interrupted run.
        callbacks: What else is called, in this order, by event of the host; picklable, since training on several GPUs
            sends them on.
        stock: Any training key of the host.

    Returns:
        Path of the best checkpoint.

    Raises:
        CheckpointError: A task that is pruned only, or `resume` with a checkpoint of a run that is finished.
        ConfigError: `pretrained=False` or other weights with a slim checkpoint.
    """
    yolo = YOLO(str(model))
    require_deployable(yolo.model, str(model))
    if is_slim(yolo.model) and stock.get("pretrained", True) is not True:
        raise ConfigError(
            f"pretrained={stock['pretrained']} with a slim checkpoint",
            expected="the slim checkpoint's own weights: no yaml describes its widths",
            remedy="leave `pretrained` out",
        )
    if resume and not is_resumable(yolo.ckpt):
        raise CheckpointError(
            f"'{model}' has no training to resume: it is finished or never began",
            expected="the last.pt of an interrupted run",
            remedy="leave `resume` out to start a new training from it",
        )
    for several in (*callbacks, ZeroKeeping().callbacks()):
        for event, callback in several.items():
            yolo.add_callback(event, callback)
    yolo.train(trainer=TRAINERS[yolo.task], resume=resume, **stock)
    best: Path = yolo.trainer.best
    return best if best.is_file() else yolo.trainer.last


def reset_weights(model: Any, *, seed: int) -> None:
    """Give every layer new random weights, in place, widths unchanged: the control that trains from scratch.

    The head's biases get the host's own start values.
    """
    torch.manual_seed(seed)
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.Linear)) and ".dfl" not in path:
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, RealNVP):  # its couplings of key points start near the identity
            module.init_weights()
    model.model[-1].bias_init()
