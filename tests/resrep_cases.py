"""Networks with compactors, courses and forgetting for the tests of ResRep."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from model_cases import enliven
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_prune.allocation import Constraints
from yolo_prune.channels import ChannelGraph
from yolo_prune.hosts.ultralytics.compactors import suitable
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.methods.resrep.forgetting import (
    Forgetting,
)
from yolo_prune.methods.resrep.schedule import (
    Course,
    Pull,
)
from yolo_prune.methods.resrep.targets import prunable, sole_producers
from yolo_prune.surgery.compactor import insert_compactor

FLOORS = {"min_channels": 4, "round_to": 4}


def with_compactors(model: Any) -> tuple[ChannelGraph, dict[str, Any]]:
    """Give a model compactors; return the graph that it had before and the channels of their rows."""
    graph = trace_model(model)
    found = {path: channels for path, channels in sole_producers(graph).items() if path in suitable(model, [])}
    targets = prunable(graph, found, Constraints(**FLOORS))
    for path in targets:
        insert_compactor(model.get_submodule(path.removesuffix(".conv")))
    return graph, targets


def weights_of(model: nn.Module, targets: Any) -> dict[str, nn.Parameter]:
    return {path: model.get_submodule(path.removesuffix(".conv")).bn[1].weight for path in targets}


def course(epochs: int = 100, batches: int = 100, **more: Any) -> Course:
    settings = {"warmup_epochs": 3.0, "accumulate": 1, "lr": 0.01}
    lf = lambda epoch: max(1 - epoch / epochs, 0) * 0.99 + 0.01  # noqa: E731  # the host's
    return Course(epochs=epochs, batches=batches, factor=lf, **{**settings, **more})


def forgetting_of(model: nn.Module, graph: ChannelGraph, targets: Any, **more: Any) -> Forgetting:
    settings = {"course": course(), "pull": Pull(strength=1e-3, momentum=0.9), "target": 0.5, "imgsz_px": 64}
    settings |= {"constraints": Constraints(**FLOORS), "interval": 1, **more}
    return Forgetting(graph, targets, weights_of(model, targets), **settings)


SMALL = {
    "nc": 4,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C2f", [16, True]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, False]],
        [-1, 1, "Conv", [32, 3, 2]],
    ],
    "head": [[[5], 1, "Detect", ["nc"]]],
}
"""A detector of one level that trains fast: free layers, a shortcut, a block without one."""


def small_network() -> DetectionModel:
    torch.manual_seed(0)
    model = DetectionModel(copy.deepcopy(SMALL), verbose=False)
    enliven(model)
    return model.eval()


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "resrep.json").read_text())
