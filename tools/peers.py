"""What others make of a trained detector, by their own recipes, written as their users have to write it.

Each peer is a function from the dense checkpoint and a budget of MACs to a checkpoint that the host fine-tunes.
`user_lines` counts what of this file its users write; ours is two commands.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from source import code_of
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.modules.head import Detect

from yolo_prune.allocation import Allocation, Budget, Constraints, allocate
from yolo_prune.channels import ChannelGraph, Role
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint, write_slim
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model
from yolo_prune.importance import Evidence, FloatArray, score_channels
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.plan import plan_from_keep
from yolo_prune.surgery import counted_macs

STRENGTH = 1e-3
"""Of the penalty on batch-norm scales: what the forks of network slimming have as their default, or ten times that."""

CLOSE = 0.01
"""MACs within this fraction of the budget count as having met it."""


class KeepingTrainer(DetectionTrainer):
    """The stock trainer with a network that is not built anew from its yaml.

    Attributes:
        network: What it trains; of the class, since the host makes the trainer itself.
    """

    network: ClassVar[nn.Module]

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:  # noqa: ARG002
        """Return the network as it is."""
        return self.network


def finetune(network: nn.Module, dense: Path, **training: Any) -> Path:
    """Train a network of foreign classes as the host trains; returns its best checkpoint."""
    KeepingTrainer.network = network
    yolo = YOLO(str(dense))
    yolo.train(trainer=KeepingTrainer, **training)
    best: Path = yolo.trainer.best
    return best if best.is_file() else yolo.trainer.last


def torch_pruning(dense: Path, budget: float, imgsz_px: int) -> nn.Module:
    """Prune as Torch-Pruning's example for YOLOv8 does: C2f split, group norms, one ratio everywhere, no Detect.

    It takes ratios, not budgets: the one that meets the budget is found by halving.
    """
    image = torch.zeros(1, 3, imgsz_px, imgsz_px)
    whole = counted_macs(_split(dense), image)
    low, high = 0.0, 0.95
    while True:
        ratio = (low + high) / 2
        network = _torch_pruned(dense, ratio, image)
        kept = counted_macs(network, image) / whole
        if abs(kept - budget) <= CLOSE * budget or high - low < 1e-3:
            return network
        low, high = (ratio, high) if kept > budget else (low, ratio)


def _torch_pruned(dense: Path, ratio: float, image: torch.Tensor) -> nn.Module:
    import torch_pruning as tp

    network = _split(dense)
    pruner = tp.pruner.MagnitudePruner(
        network,
        image,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        round_to=8,
        ignored_layers=[module for module in network.modules() if isinstance(module, Detect)],
    )
    pruner.step()
    return network


def _split(dense: Path) -> nn.Module:
    from torch_pruning_peer import split  # needs the extra bench

    network: Any = YOLO(str(dense)).model
    network = network.float().requires_grad_(True)
    split(network)
    return network


def sparsity_training(dense: Path, **training: Any) -> Path:
    """Train as the forks of network slimming do: `s * sign(gamma)` is added to the gradient of every scale."""
    yolo = YOLO(str(dense))
    yolo.add_callback("on_train_start", _penalise)
    yolo.train(**training)
    best: Path = yolo.trainer.last  # `best` is the least sparse
    return best


def _penalise(trainer: Any) -> None:
    scales = [module.weight for module in trainer.model.modules() if isinstance(module, nn.BatchNorm2d)]

    def add(*_: object) -> None:
        for scale in scales:
            if scale.grad is not None:
                scale.grad.add_(STRENGTH * scale.detach().sign())

    trainer.optimizer.register_step_pre_hook(add)


def slimming(sparse: Path, budget: float, imgsz_px: int, out: Path) -> Path:
    """Cut by one threshold over all scales, as the forks do: no rounding; Detect and what shortcuts tie stay whole.

    Theirs stop at C2f, so that our engine carries out what they would decide.
    """
    source = read_checkpoint(sparse)
    graph = trace_model(source.model)
    free = Constraints(min_channels=1, max_fraction=0.99, round_to=1, attention="none")
    keep = allocate(
        graph, _scales(source.model, graph), Budget(unit="macs", ratio=budget, imgsz_px=imgsz_px),
        Allocation(path="global", constraints=free),
    )  # fmt: skip
    plan = plan_from_keep(graph, keep, source_sha256=source.sha256, imgsz_px=imgsz_px, choice={"peer": "slimming"})
    write_slim(out, slim_copy(source.model, graph, keep), source, plan, dtype=source.stored_dtype)
    return out


def _scales(model: Any, graph: ChannelGraph) -> FloatArray:
    """Return each channel's scale; infinity where the forks do not look: shortcuts, and Detect."""
    scores = score_channels(graph, Evidence.of(model), CRITERIA["bn_scale"], normalization="none")
    head = f"model.{len(model.model) - 1}."
    producers = np.zeros(graph.channel_count, dtype=int)
    apart = np.zeros(graph.channel_count, dtype=bool)
    for (name, _), axis in graph.axes.items():
        if axis.role is Role.PRODUCER and name.endswith("conv.weight"):
            producers[axis.channels] += 1
            apart[axis.channels] |= name.startswith(head)
    scores[apart | (producers != 1)] = np.inf
    return scores


USERS_WRITE: Mapping[str, tuple[Callable[..., Any] | type, ...]] = {
    "torch_pruning": (KeepingTrainer, finetune, _torch_pruned, _split),
    "slimming": (sparsity_training, _penalise, slimming, _scales),
}
"""What of this file a user of a peer has to write."""


def user_lines(peer: str) -> int:
    """Return how many lines of code that is, without comments, docstrings and blank lines."""
    parts = list(USERS_WRITE[peer])
    if peer == "torch_pruning":
        import torch_pruning_peer as rebuilt

        parts += [rebuilt.SplitC2f, rebuilt.part, rebuilt.split]
    return sum(len(ast.unparse(code_of(inspect.getsource(part))).splitlines()) for part in parts)
