"""OpenVINO on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_prune.device.runtimes.base import Array, ArtefactFacts, Precision, import_runtime, unreadable


@dataclass(frozen=True)
class OpenVinoSession:
    """A compiled model."""

    compiled: Any
    end_to_end: bool
    precision: Precision
    batch: int = 1

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
    """

    full_precision: bool = False
    name: str = "openvino"

    def version(self) -> str:
        """Return openvino's version."""
        return str(_package().__version__).partition("-")[0]

    @contextlib.contextmanager
    def load(self, path: Path, *, imgsz_px: int, threads: int) -> Iterator[OpenVinoSession]:
        """See `Runtime`."""
        package = _package()
        facts = ArtefactFacts.of_folder(path)
        facts.require_imgsz(path, imgsz_px)
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if self.full_precision:
            options["INFERENCE_PRECISION_HINT"] = "f32"
        graph = next(path.glob("*.xml"), None)
        if graph is None:
            raise unreadable(path, "no .xml file")
        try:
            compiled = package.Core().compile_model(str(graph), "CPU", options)
        except RuntimeError as error:
            raise unreadable(path, str(error).strip().splitlines()[-1]) from error
        yield OpenVinoSession(
            compiled=compiled, end_to_end=facts.end_to_end, precision=facts.precision, batch=facts.batch
        )


def _package() -> Any:
    """Import openvino."""
    return import_runtime("openvino", purpose="run OpenVINO models")
