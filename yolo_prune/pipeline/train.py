"""`finetune` and `evaluate`: the host's trainer and validator, slim networks included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_prune.configuration import json_setting, setting
from yolo_prune.errors import CheckpointError, ConfigError
from yolo_prune.hosts.ultralytics.checkpoints import is_slim, read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import Evaluation, evaluate, read_data, require_kpt_shape, require_split
from yolo_prune.hosts.ultralytics.inference import require_imgsz
from yolo_prune.hosts.ultralytics.trainer import require_stock_values, train
from yolo_prune.report import render


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
    model = Path(config.model)
    network = read_checkpoint(model).model
    if not is_slim(network):
        raise CheckpointError(
            f"'{model}' is not a slim checkpoint",
            expected="one written by `yolo-prune prune`",
            remedy="train dense checkpoints with `yolo train`",
        )
    if config.data is not None:
        for split in ("train", "val"):
            require_split(Path(config.data), split)
        require_kpt_shape(network, read_data(Path(config.data)), config.data)
        stock = {**stock, "data": config.data}
    elif not config.resume:
        raise ConfigError("'data=' is required", expected="data: a data yaml")
    require_stock_values(stock)
    return Training(best=train(model, resume=config.resume, **stock))


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
