"""PyTorch: the checkpoint itself, as the host predicts with it, on the CPU or on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo_prune.device.runtimes.base import Array, Precision
from yolo_prune.device.runtimes.variants import require_words, variant_name
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.ultralytics.inference import is_end_to_end, load_for_inference

VARIANT = ("cuda", "half", "channels_last", "compile")
"""Words that may follow a checkpoint's name, in the order in which its backend's name has them."""


@dataclass(frozen=True, kw_only=True)
class PyTorchSession:
    """A fused model in evaluation mode.

    Attributes:
        model: The model, where it runs.
        forward: The model as it is called: itself, or what `torch.compile` made of it.
        dtype: What it computes in.
        device: Where it runs.
    """

    model: nn.Module
    forward: Callable[[torch.Tensor], Any]
    dtype: torch.dtype
    device: torch.device
    classes: int
    end_to_end: bool
    batch: None = None

    @property
    def precision(self) -> Precision:
        """See `Session`; the host computes in float32 on a CPU whatever the checkpoint stores."""
        return "fp16" if self.dtype == torch.float16 else "fp32"

    def __call__(self, images: Array) -> list[Array]:
        """See `Session`; what the host returns for training's sake beside the predictions is left out.

        Kernels on a GPU are only queued; it is `.cpu()` that waits for them.
        """
        with torch.inference_mode():
            output = self.forward(torch.from_numpy(images).to(self.device, self.dtype))
            predictions = output[0] if isinstance(output, tuple) else output
            parts = predictions if isinstance(predictions, tuple) else (predictions,)
            return [part.cpu().float().numpy() for part in parts]


@dataclass(frozen=True, kw_only=True)
class PyTorchRuntime:
    """Runs checkpoints.

    Attributes:
        end_to_end: Which of two heads to run; None keeps the checkpoint's own mode. See `load_for_inference`.
        variant: Of `VARIANT`.
    """

    end_to_end: bool | None = None
    variant: tuple[str, ...] = ()

    @classmethod
    def of(cls, variant: Sequence[str]) -> PyTorchRuntime:
        """Make the one that the words of a variant name: float32 on the CPU without any."""
        require_words(variant, VARIANT, backend="pytorch")
        return cls(variant=tuple(word for word in VARIANT if word in variant))

    @property
    def name(self) -> str:
        """The backend's name; see `Runtime`."""
        return variant_name("pytorch", self.variant)

    def version(self) -> str:
        """Return torch's version."""
        return str(torch.__version__)

    @contextlib.contextmanager
    def load(self, path: Path, *, imgsz_px: int, threads: int) -> Iterator[PyTorchSession]:
        """See `Runtime`; a checkpoint takes every input size that its stride divides, and every batch.

        Raises:
            CheckpointError: The file is missing or not a checkpoint of the host.
            ConfigError: The model's stride does not divide `imgsz_px`, or there is no GPU.
        """
        device = self._device()
        model: Any = load_for_inference(path, end_to_end=self.end_to_end)
        require_imgsz(imgsz_px, stride=int(model.stride.max()))
        dtype = torch.float16 if "half" in self.variant else torch.float32
        memory = torch.channels_last if "channels_last" in self.variant else torch.contiguous_format
        model = model.to(device, dtype, memory_format=memory)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield PyTorchSession(
                model=model,
                forward=torch.compile(model) if "compile" in self.variant else model,
                dtype=dtype,
                device=device,
                classes=len(model.names),
                end_to_end=is_end_to_end(model),
            )
        finally:
            torch.set_num_threads(before)

    def _device(self) -> torch.device:
        """Return where to run, or raise `ConfigError` where no GPU is to be had."""
        if "cuda" in self.variant and not torch.cuda.is_available():
            raise ConfigError(
                f"PyTorch {torch.__version__} finds no CUDA device",
                expected="an NVIDIA GPU, its driver, and a PyTorch that was built for CUDA",
                remedy="run it on a machine with a GPU, or leave @cuda out",
            )
        return torch.device("cuda" if "cuda" in self.variant else "cpu")
