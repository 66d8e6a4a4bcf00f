"""Settings of `run`, and what is refused of them before any work."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from yolo_prune.configuration import (
    json_setting,
    require_choice,
    require_known,
    require_least,
    setting,
    structured,
)
from yolo_prune.device.benchmark import require_measurable
from yolo_prune.device.runtimes.base import PRECISIONS
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.ultralytics.checkpoints import load_model, read_checkpoint, require_deployable
from yolo_prune.hosts.ultralytics.evaluation import read_data, require_kpt_shape, require_split
from yolo_prune.hosts.ultralytics.trainer import require_stock_values, stock_keys
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.pipeline.artefacts import (
    SUFFIXES,
    variants,
)
from yolo_prune.pipeline.benchmark import RUNS, THREADS
from yolo_prune.pipeline.export import CALIBRATION
from yolo_prune.pipeline.prune_config import UNITS, PruneConfig, choices, decided, require_settings
from yolo_prune.pipeline.rewrite import SHORTCUTS, RewriteConfig
from yolo_prune.pipeline.train import split_settings
from yolo_prune.pipeline.train_config import TrainConfig
from yolo_prune.pipeline.training_methods import METHODS, asked_of
from yolo_prune.plan import PrunePlan

SET_BY_RUN = frozenset(
    ("model", "data", "imgsz", "seed", "project", "name", "exist_ok", "save_dir", "resume", "mode", "task", "cfg")
)
"""Training keys of the host that are not for `train:` and `finetune:`: the run decides them."""


@dataclass(kw_only=True)
class RunConfig:
    """Settings of `run`, in a YAML file; `key=value` words (dots reach inside) override them."""

    model: str = setting(help="what training starts from: a checkpoint (.pt) or a yaml name of the host")
    data: str = setting(help="data yaml")
    out: str = setting(help="folder of the run; running again resumes it")
    imgsz: int = setting(640, help="image side everywhere", unit="px")
    seed: int = setting(0, help="seed of every training")
    train: dict[str, Any] = setting({}, help="keys of `train` and of the host for the dense model; epochs: 0 skips it")
    rewrite: dict[str, Any] = setting({}, help="settings of `rewrite`, of what is pruned; none leaves it as it is")
    prune: dict[str, Any] = setting({}, help="settings of `prune`; none where the fine-tune itself prunes")
    finetune: dict[str, Any] = setting({}, help="as `train:`, for the slim model; distill: dense takes this run's")
    control: bool = setting(False, help="also train the slim shapes from random weights, as the fine-tune")
    direct: dict[str, Any] | None = setting(
        None, help="also prune the dense model once by these settings of `prune`, to the slim one's MACs, as a control"
    )
    smaller: str | None = setting(
        None, help="also train this next smaller scale, as long as dense and slim together, as a control"
    )
    splits: list[str] = setting(["val"], help="splits on which mAP is measured")
    formats: list[str] = setting(["onnx", "ncnn"], help=f"artefacts: {', '.join(SUFFIXES)}")
    precisions: list[str] = setting(["fp32"], help=f"of each format: {', '.join(PRECISIONS)}")
    calibration: int = setting(**CALIBRATION)
    runs: int = setting(**RUNS)
    threads: int = setting(**THREADS)
    json: str | None = json_setting("the summary")


def check(config: RunConfig) -> None:
    """Refuse what would fail hours later."""
    for split in ("train", "val", *config.splits):
        require_split(Path(config.data), split)
    _check_training(config.train if config.train.get("epochs") else {})
    _check_training(config.finetune, refused={"pretrained"})
    if any(METHODS[name].prunes for name in methods_of(config.train)):
        raise ConfigError(
            "`train:` prunes", expected="a dense model: it is what the slim one is compared with",
            remedy="move these settings to `finetune:`",
        )  # fmt: skip
    if config.rewrite:
        require_choice("shortcuts", rewrite_settings(config, model="-", out="-").shortcuts, SHORTCUTS)
    if not prunes_in_training(config):
        _check_pruning(config)
    elif config.prune:
        raise ConfigError("both `prune:` and `finetune:` prune", expected="one of them", remedy="leave `prune:` out")
    _check_controls(config)
    if config.finetune.get("distill", "dense") != "dense":
        read_checkpoint(Path(config.finetune["distill"]))
    for variant in variants(config.formats, config.precisions, imgsz_px=config.imgsz):
        variant.require_possible()
    require_least(config, calibration=1)
    require_measurable(threads=config.threads, runs=config.runs)
    if not config.model.endswith(".pt") and not config.train.get("epochs"):
        raise ConfigError("train.epochs is 0 and model is no checkpoint", expected="a trained .pt, or epochs to train")
    model = _network(config.model, config)
    if not config.train.get("epochs"):  # the host's training of the dense model takes the data's own key points
        require_kpt_shape(model, read_data(Path(config.data)), config.data)


def _network(name: str, config: RunConfig) -> Any:
    """Read a network that is trained; refuse one that cannot be deployed, or images that it would change."""
    model: Any = load_model(name)
    require_deployable(model, name)
    require_imgsz(config.imgsz, stride=int(model.stride.max()))
    return model


def _check_controls(config: RunConfig) -> None:
    """Refuse controls that could not be trained."""
    if config.direct is not None:
        _check_pruning(direct_settings(config, 0.5))
    if config.smaller is not None:
        _network(config.smaller, config)


def _check_pruning(config: RunConfig) -> None:
    """Refuse settings of the prune stage that it would refuse."""
    pruning = prune_settings(config, model="-", out="-")
    if pruning.plan:
        PrunePlan.load(Path(pruning.plan))
    else:
        choices(pruning)
    require_settings(pruning, collects=True, recalibrates=True, times=True)


def _check_training(options: Mapping[str, Any], *, refused: Set[str] = frozenset()) -> None:
    """Refuse training keys that are unknown, that the run sets itself, or whose value the host would refuse."""
    own = {field.name for field in fields(TrainConfig)} | {*stock_keys()}
    require_known(options, own - SET_BY_RUN - {"json"} - refused)
    stock = split_settings(options)[1]
    require_stock_values(stock)
    for name, chosen in methods_of(options).items():
        if not stock.get("time"):  # with it, the host decides how many epochs there are
            METHODS[name].fits_epochs(chosen, int({**stock_keys(), **stock}["epochs"]))


def methods_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of every training method that the settings of a training ask for, by its name."""
    return asked_of(structured(TrainConfig, {"model": "-", **split_settings(options)[0]}))


