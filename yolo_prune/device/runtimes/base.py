"""The protocol of all runtimes, and what the host writes into an artefact about itself."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.runtimes.telemetry import without_telemetry
from yolo_prune.errors import ConfigError, MissingDependencyError

Array = NDArray[np.float32]
Precision = Literal["fp32", "fp16", "int8"]

PRECISIONS: Sequence[Precision] = get_args(Precision)
"""How artefacts can store their weights."""

_PRECISIONS: Mapping[Any, Precision] = {16: "fp16", 8: "int8"}  # by the bits that the host notes; nothing is 32


class Session(Protocol):
    """A loaded model.

    Attributes:
        batch: Images that a call takes; None where it takes any number.
        classes: Number of classes; None where the artefact does not say.
        end_to_end: The output is final detections (1, k, 6), rows x1, y1, x2, y2, score, class; otherwise it is
            (1, 4 + classes, anchors), rows cx, cy, w, h in pixels and one score a class. Tasks other than detection
            have more behind these, see `task_rows` of the host.
        precision: How the artefact stores its weights.
    """

    @property
    def batch(self) -> int | None: ...  # noqa: D102

    @property
    def classes(self) -> int | None: ...  # noqa: D102

    @property
    def end_to_end(self) -> bool: ...  # noqa: D102

    @property
    def precision(self) -> Precision: ...  # noqa: D102

    def __call__(self, images: Array) -> list[Array]:
        """Run contiguous float32 images (B, 3, H, W) in [0, 1]; return raw outputs, decoded predictions first.

        All outputs are in host memory when it returns: a GPU has finished, and copies are part of the call. Every
        output has the same B first. Models for task segment have a second output, the prototypes of the masks.
        """
        ...


class Runtime(Protocol):
    """Something that runs artefacts of one kind."""

    @property
    def name(self) -> str:
        """The backend's name, as tables and reports print it."""
        ...

    def version(self) -> str:
        """Return the version of the package behind it."""
        ...

    def load(self, path: Path, *, imgsz_px: int, threads: int) -> AbstractContextManager[Session]:
        """Open an artefact for square inputs of `imgsz_px` on `threads` CPU threads.

        A context, because torch has one thread count for the whole process: leaving restores it.

        Raises:
            ConfigError: The artefact is missing, damaged, or made for another input size.
            MissingDependencyError: The runtime's package is not installed.
        """
        ...


class ArtefactRuntime(Runtime, Protocol):
    """A runtime that is chosen by what an artefact is."""

    @staticmethod
    def accepts(artefact: Path) -> bool:
        """Return whether what stands there is one of its artefacts, by its kind and name alone."""
        ...

    @classmethod
    def of(cls, variant: Sequence[str], *, full_precision: bool = False) -> Runtime:
        """Make the one that the words of a variant name; the CPU's without any.

        Args:
            variant: How it shall run where there are several ways; see `split_variant`.
            full_precision: Compute in float32 where it would choose half precision by itself.

        Raises:
            ConfigError: It does not know the variant.
        """
        ...


@dataclass(frozen=True)
class ArtefactFacts:
    """What the host's exporter noted in an artefact.

    Attributes:
        imgsz_px: Height and width of the input; None if unknown.
        classes: Number of classes; None if unknown.
        end_to_end: See `Session`.
        precision: See `Session`.
        batch: Number of images that it was exported for.
        dynamic: It takes other numbers and sizes of images as well.
    """

    imgsz_px: tuple[int, int] | None = None
    classes: int | None = None
    end_to_end: bool = False
    precision: Precision = "fp32"
    batch: int = 1
    dynamic: bool = False

    @classmethod
    def parse(cls, metadata: Mapping[str, Any], path: Path) -> ArtefactFacts:
        """Read the host's metadata: YAML values, or their `str()` where a format holds strings only.

        Args:
            metadata: By key.
            path: Of the artefact, for the message.

        Raises:
            ConfigError: They are damaged.
        """
        if not isinstance(metadata, Mapping):
            raise unreadable(path, f"its metadata are damaged (a {type(metadata).__name__}, not a mapping)")
        try:
            return cls._parse(metadata)
        except (AttributeError, LookupError, OverflowError, SyntaxError, TypeError, ValueError) as error:
            raise unreadable(path, f"its metadata are damaged ({type(error).__name__}: {error})") from error

    @classmethod
    def _parse(cls, metadata: Mapping[str, Any]) -> ArtefactFacts:
        known = {
            key: _literal(metadata[key]) for key in ("imgsz", "names", "end2end", "args", "batch") if key in metadata
        }
        imgsz, arguments = known.get("imgsz"), known.get("args", {})
        return cls(
            imgsz_px=None if imgsz is None else (int(imgsz[0]), int(imgsz[1])),
            classes=len(known["names"]) if "names" in known else None,
            end_to_end=bool(known.get("end2end", False)),
            precision=_PRECISIONS.get(arguments.get("quantize"), "fp32"),
            batch=int(known.get("batch", 1)),
            dynamic=bool(arguments.get("dynamic", False)),
        )

    @classmethod
    def of_folder(cls, folder: Path) -> ArtefactFacts:
        """Read the host's `metadata.yaml`; a folder without one says nothing about itself.

        Raises:
            ConfigError: The file cannot be read.
        """
        file = folder / "metadata.yaml"
        if not file.is_file():
            return cls()
        try:
            metadata = _mapping(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise unreadable(folder, error) from error
        return cls.parse(metadata, folder)

    def require_imgsz(self, path: Path, imgsz_px: int) -> None:
        """Raise `ConfigError` if the artefact was made for another input size."""
        if not self.dynamic and self.imgsz_px not in (None, (imgsz_px, imgsz_px)):
            raise ConfigError(
                f"artefact '{path.name}' takes inputs of {self.imgsz_px} px, asked to run at {imgsz_px}",
                expected="the size that it was exported for",
                remedy="pass that imgsz, or export again at the wanted one",
            )


def _mapping(text: str) -> Mapping[str, Any]:
    """Read YAML, which a bundle writes as JSON: a device need not have a reader of YAML."""
    try:
        found: Mapping[str, Any] = json.loads(text)
    except ValueError:
        yaml = import_runtime("yaml", purpose="read what the host wrote beside an artefact")
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    return found


def _literal(value: Any) -> Any:
    """Undo `str()` of a Python literal."""
    return ast.literal_eval(value) if isinstance(value, str) else value


def import_runtime(package: str, *, purpose: str, extra: str = "export") -> Any:
    """Import an optional package, which an extra of yolo_prune brings, or raise `MissingDependencyError`.

    What it would tell its maker stays untold; see `without_telemetry`.
    """
    try:
        with without_telemetry():
            return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingDependencyError(package, extra=extra, purpose=purpose) from error


def require_batch(session: Session, path: Path, batch: int) -> None:
    """Raise `ConfigError` where an artefact was made for another batch; NCNN would leave all but one image out."""
    if session.batch not in (None, batch):
        raise ConfigError(
            f"artefact '{path.name}' takes batches of {session.batch}, asked to run with {batch}",
            expected="the number of images in a call that it was exported for",
            remedy=f"pass batch={session.batch}, or export again for the wanted one",
        )


def unreadable(path: Path, reason: object) -> ConfigError:
    """Return the error for an artefact that its runtime cannot open."""
    return ConfigError(
        f"artefact '{path}' cannot be loaded: {reason}",
        expected="a complete artefact as the host exports it",
        remedy="export it again",
    )
