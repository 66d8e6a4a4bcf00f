"""`train`, `finetune` and `evaluate`: the host's trainer and validator, slim networks included."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from yolo_prune.allocation import PATHS, Constraints
from yolo_prune.configuration import changed, json_setting, require_choice, setting
from yolo_prune.errors import CheckpointError, ConfigError
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.slim import is_slim
from yolo_prune.hosts.ultralytics.checkpoints import load_model, read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import Evaluation, evaluate, read_data, require_kpt_shape, require_split
from yolo_prune.hosts.ultralytics.gradual import GradualOptions, GradualPruning, gradual_options_of
from yolo_prune.hosts.ultralytics.sparsity import SCOPES, SparsityOptions, SparsityTraining, options_of
from yolo_prune.hosts.ultralytics.trainer import read_stock_yaml, require_stock_values, train
from yolo_prune.importance import CRITERIA
from yolo_prune.methods.gradual import PruningSchedule
from yolo_prune.methods.slimming.strength import MODES, SCHEDULES, strength_of
from yolo_prune.report import render
from yolo_prune.report.scales import draw_scales

Options = TypeVar("Options", SparsityOptions, GradualOptions)


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of `train`; every training key of the host (epochs=, lr0=, cfg=, ...) may be added."""

    model: str = setting(help="checkpoint, dense or slim, a yaml name, or the last.pt of an interrupted run")
    data: str | None = setting(None, help="data yaml; may stand in cfg=, and is known with resume=true")
    resume: bool = setting(False, help="continue the interrupted run of `model`, its sparsity included")
    sparsity: str | None = setting(None, help="strength of the penalty on batch-norm scales, or auto")
    sparsity_mode: str = setting("proximal", help=f"{' or '.join(MODES)} (SGD only)")
    sparsity_schedule: str = setting("constant", help=f"how the strength decays: {', '.join(SCHEDULES)}")
    sparsity_scope: list[str] = setting(list(SCOPES), help="parts of the network that are penalised")
    sparsity_share: float = setting(0.5, help="share of the penalised channels that auto drives to zero")
    prune_every: int | None = setting(None, help="prune while training: a step after as many epochs", unit="epochs")
    prune_steps: int = setting(1, help="number of pruning steps")
    prune_soft: bool = setting(False, help="zero channels, which may come back; only the last step removes them")
    target_macs: float | None = setting(None, help="fraction of the MACs that is kept after the last step")
    criterion: str = setting("taylor", help=f"which channels matter to a step: {', '.join(CRITERIA)}")
    prune_batches: int = setting(16, help="batches that a criterion which needs data looks at before each step")
    allocation: str = setting("uniform", help=f"how many go where: {', '.join(PATHS)}")
    min_channels: int = setting(8, help="fewest that a group keeps", unit="channels")
    max_fraction: float = setting(0.9, help="largest fraction of a group that may go in a step")
    round_to: int = setting(8, help="kept widths are multiples of this", unit="channels")
    distill: str | None = setting(None, help="teacher checkpoint, such as the dense model: the host's distillation")
    json: str | None = json_setting("the result")


