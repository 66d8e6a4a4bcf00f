"""PyTorch: the checkpoint itself, as the host predicts with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo_prune.device.runtimes.base import Array, Precision
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.ultralytics.inference import is_end_to_end, load_for_inference


@dataclass(frozen=True, kw_only=True)
class PyTorchSession:
    """A fused model in evaluation mode."""

    model: nn.Module
    end_to_end: bool
    precision: Precision = "fp32"  # the host computes in float32 on a CPU whatever the checkpoint stores
    batch: int = 1

    def __call__(self, images: Array) -> list[Array]:
        """See `Session`; what the host returns for training's sake beside the predictions is left out."""
        with torch.inference_mode():
            output = self.model(torch.from_numpy(images))
        predictions = output[0] if isinstance(output, tuple) else output
        return [part.numpy() for part in (predictions if isinstance(predictions, tuple) else (predictions,))]


@dataclass(frozen=True, kw_only=True)
class PyTorchRuntime:
    """Runs checkpoints.

    Attributes:
        end_to_end: Which of two heads to run; None keeps the checkpoint's own mode. See `load_for_inference`.
    """

    end_to_end: bool | None = None
    name: str = "pytorch"

    def version(self) -> str:
        """Return torch's version."""
        return str(torch.__version__)

    @contextlib.contextmanager
    def load(self, path: Path, *, imgsz_px: int, threads: int) -> Iterator[PyTorchSession]:
        """See `Runtime`; a checkpoint takes every input size that its stride divides.

        Raises:
            CheckpointError: The file is missing or not a checkpoint of the host.
            ConfigError: The model's stride does not divide `imgsz_px`.
        """
        model: Any = load_for_inference(path, end_to_end=self.end_to_end)
        require_imgsz(imgsz_px, stride=int(model.stride.max()))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield PyTorchSession(model=model, end_to_end=is_end_to_end(model))
        finally:
            torch.set_num_threads(before)
