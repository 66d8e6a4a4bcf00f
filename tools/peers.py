"""What others make of a trained detector, by their own recipes, written as their users have to write it.

Each peer is a function that cuts a dense checkpoint to a budget of MACs. `user_lines` counts what of this file, and of
`torch_pruning_peer.py`, its users write; ours are commands.
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
from yolo_prune.errors import YoloPruneError
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint, write_slim
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model
from yolo_prune.importance import Evidence, FloatArray, score_channels
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.plan import plan_from_keep
from yolo_prune.surgery import counted_macs

CLOSE = 0.02
"""MACs less than this fraction below the budget have met it: one ratio everywhere goes in steps."""

HALVINGS = 12
"""Of the interval in which a ratio is looked for."""


class PeerError(YoloPruneError):
    """A peer cannot do it."""

    exit_code = 1


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


def ratio_for(macs_kept: Callable[[float], float], budget: float) -> float:
    """Return the smallest ratio that meets a budget, for a tool that takes ratios.

    Args:
        macs_kept: From a ratio to the fraction of the MACs that are left; the larger the ratio, the fewer.
        budget: Most that may be left.

    Raises:
        PeerError: No ratio comes near the budget.
    """
    low, high, nearest = 0.0, 0.95, macs_kept(0.95)
    if nearest > budget:
        raise PeerError(f"{nearest:.1%} of the MACs are left at a ratio of {high:g}", expected=f"{budget:.1%}")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        kept = macs_kept(middle)
        if kept > budget:
            low = middle
        else:
            high, nearest = middle, kept
    if nearest < (1.0 - CLOSE) * budget:
        raise PeerError(f"{nearest:.1%} of the MACs are the nearest to {budget:.1%}", expected="a ratio that meets it")
    return high


def torch_pruned(dense: Path, ratio: float, imgsz_px: int) -> nn.Module:
    """Prune as Torch-Pruning's example for YOLOv8 does: C2f split, group norms, one ratio everywhere, no Detect."""
    import torch_pruning as tp  # needs the extra bench

    network = split_network(dense)
    pruner = tp.pruner.GroupNormPruner(
        network,
        torch.zeros(1, 3, imgsz_px, imgsz_px),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        ignored_layers=[module for module in network.modules() if isinstance(module, Detect)],
    )
    pruner.step()
    return network


def split_network(dense: Path) -> nn.Module:
    """Return the network of a checkpoint with every C2f split."""
    from torch_pruning_peer import split

    network: Any = YOLO(str(dense)).model
    network = network.float().requires_grad_(True)
    split(network)
    return network


def torch_pruning_ratio(dense: Path, budget: float, imgsz_px: int) -> float:
    """Return the ratio by which Torch-Pruning meets a budget.

    Raises:
        PeerError: None does.
    """
    image = torch.zeros(1, 3, imgsz_px, imgsz_px)
    whole = counted_macs(split_network(dense), image)
    return ratio_for(lambda ratio: counted_macs(torch_pruned(dense, ratio, imgsz_px), image) / whole, budget)


def sparsity_training(dense: Path, *, strength: float, **training: Any) -> Path:
    """Train as the forks of network slimming do: `s * sign(gamma)` is added to the gradient of every scale."""
    yolo = YOLO(str(dense))
    yolo.add_callback("on_train_start", lambda trainer: penalise(trainer, strength))
    yolo.train(**training)
    last: Path = yolo.trainer.last  # `best` is the least sparse
    return last


def penalise(trainer: Any, strength: float) -> None:
    """Add the penalty's gradient before every step."""
    scales = [module.weight for module in trainer.model.modules() if isinstance(module, nn.BatchNorm2d)]

    def add(*_: object) -> None:
        for scale in scales:
            if scale.grad is not None:
                scale.grad.add_(strength * scale.detach().sign())

    trainer.optimizer.register_step_pre_hook(add)


def strength_for(dense: Path, *, lr0: float, momentum: float, steps: int) -> float:
    """Return the strength at which the penalty alone would carry the median scale to zero.

    The forks' fixed values were chosen for longer trainings: in a few hundred steps 1e-3 moves no scale by more than a
    hundredth. A step of SGD with momentum moves a scale by lr * strength / (1 - momentum) in the end, and a cosine
    schedule has half of lr0 on average.
    """
    network: Any = read_checkpoint(dense).model
    scales = torch.cat([one.weight.abs() for one in network.modules() if isinstance(one, nn.BatchNorm2d)])
    return float(scales.float().median()) * (1.0 - momentum) / (0.5 * lr0 * steps)


def slimming(sparse: Path, budget: float, imgsz_px: int, out: Path) -> Path:
    """Cut by one threshold over all scales, as the forks do: no rounding; Detect and what shortcuts tie stay whole.

    Theirs stop at C2f, so that our engine carries out what they would decide.
    """
    source = read_checkpoint(sparse)
    graph = trace_model(source.model)
    free = Constraints(min_channels=1, max_fraction=0.99, round_to=1, attention="none")
    keep = allocate(
        graph, scales_of(source.model, graph), Budget(unit="macs", ratio=budget, imgsz_px=imgsz_px),
        Allocation(path="global", constraints=free),
    )  # fmt: skip
    plan = plan_from_keep(graph, keep, source_sha256=source.sha256, imgsz_px=imgsz_px, choice={"peer": "slimming"})
    write_slim(out, slim_copy(source.model, graph, keep), source, plan, dtype=source.stored_dtype)
    return out


def scales_of(model: Any, graph: ChannelGraph) -> FloatArray:
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
    "torch_pruning": (KeepingTrainer, finetune, torch_pruned, split_network),
    "slimming": (sparsity_training, penalise, slimming, scales_of),
}
"""What of this file a user of a peer has to write."""

COMMANDS: Mapping[str, int] = {"dense": 0, "yolo_prune": 1, "yolo_prune_direct": 2}
"""Commands of ours: `train` that prunes, or `prune` and `finetune`."""


def user_lines(peer: str) -> int:
    """Return how many lines a user writes: commands, or code without comments, docstrings and blank lines."""
    if peer in COMMANDS:
        return COMMANDS[peer]
    parts = list(USERS_WRITE[peer])
    if peer == "torch_pruning":
        import torch_pruning_peer as rebuilt

        parts += [rebuilt.SplitC2f, rebuilt.part, rebuilt.split]
    return sum(len(ast.unparse(code_of(inspect.getsource(part))).splitlines()) for part in parts)