@dataclass(kw_only=True)
class FinetuneConfig:
    """Settings of `finetune`; every training key of the host (epochs=, lr0=, ...) may be added."""

    model: str = setting(help="slim checkpoint, or the last.pt of an interrupted run with resume=true")
    data: str | None = setting(None, help="data yaml; required unless resume=true")
    resume: bool = setting(False, help="continue the interrupted run of `model`")
    json: str | None = json_setting("the result")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training left behind."""

    best: Path

    def to_json(self) -> dict[str, Any]:
        """Return the paths as plain values."""
        return {"best": str(self.best)}

    def table(self) -> str:
        """Return where the best checkpoint is."""
        return f"best checkpoint: {self.best}\n"


def finetune(config: FinetuneConfig, stock: dict[str, Any]) -> Training:
    """Fine-tune a slim checkpoint without rebuilding it.

    Raises:
        YoloPruneError: The checkpoint is not slim, or the data is incomplete.
    """
    if not is_slim(read_checkpoint(Path(config.model)).model):
        raise CheckpointError(
            f"'{config.model}' is not a slim checkpoint",
            expected="one written by `yolo-prune prune`",
            remedy="train dense checkpoints with `yolo-prune train` or `yolo train`",
        )
    return train_model(TrainConfig(model=config.model, data=config.data, resume=config.resume), stock)


def train_model(config: TrainConfig, stock: dict[str, Any]) -> Training:
    """Train with the host's trainer: any checkpoint or yaml, with sparsity or without.

    Raises:
        YoloPruneError: Settings, checkpoint or data that cannot be trained with.
    """
    sparsity, gradual = sparsity_options(config), gradual_options(config)
    network = load_model(config.model)  # refuses fused, damaged and hostile ones before the host reads them
    if config.distill is not None:
        read_checkpoint(Path(config.distill))
        stock = {**stock, "distill_model": config.distill}
    if config.data is not None:
        for split in ("train", "val"):
            require_split(Path(config.data), split)
        require_kpt_shape(network, read_data(Path(config.data)), config.data)
        stock = {**stock, "data": config.data}
    elif not config.resume and not stock.get("cfg"):
        raise ConfigError("'data=' is required", expected="data: a data yaml")
    require_stock_values({key: value for key, value in stock.items() if key != "cfg"})
    if config.resume:
        folder = Path(config.model).resolve().parents[1]
        sparsity = _known(sparsity, options_of(folder), "sparsity")
        gradual = _known(gradual, gradual_options_of(folder), "pruning")
    elif sparsity is not None and sparsity.mode == "subgradient":
        stock = _with_sgd(stock)
    callbacks = []  # pruning first: the penalty then looks at what is left
    if gradual is not None:
        callbacks.append(GradualPruning(gradual).callbacks())
    if sparsity is not None:
        callbacks.append(SparsityTraining(sparsity, draw=draw_scales).callbacks())
    return Training(best=train(config.model, resume=config.resume, callbacks=callbacks, **stock))


def sparsity_options(config: TrainConfig) -> SparsityOptions | None:
    """Return how scales are penalised; None if they are not.

    Raises:
        ConfigError: A value that is unknown or out of range.
    """
    if config.sparsity is None:
        _require_unset(config, ("sparsity_mode", "sparsity_schedule", "sparsity_scope", "sparsity_share"), "sparsity")
        return None
    require_choice("sparsity_mode", config.sparsity_mode, MODES)
    require_choice("sparsity_schedule", config.sparsity_schedule, SCHEDULES)
    for part in config.sparsity_scope:
        require_choice("sparsity_scope", part, SCOPES)
    return SparsityOptions(
        strength=strength_of(config.sparsity),
        mode=config.sparsity_mode,  # type: ignore[arg-type]  # checked above, like the next two
        schedule=config.sparsity_schedule,  # type: ignore[arg-type]
        scope=tuple(config.sparsity_scope),  # type: ignore[arg-type]
        share=config.sparsity_share,
    )


STEP_SETTINGS = ("prune_steps", "prune_soft", "prune_batches", "criterion", "allocation", "min_channels",
                 "max_fraction", "round_to")  # fmt: skip
"""Settings of pruning in steps."""


def gradual_options(config: TrainConfig) -> GradualOptions | None:
    """Return how the network is pruned while it is trained; None if it is not.

    Raises:
        ConfigError: A value that is unknown or out of range, or only one of prune_every= and target_macs=.
    """
    if config.prune_every is None and config.target_macs is None:
        _require_unset(config, STEP_SETTINGS, "prune_every")
        return None
    if config.prune_every is None or config.target_macs is None:
        missing = "prune_every" if config.prune_every is None else "target_macs"
        raise ConfigError(
            f"'{missing}=' is required to prune while training",
            expected="prune_every= and target_macs=",
            remedy="prune_every=5 prune_steps=3 target_macs=0.5",
        )
    return GradualOptions(
        schedule=PruningSchedule(every=config.prune_every, steps=config.prune_steps, target=config.target_macs),
        soft=config.prune_soft,
        batches=config.prune_batches,
        criterion=config.criterion,
        allocation=config.allocation,
        constraints=Constraints(
            min_channels=config.min_channels, max_fraction=config.max_fraction, round_to=config.round_to
        ),
    )


def _require_unset(config: TrainConfig, names: Sequence[str], needed: str) -> None:
    """Refuse settings that would do nothing without another one.

    Raises:
        ConfigError: One of them is not at its default.
    """
    for word in changed(config, names):
        raise ConfigError(
            f"{word} without {needed}=",
            expected=f"{needed}= beside it, or neither",
            remedy="a resumed run reads its settings from its folder" if config.resume else "",
        )


def _known(asked: Options | None, known: Options | None, what: str) -> Options | None:
    """Return the options of the run that is resumed, which other ones would falsify.

    Raises:
        ConfigError: Others are asked for.
    """
    if asked is not None and asked != known:
        raise ConfigError(
            f"resume=true with other {what} settings than the run's own",
            expected="the same ones" if known else f"none: the run that is resumed trains without {what}",
            remedy="leave them out: they are read from the run's folder",
        )
    return known


def _with_sgd(stock: Mapping[str, Any]) -> dict[str, Any]:
    """Return training keys in which the host does not choose the optimizer by itself: a subgradient needs SGD."""
    named = stock.get("optimizer")
    if named is None and stock.get("cfg"):
        named = read_stock_yaml(Path(str(stock["cfg"]))).get("optimizer")
    if named is not None and str(named).lower() != "auto":
        return dict(stock)
    print("sparsity_mode=subgradient needs SGD, so optimizer=SGD instead of auto", file=sys.stderr)
    return {**stock, "optimizer": "SGD"}


@dataclass(kw_only=True)
class EvaluateConfig:
    """Settings of `evaluate`."""

    model: str = setting(help="checkpoint (.pt), dense or slim")
    data: str = setting(help="data yaml")
    split: str = setting("val", help="train, val or test")
    imgsz: int = setting(640, help="image side", unit="px")
    batch: int = setting(16, help="batch size", unit="images")
    json: str | None = json_setting("the figures")


@dataclass(frozen=True, kw_only=True)
class EvaluationTable:
    """An evaluation that can be shown."""

    model: str
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {"model": self.model, **self.evaluation.to_json()}

    def table(self) -> str:
        """Return one row of figures."""
        figures = self.evaluation
        columns = ["model", "split", "images", "mAP50", "mAP50-95", "precision", "recall"]
        values = [figures.map50, figures.map50_95, figures.precision, figures.recall]
        for kind, scores in (("mask", figures.mask), ("pose", figures.pose)):
            if scores is not None:
                columns += [f"{kind} mAP50", f"{kind} mAP50-95"]
                values += [scores.map50, scores.map50_95]
        row = [self.model, figures.split, str(figures.images), *(f"{value:.3f}" for value in values)]
        return render(columns, [row])


def evaluate_checkpoint(config: EvaluateConfig) -> EvaluationTable:
    """Measure mAP of a checkpoint on one split.

    Raises:
        YoloPruneError: The checkpoint cannot be read, or the split is missing.
    """
    require_split(Path(config.data), config.split)
    model: Any = read_checkpoint(Path(config.model)).model
    require_imgsz(config.imgsz, stride=int(model.stride.max()))
    figures = evaluate(
        Path(config.model), data=Path(config.data), split=config.split, imgsz_px=config.imgsz, batch=config.batch
    )
    return EvaluationTable(model=config.model, evaluation=figures)
