"""Classic YOLOv5 in tests: checkpoints as its train.py leaves them, flags for tiny runs, a copy as a repository."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from torch import nn

from yolo_prune.hosts.yolov5.reading import load
from yolo_prune.hosts.yolov5.source import Classic, installed

TINY = ["--imgsz", "64", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--noplots", "--noautoanchor"]
"""Flags of a training that takes seconds."""


def lively_classic(name: str = "yolov5n", *, classes: int = 4, seed: int = 0) -> nn.Module:
    """Return a detector with random weights that respond to the image."""
    torch.manual_seed(seed)
    classic = installed()
    model = classic.module("models.yolo").DetectionModel(classic.root / "models" / f"{name}.yaml", nc=classes)
    model.nc, model.names = classes, dict(enumerate(model.names))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    return model.eval()


def save_as_classic(model: object, path: Path) -> Path:
    """Write a checkpoint as classic training leaves it: stripped, half precision, frozen."""
    if isinstance(model, nn.Module):
        model = model.half().requires_grad_(False)
    content = {"epoch": -1, "best_fitness": None, "model": model, "ema": None, "updates": None, "optimizer": None}
    torch.save({**content, "opt": {"epochs": 3, "data": Path("data.yaml")}, "git": None, "date": "2026-01-01"}, path)
    return path


def stored(path: Path, key: str = "model") -> nn.Module:
    """Return a model of a checkpoint."""
    return load(installed(), path)[key]


def scales_in(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the batch-norm scales of a model by name, float32."""
    layers = model.named_modules()
    return {name: layer.weight.detach().float() for name, layer in layers if isinstance(layer, nn.BatchNorm2d)}


def as_repository(classic: Classic, folder: Path) -> Path:
    """Copy PyPI's files to where the repository has them, its imports as the repository writes them."""
    names = ("models", "utils", "data/hyps")
    for name in names:
        shutil.copytree(classic.root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "val.py", "detect.py", "export.py", "helpers.py"):
        shutil.copy(classic.root / name, folder / name)
    for file in folder.rglob("*.py"):
        text = file.read_text().replace("from yolov5 import __version__", "__version__ = '7.0'  #")
        text = re.sub(r"import yolov5\.(\w+) as", r"import \1 as", text)
        file.write_text(re.sub(r"from yolov5\.", "from ", text))
    return folder
