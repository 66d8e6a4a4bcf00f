"""The same job by Torch-Pruning 1.6.1, for `bench_engine.py`, as near to ours as its interface allows.

One pass over all layers (`global_pruning=True`), ranked by group L2 magnitude, traced at the same image size, with our
floor and multiple of widths. It has no target in MACs, so `RATIO` of the channels go; the MACs that are left are
counted. It cuts the model in place, which saves it the copy that ours makes.

As the model comes, only the layers are ignored that ours locks too: those that write the predictions, and DFL. With
`split`, C2f is cut into two convolutions and Detect is ignored whole, as in Torch-Pruning's own example for YOLOv8; so
is attention, which that model lacks. Ours prunes both, so it does more there.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator

import torch
import torch_pruning
from measured_job import Job, Meter, Outcome, answer, tiny_network
from torch import Tensor, nn
from ultralytics.nn.modules.block import C2PSA, C2f, PSABlock
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.modules.head import Detect

from yolo_prune.hosts.ultralytics.checkpoints import build_from_yaml
from yolo_prune.hosts.ultralytics.surgery import trace_side
from yolo_prune.surgery import counted_macs

RATIO = 0.3
"""Part of all prunable channels that goes."""


class SplitC2f(nn.Module):
    """A C2f that computes each half of what cv1 wrote by a convolution of its own, so that nothing is chunked."""

    def __init__(self, block: C2f) -> None:
        super().__init__()
        self.cv0, self.cv1 = part(block.cv1, slice(block.c)), part(block.cv1, slice(block.c, None))
        self.cv2, self.m = block.cv2, block.m
        for name in ("i", "f", "type"):  # what the host reads of a layer
            setattr(self, name, getattr(block, name))

    def forward(self, x: Tensor) -> Tensor:
        """Compute what the block computed."""
        values = [self.cv0(x), self.cv1(x)]
        for layer in self.m:
            values.append(layer(values[-1]))
        return self.cv2(torch.cat(values, 1))


def part(block: Conv, rows: slice) -> Conv:
    """Return a convolution with its norm that computes some of another's outputs."""
    new = copy.deepcopy(block)
    for layer in (new.conv, new.bn):
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.dim():
                tensor.data = tensor.data[rows].clone()
    new.conv.out_channels = new.bn.num_features = len(new.bn.weight)
    return new


def split(model: nn.Module) -> None:
    """Replace every C2f."""
    for path, block in list(model.named_modules()):
        if isinstance(block, C2f):
            model.set_submodule(path, SplitC2f(block))


def predictors(head: Detect) -> Iterator[nn.Module]:
    """Yield the layers of a head that write predictions."""
    for name, child in head.named_children():
        if name.endswith(("cv2", "cv3")):
            yield from (tower[-1] for tower in child)
    yield head.dfl


def ignored_layers(model: nn.Module, *, whole_heads: bool) -> list[nn.Module]:
    """Return what must not be pruned; with `whole_heads`, all of Detect and of attention."""
    if whole_heads:
        return [module for module in model.modules() if isinstance(module, (Detect, C2PSA, PSABlock))]
    heads = [module for module in model.modules() if isinstance(module, Detect)]
    return [layer for head in heads for layer in predictors(head)]


def prune(model: nn.Module, image: Tensor, ignored: list[nn.Module]) -> None:
    """Prune a model in place."""
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        image,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=RATIO,
        max_pruning_ratio=0.9,
        round_to=8,
        ignored_layers=ignored,
    )
    pruner.step()


def measure(job: Job) -> Outcome:
    """Measure one model in this process."""
    warnings.simplefilter("ignore")
    model = build_from_yaml(f"{job.model}.yaml").requires_grad_(True)
    if job.split:
        split(model)
    ignored = ignored_layers(model, whole_heads=job.split)
    image = torch.zeros(1, 3, trace_side(model), trace_side(model))
    first_use_s = warm_up()
    with Meter(job) as meter:
        prune(model, image, ignored)
    dense_macs = counted_macs(build_from_yaml(f"{job.model}.yaml"), image)
    return {**meter.figures, "first_use_s": first_use_s, "macs_kept": counted_macs(model, image) / dense_macs}


def warm_up() -> float:
    """Do the whole job on a tiny network; return the seconds."""
    started, network = time.perf_counter(), tiny_network()
    prune(network, torch.zeros(1, 3, 16, 16), [list(network.children())[-1]])
    return time.perf_counter() - started


if __name__ == "__main__":
    answer(measure, Job)
