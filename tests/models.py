"""The models that the tests run through; the whole case table is in tools/model_cases.py."""

from __future__ import annotations

from model_cases import enliven
from ultralytics.nn.tasks import DetectionModel

FAMILIES = ("yolov5", "yolov8", "yolov9", "yolov10", "yolo11", "yolo12", "yolo26")
SCALES = {"yolov9": ("t", "s")}
CASES = [f"{family}{scale}" for family in FAMILIES for scale in SCALES.get(family, ("n", "s"))]
SMALL = [case for case in CASES if case[-1] in "nt"]


def lively(name: str, *, seed: int = 0, classes: int = 4) -> DetectionModel:
    """Build a detector with random weights whose every channel carries signal; see `model_cases.enliven`."""
    import torch

    torch.manual_seed(seed)
    model = DetectionModel(f"{name}.yaml", nc=classes, verbose=False)
    enliven(model)
    return model.eval()
