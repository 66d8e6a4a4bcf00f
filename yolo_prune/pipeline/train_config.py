"""Settings of `train` and `finetune`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from yolo_prune.allocation import PATHS
from yolo_prune.configuration import json_setting, setting
from yolo_prune.hosts.ultralytics.sparsity import SCOPES
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.methods.grafting import MODES as GRAFTING_MODES
from yolo_prune.methods.slimming.strength import MODES, SCHEDULES
from yolo_prune.methods.unstructured import PATTERNS


@dataclass(kw_only=True)
class StripesConfig:
    """Settings of `train method=stripes`, beside target_macs, min_channels and max_fraction."""

    strength: str = setting("auto", help="penalty on skeletons (the paper's: 1e-5), or auto")
    threshold: float = setting(0.01, help="a stripe dies when its skeleton, 1 at the start, comes down to this")


@dataclass(kw_only=True)
class UnstructuredConfig:
    """Settings of `train method=unstructured`."""

    amount: float = setting(0.5, help="fraction of the targets' weights that becomes zero")
    pattern: str = setting("global", help=f"{', '.join(PATTERNS)}, or N:M such as 2:4, which has its own amount")
    targets: list[str] = setting(["head"], help="head, all, or paths of layers, in which * stands for anything")


@dataclass(kw_only=True)
class GraftingConfig:
    """Settings of `method=grafting`."""

    mode: str = setting("external", help=f"where revived filters come from: {', '.join(GRAFTING_MODES)}")
    nets: int = setting(2, help="external: networks side by side, each of which takes time and memory")
    models: list[str] = setting([], help="external: start checkpoint of each network; model= is the first")
    amplitude: float = setting(0.4, help="external: A, by how much entropies move a layer's own weight from 0.5")
    sharpness: float = setting(500.0, help="external: c, how soon a difference of entropies does")
    noise_base: float = setting(0.5, help="noise: a, the standard deviation at epoch t is a^t")
    threshold: float = setting(0.5, help="noise, internal: a filter below this fraction of its layer's L1 is invalid")


@dataclass(kw_only=True)
class ResRepConfig:
    """Settings of `method=resrep`."""

    strength: str = setting("auto", help="group lasso on rows of compactors, as 1e-4; auto: the least that suffices")
    momentum: str = setting("auto", help="momentum of the compactors, as 0.99; auto: the largest that suffices")
    interval: int = setting(10, help="time between new masks, until they settle", unit="optimizer steps")


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of `train`; every training key of the host (epochs=, lr0=, cfg=, ...) may be added."""

    model: str = setting(help="checkpoint, dense or slim, a yaml name, or the last.pt of an interrupted run")
    data: str | None = setting(None, help="data yaml; may stand in cfg=, and is known with resume=true")
    resume: bool = setting(False, help="continue the interrupted run of `model` as it was begun")
    sparsity: str | None = setting(None, help="strength of the penalty on batch-norm scales, or auto")
    sparsity_mode: str = setting("proximal", help=f"{' or '.join(MODES)} (SGD only)")
    sparsity_schedule: str = setting("constant", help=f"how the strength decays: {', '.join(SCHEDULES)}")
    sparsity_scope: list[str] = setting(list(SCOPES), help="parts of the network that are penalised")
    sparsity_share: float = setting(0.5, help="share of the penalised channels that auto drives to zero")
    prune_every: int | None = setting(None, help="prune while training: a step after as many epochs", unit="epochs")
    prune_steps: int = setting(1, help="number of pruning steps")
    prune_soft: bool = setting(False, help="zero channels, which may come back; only the last step removes them")
    target_macs: float | None = setting(None, help="fraction of the MACs that is kept in the end")
    criterion: str = setting("taylor", help=f"which channels matter to a step: {', '.join(CRITERIA)}")
    prune_batches: int = setting(16, help="batches that a criterion which needs data looks at before each step")
    allocation: str = setting("uniform", help=f"how many go where: {', '.join(PATHS)}")
    min_channels: int = setting(8, help="fewest that a group keeps", unit="channels")
    max_fraction: float = setting(0.9, help="largest fraction of a group that may go, in each step")
    round_to: int = setting(8, help="kept widths are multiples of this", unit="channels")
    distill: str | None = setting(None, help="teacher checkpoint, such as the dense model: the host's distillation")
    method: str | None = setting(None, help="what else training does: resrep, stripes, grafting or unstructured")
    resrep: ResRepConfig = dataclasses.field(default_factory=ResRepConfig)
    stripes: StripesConfig = dataclasses.field(default_factory=StripesConfig)
    grafting: GraftingConfig = dataclasses.field(default_factory=GraftingConfig)
    unstructured: UnstructuredConfig = dataclasses.field(default_factory=UnstructuredConfig)
    json: str | None = json_setting("the result")


@dataclass(kw_only=True)
class FinetuneConfig:
    """Settings of `finetune`; every training key of the host (epochs=, lr0=, ...) may be added."""

    model: str = setting(help="slim checkpoint, or the last.pt of an interrupted run with resume=true")
    data: str | None = setting(None, help="data yaml; required unless resume=true")
    resume: bool = setting(False, help="continue the interrupted run of `model`")
    json: str | None = json_setting("the result")
