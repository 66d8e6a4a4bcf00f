"""The case table of models that drives the tests; a new model is a new row."""

from __future__ import annotations

import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

FAMILIES = ("yolov5", "yolov8", "yolov9", "yolov10", "yolo11", "yolo12", "yolo26")
SCALES = {"yolov9": ("t", "s")}
CASES = [f"{family}{scale}" for family in FAMILIES for scale in SCALES.get(family, ("n", "s"))]
SMALL = [case for case in CASES if case[-1] in "nt"]


def lively(name: str, *, seed: int = 0, classes: int = 4) -> DetectionModel:
    """Build a model with random weights whose every channel carries signal and whose outputs are far from constant.

    Freshly built models fade out with depth, so an error deep inside would not reach the output.
    """
    torch.manual_seed(seed)
    model = DetectionModel(f"{name}.yaml", nc=classes, verbose=False)
    enliven(model)
    return model.eval()


def enliven(model: nn.Module) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.5)
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(torch.rand(2, 3, 128, 128))
    for norm in norms:
        norm.momentum = 0.03
        norm.num_batches_tracked.zero_()
