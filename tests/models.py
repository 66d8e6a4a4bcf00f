"""The models that the tests run through; the whole case table is in tools/model_cases.py."""

from __future__ import annotations

import copy
from typing import Any

import torch
from labels import KEY_POINTS
from model_cases import enliven
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel, OBBModel, PoseModel, SegmentationModel

FAMILIES = ("yolov5", "yolov8", "yolov9", "yolov10", "yolo11", "yolo12", "yolo26")
SCALES = {"yolov9": ("t", "s")}
CASES = [f"{family}{scale}" for family in FAMILIES for scale in SCALES.get(family, ("n", "s"))]
SMALL = [case for case in CASES if case[-1] in "nt"]


KINDS: dict[str, tuple[type[DetectionModel], dict[str, Any]]] = {
    "seg": (SegmentationModel, {}),
    "pose": (PoseModel, {"data_kpt_shape": (len(KEY_POINTS), 3)}),
    "obb": (OBBModel, {}),
}
"""Class of the host, and its arguments for the drawn data, by the end of a yaml's name; others are detectors."""


def lively(name: str, *, seed: int = 0, classes: int = 4) -> DetectionModel:
    """Build a model with random weights whose every channel carries signal; see `model_cases.enliven`."""

    torch.manual_seed(seed)
    kind, more = KINDS.get(name.rpartition("-")[2], (DetectionModel, {}))
    model = kind(f"{name}.yaml", nc=classes, verbose=False, **more)
    enliven(model)
    return model.eval()


def states(*models: nn.Module) -> list[dict[str, Tensor]]:
    """Return copies of all tensors of models, by their names."""
    return [copy.deepcopy(model.state_dict()) for model in models]


def image(side: int = 64, seed: int = 0, *, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, side, side, generator=generator, dtype=torch.float64)
