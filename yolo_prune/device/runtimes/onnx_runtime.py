"""ONNX Runtime on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_prune.device.runtimes.base import Array, ArtefactFacts, Precision, import_runtime, unreadable


@dataclass(frozen=True)
class OnnxSession:
    """An inference session and the name of its input."""

    session: Any
    input_name: str
    end_to_end: bool
    precision: Precision
    batch: int = 1

    def __call__(self, images: Array) -> list[Array]:
        """See `Session`."""
        outputs: list[Array] = self.session.run(None, {self.input_name: images})
        return outputs


@dataclass(frozen=True)
class OnnxRuntime:
    """Runs `.onnx` files with the CPU provider."""

    name: str = "onnxruntime"

    def version(self) -> str:
        """Return onnxruntime's version."""
        return str(_package().__version__)

    @contextlib.contextmanager
    def load(self, path: Path, *, imgsz_px: int, threads: int) -> Iterator[OnnxSession]:
        """See `Runtime`."""
        package = _package()
        options = package.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        try:
            session = package.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception types have no common root
            raise unreadable(path, error) from error
        facts = ArtefactFacts.parse(session.get_modelmeta().custom_metadata_map)
        facts.require_imgsz(path, imgsz_px)
        yield OnnxSession(
            session=session,
            input_name=session.get_inputs()[0].name,
            end_to_end=facts.end_to_end,
            precision=facts.precision,
            batch=facts.batch,
        )


def _package() -> Any:
    """Import onnxruntime."""
    return import_runtime("onnxruntime", purpose="run ONNX files")
