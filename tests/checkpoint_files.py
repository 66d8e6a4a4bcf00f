"""Checkpoint files as the host, a user or an attacker writes them."""

from __future__ import annotations

import copy
import os
import pickletools
import zipfile
from pathlib import Path

import torch
from torch import nn

TRAIN_ARGS = {"task": "detect", "data": "shapes.yaml", "imgsz": 96, "epochs": 30}


def save_as_host(model: nn.Module, path: Path, *, dtype: torch.dtype = torch.float16, **more: object) -> Path:
    """Write a checkpoint as training leaves it: stripped, half precision, frozen."""
    stored = copy.deepcopy(model).to(dtype).requires_grad_(False)
    content = {"epoch": -1, "best_fitness": None, "model": stored, "ema": None, "updates": None, "optimizer": None}
    torch.save({**content, "train_args": dict(TRAIN_ARGS), "date": "2026-01-01", "version": "8.4.190", **more}, path)
    return path


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def globals_named_in(checkpoint: Path) -> set[str]:
    """Return every `module.name` that the pickle of a checkpoint asks for, without running it."""
    with zipfile.ZipFile(checkpoint) as archive:
        (pickled,) = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    operations = [(operation.name, argument) for operation, argument, _ in pickletools.genops(pickled)]
    assert not {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"} & {name for name, _ in operations}  # other ways to ask
    return {argument.replace(" ", ".") for name, argument in operations if name == "GLOBAL"}
