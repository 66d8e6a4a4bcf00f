"""OpenVINO on the CPU or another device that it finds."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from yolo_prune.device.runtimes.base import Array, ArtefactFacts, Precision, import_runtime, unreadable
from yolo_prune.device.runtimes.variants import require_words, variant_name


@dataclass(frozen=True)
class OpenVinoSession:
    """A compiled model."""

    compiled: Any
    batch: int | None
    classes: int | None
    end_to_end: bool
    precision: Precision

    def __call__(self, images: Array) -> list[Array]:
        """See `Session`."""
        results = self.compiled(images)
        return [np.asarray(results[output]) for output in self.compiled.outputs]


@dataclass(frozen=True)
class OpenVinoRuntime:
    """Runs folders with an `.xml` and a `.bin` file.

    Attributes:
        full_precision: Compute in float32 even where OpenVINO would by default compute in half precision; see
            `NcnnRuntime`.
        device: As OpenVINO calls it, in small letters: cpu, gpu, npu, gpu.1.
    """

    full_precision: bool = False
    device: str = "cpu"

    @staticmethod
    def accepts(artefact: Path) -> bool:
        """See `ArtefactRuntime`."""
        return artefact.is_dir() and any(artefact.glob("*.xml"))

    @classmethod
    def of(cls, variant: Sequence[str], *, full_precision: bool = False) -> OpenVinoRuntime:
        """See `ArtefactRuntime`."""
        if variant:  # importing it to know the devices takes a second
            require_words(variant, _devices(), backend="openvino", most=1)
        return cls(full_precision, *variant)

    @property
    def name(self) -> str:
        """The backend's name; see `Runtime`."""
        return variant_name("openvino", () if self.device == "cpu" else (self.device,))

    def version(self) -> str:
        """Return openvino's version."""
        return str(_package().__version__).partition("-")[0]

    @contextlib.contextmanager
    def load(self, path: Path, *, imgsz_px: int, threads: int) -> Iterator[OpenVinoSession]:
        """See `Runtime`."""
        core = _core(_package())
        facts = ArtefactFacts.of_folder(path)
        facts.require_imgsz(path, imgsz_px)
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self.device == "cpu":
            options["INFERENCE_NUM_THREADS"] = threads
        if self.full_precision:
            options["INFERENCE_PRECISION_HINT"] = "f32"
        graph = next(path.glob("*.xml"), None)
        if graph is None:
            raise unreadable(path, "no .xml file")
        try:
            compiled = core.compile_model(str(graph), self.device.upper(), options)
        except RuntimeError as error:
            raise unreadable(path, str(error).strip().splitlines()[-1]) from error
        batch = compiled.input(0).partial_shape[0]
        yield OpenVinoSession(
            compiled=compiled,
            batch=batch.get_length() if batch.is_static else None,
            classes=facts.classes,
            end_to_end=facts.end_to_end,
            precision=facts.precision,
        )


def _devices() -> list[str]:
    """Return the devices that OpenVINO finds, in small letters."""
    return [str(device).lower() for device in _core(_package()).available_devices]


@functools.lru_cache(maxsize=None)
def _core(package: Any) -> Any:
    """Return the one core of this process, which lives as long as the process does.

    Args:
        package: openvino, which is asked for at every call: a test may take it away.

    The CPU device of a core lends the thread that first compiles a stack for its signals, and unmaps it wherever the
    last reference to the core goes. If that were another thread, in which the garbage collector happened to run, the
    first one would die at its next signal.
    """
    return package.Core()


def _package() -> Any:
    """Import openvino."""
    return import_runtime("openvino", purpose="run OpenVINO models")
