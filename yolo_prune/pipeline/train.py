"""`train`, `finetune` and `evaluate`: the host's trainer and validator, slim networks included."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from yolo_prune.claims import claimed
from yolo_prune.configuration import json_setting, setting, structured
from yolo_prune.errors import CheckpointError, ConfigError
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.slim import is_slim, unfinished
from yolo_prune.hosts.ultralytics.checkpoints import load_model, read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import Evaluation, evaluate, read_data, require_kpt_shape, require_split
from yolo_prune.hosts.ultralytics.records import FILES
from yolo_prune.hosts.ultralytics.run_files import interrupted, last_checkpoint, network_in
from yolo_prune.hosts.ultralytics.trainer import read_stock_yaml, require_stock_values, train
from yolo_prune.pipeline.train_config import FinetuneConfig, TrainConfig
from yolo_prune.pipeline.training_methods import METHODS, asked_of
from yolo_prune.report import render


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
    """Train with the host's trainer: any checkpoint or yaml, with any methods.

    Raises:
        YoloPruneError: Settings, checkpoint or data that cannot be trained with.
    """
    asked = asked_of(config)
    # Refuses fused, damaged and hostile ones before the host reads them.
    network = load_model(config.model, in_training=config.resume)
    if config.distill is not None:
        read_checkpoint(Path(config.distill))
        stock = {**stock, "distill_model": config.distill}
    if config.data is not None:
        for split in ("train", "val"):
            require_split(Path(config.data), split)
        if is_slim(network):  # of any other the host makes a network with the data's own key points
            require_kpt_shape(network, read_data(Path(config.data)), config.data)
        stock = {**stock, "data": config.data}
    elif not config.resume and not stock.get("cfg"):
        raise ConfigError("'data=' is required", expected="data: a data yaml")
    require_stock_values({key: value for key, value in stock.items() if key != "cfg"})
    if config.resume:
        folder = Path(config.model).resolve().parents[1]
        chosen = _known(asked, folder)
        method = unfinished(network)
        if method is not None:
            _require_record(method, chosen, config.model)
            finish = METHODS[method].finish
            if finish is not None and Path(config.model).name == "last.pt" and interrupted(folder) == "finished":
                with claimed(folder):
                    return Training(best=finish(folder))
    else:
        chosen = asked
        for name, options in chosen.items():
            METHODS[name].fits(options, network)
            if METHODS[name].needs_sgd(options):
                stock = _with_sgd(stock, name)
    callbacks = [METHODS[name].training(options).callbacks() for name, options in chosen.items()]
    return Training(best=_trainer_of(chosen)(config.model, resume=config.resume, callbacks=callbacks, **stock))


def train_in(folder: Path, model: Path, data: Path, settings: Mapping[str, Any]) -> Path:
    """Train in a folder, go on with a training that was killed there, or take what was trained before.

    Args:
        folder: Of the run.
        model: What is trained.
        data: Data yaml.
        settings: Those of `train`, and training keys of the host.

    Returns:
        The best checkpoint.

    Raises:
        YoloPruneError: As `train_model`.
    """
    state, best, last = interrupted(folder), folder / "weights" / "best.pt", last_checkpoint(folder)
    if state == "finished" and unfinished(network_in(last)) is None:
        return best if best.is_file() else last
    if state != "nothing":
        return train_model(TrainConfig(model=str(last), resume=True), {}).best
    shutil.rmtree(folder, ignore_errors=True)
    ours, stock = split_settings(settings)
    config = structured(TrainConfig, {**ours, "model": str(model), "data": str(data)})
    place = {"project": str(folder.parent.absolute()), "name": folder.name, "exist_ok": True}
    return train_model(config, {**stock, **place}).best


def _trainer_of(chosen: Mapping[str, Any]) -> Callable[..., Path]:
    """Return what trains: the host's trainer, or a method's own driver of it."""
    own = [METHODS[name].train(options) for name, options in chosen.items()]
    return next((driver for driver in own if driver is not None), train)


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what of the settings of a training is ours, and what the host's."""
    own = {field.name for field in fields(TrainConfig)}
    return (
        {key: value for key, value in settings.items() if key in own},
        {key: value for key, value in settings.items() if key not in own},
    )


def _require_record(method: str, known: Mapping[str, Any], model: str) -> None:
    """Refuse to go on with a network that has a method's structures without that method.

    Raises:
        CheckpointError: The run's folder does not tell of it.
    """
    if method not in known:
        raise CheckpointError(
            f"'{model}' is in the middle of a training with method={method}, and its folder has no {FILES[method][0]}",
            expected="the last.pt where the training left it, in `weights` of the run's folder",
            remedy="put it back, or start a new training",
        )


def _known(asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the options of the run in a folder that is resumed, which other ones would falsify.

    Raises:
        ConfigError: Others are asked for.
    """
    found = {name: method.known(folder) for name, method in METHODS.items()}
    known = {name: options for name, options in found.items() if options is not None}
    for name, options in asked.items():
        if options != known.get(name):
            raise ConfigError(
                f"resume=true with other {name} settings than the run's own",
                expected="the same ones" if name in known else f"none: the run that is resumed trains without {name}",
                remedy="leave them out: they are read from the run's folder",
            )
    return known


def _with_sgd(stock: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return training keys in which the host does not choose the optimizer by itself: a method needs SGD."""
    named = stock.get("optimizer")
    if named is None and stock.get("cfg"):
        named = read_stock_yaml(Path(str(stock["cfg"]))).get("optimizer")
    if named is not None and str(named).lower() != "auto":
        return dict(stock)
    print(f"{name} needs SGD with these settings, so optimizer=SGD instead of auto", file=sys.stderr)
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
