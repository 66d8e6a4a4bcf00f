"""ONNX Runtime, on the CPU or with another of its providers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from yolo_prune.device.runtimes.base import Array, ArtefactFacts, Precision, import_runtime
from yolo_prune.device.runtimes.onnx_providers import PROVIDERS, open_session
from yolo_prune.device.runtimes.variants import require_words, variant_name


@dataclass(frozen=True)
class OnnxSession:
    """An inference session and what is known of its input."""

    session: Any
    input_name: str
    input_type: Any
    batch: int | None
    classes: int | None
    end_to_end: bool
    precision: Precision

    def __call__(self, images: Array) -> list[Array]:
        """See `Session`; an input of another type than float32 is converted, and so are outputs."""
        outputs = self.session.run(None, {self.input_name: images.astype(self.input_type, copy=False)})
        return [np.asarray(output, dtype=np.float32) for output in outputs]


@dataclass(frozen=True)
class OnnxRuntime:
    """Runs `.onnx` files.

    Attributes:
        provider: Key of `PROVIDERS`.
    """

    provider: str = "cpu"

    @staticmethod
    def accepts(artefact: Path) -> bool:
        """See `ArtefactRuntime`."""
        return artefact.suffix == ".onnx" and artefact.is_file()

    @classmethod
    def of(cls, variant: Sequence[str], *, full_precision: bool = False) -> OnnxRuntime:
        """See `ArtefactRuntime`; it computes in float32 in any case."""
        del full_precision
        require_words(variant, PROVIDERS, backend="onnxruntime", most=1)
        return cls(*variant)

    @property
    def name(self) -> str:
        """The backend's name; see `Runtime`."""
        return variant_name("onnxruntime", () if self.provider == "cpu" else (self.provider,))

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
        session = open_session(package, path, options, self.provider)
        facts = ArtefactFacts.parse(session.get_modelmeta().custom_metadata_map, path)
        facts.require_imgsz(path, imgsz_px)
        first = session.get_inputs()[0]
        yield OnnxSession(
            session=session,
            input_name=first.name,
            input_type=np.float16 if first.type == "tensor(float16)" else np.float32,
            batch=first.shape[0] if isinstance(first.shape[0], int) else None,  # a dynamic axis has a name
            classes=facts.classes,
            end_to_end=facts.end_to_end,
            precision=facts.precision,
        )


def _package() -> Any:
    """Import onnxruntime."""
    return import_runtime("onnxruntime", purpose="run ONNX files")