def prunes_in_training(config: RunConfig) -> bool:
    """Return whether the fine-tune removes channels itself, so that there is no stage for it."""
    return any(METHODS[name].prunes for name in methods_of(config.finetune))


def rewrite_settings(config: RunConfig, *, model: str, out: str) -> RewriteConfig:
    """Return the settings of the rewrite stage."""
    require_known(config.rewrite, {"shortcuts"})
    return structured(RewriteConfig, {**config.rewrite, "imgsz": config.imgsz, "model": model, "out": out})


def prune_settings(config: RunConfig, *, model: str, out: str) -> PruneConfig:
    """Return the settings of the prune stage."""
    # A plan file would be in the way of a stage that was killed and runs again; its record holds the plan anyway.
    own = {"model", "out", "json", "imgsz", "save_plan", "data"}
    require_known(config.prune, set(vars(PruneConfig(model="-", out="-"))) - own)
    shared = {"imgsz": config.imgsz, "data": config.data}
    found = decided(structured(PruneConfig, {**shared, **config.prune, "model": model, "out": out}))
    # Every run has data, but the stage is refused with data that nothing looks at.
    criterion = None if found.plan else CRITERIA.get(found.criterion)
    return found if (criterion and criterion.needs) or found.recalibrate else replace(found, data=None)


def direct_settings(config: RunConfig, target: float) -> RunConfig:
    """Return the settings of a run whose prune stage is the direct control, for a fraction of the MACs."""
    direct = dict(config.direct or {})
    if not any(direct.get(f"target_{unit}") for unit in UNITS):
        direct["target_macs"] = target
    return replace(config, prune=direct)
