"""The host's own exporter, run where it cannot touch the user's files."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from yolo_prune.errors import ConfigError, ExportError, MissingDependencyError
from yolo_prune.files import cannot_write, new_file, parent_folders, refuse_existing, temporary_prefix
from yolo_prune.hosts.refusals import host_errors_as, require_imgsz
from yolo_prune.hosts.ultralytics.checkpoints import unpickle
from yolo_prune.hosts.ultralytics.refusals import loading

ExportFormat = Literal["onnx", "ncnn", "openvino"]

# What the host's exporter imports for each format; with auto-install off it would fail halfway with its own words.
_PACKAGES: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxslim", "onnxruntime"),
    "ncnn": ("ncnn", "pnnx"),
    "openvino": ("openvino",),
}


def export_model(
    checkpoint: Path,
    *,
    format: ExportFormat,  # noqa: A002  (the host's word)
    imgsz_px: int,
    out: Path,
    half: bool = False,
    end_to_end: bool = False,
    opset: int | None = None,
    batch: int = 1,
    dynamic: bool = False,
) -> Path:
    """Export a checkpoint with the stock host exporter, on the CPU, with a square input.

    The host writes beside the checkpoint, and pnnx into (and the host deletes from) the working directory: both are a
    temporary folder next to `out` here, so nothing else changes. The process's working directory moves there meanwhile.

    Args:
        checkpoint: A `.pt` file of the host, dense or slim.
        format: "onnx" gives a file, "ncnn" a folder with `model.ncnn.param`, `.bin` and `metadata.yaml`,
            "openvino" one with `model.xml`, `.bin` and `metadata.yaml`.
        imgsz_px: Side of the square input in pixels, a multiple of the model's stride.
        out: Where the artefact shall stand; nothing may stand there yet.
        half: Store the weights as 16-bit floats (inputs and outputs stay float32).
        end_to_end: Twin heads (v10, 26) only, ONNX only: export the one-to-one head with its top-k, output (1, k, 6).
            The host's default, kept here, is the one-to-many head, output (1, 4 + classes, anchors).
        opset: ONNX only: version of its operators; None takes the host's choice.
        batch: Images of a call; ONNX and OpenVINO only, since NCNN has no batch axis.
        dynamic: Take other numbers and sizes of images as well, `imgsz_px` and `batch` being examples; ONNX and
            OpenVINO only.

    Returns:
        `out`.

    Raises:
        CheckpointError: The checkpoint is missing or not one of the host's.
        ConfigError: The format is unknown, `imgsz_px` does not fit the stride, or the format has no `end_to_end`,
            `batch` or `dynamic`.
        MissingDependencyError: A package that the format needs is not installed.
        OutputError: `out` exists or its folder cannot be written.
        ExportError: The host failed.
    """
    require_packages(format)
    require_shapes(format, batch=batch, dynamic=dynamic)
    refuse_existing(out)
    unpickle(checkpoint)  # the host itself would run foreign code, unless told otherwise before it was first imported
    out = out.absolute()
    with _workspace(out) as folder:
        _copy(checkpoint, folder / "model.pt")
        with _working_in(folder):
            model = _load(checkpoint.name)
            _check_request(model, format=format, imgsz_px=imgsz_px, end_to_end=end_to_end)
            options = _options(half=half, end_to_end=end_to_end, opset=opset, batch=batch, dynamic=dynamic)
            artefact = folder / _run_host(model, checkpoint.name, {"format": format, "imgsz": imgsz_px, **options})
        _move(artefact, out)
    return out


def require_packages(format: str) -> None:  # noqa: A002
    """Refuse a format that is unknown or for which a package is missing.

    Raises:
        ConfigError: The format is unknown.
        MissingDependencyError: A package that it needs is not installed.
    """
    if format not in _PACKAGES:
        raise ConfigError(
            f"unknown export format '{format}'", expected=f"one of {', '.join(_PACKAGES)}", remedy="correct `format`"
        )
    for package in _PACKAGES[format]:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, extra="export", purpose=f"export to {format.upper()}")


def require_shapes(format: str, *, batch: int, dynamic: bool) -> None:  # noqa: A002
    """Refuse inputs that a format cannot take.

    Raises:
        ConfigError: No image at all, or NCNN is to take several at once or inputs of several sizes.
    """
    if batch < 1:
        raise ConfigError(f"batch={batch}", expected="1 or more")
    if format == "ncnn" and (batch > 1 or dynamic):
        raise ConfigError(
            f"batch={batch} dynamic={str(dynamic).lower()} for NCNN",
            expected="one image of one size: NCNN has no batch axis, and the host's export fixes the size",
            remedy="leave them out for this format",
        )


@contextlib.contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`: on the same file system, so that the last step is one rename."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(parent_folders(out))
            folder = Path(tempfile.mkdtemp(prefix=temporary_prefix(out), dir=out.parent))
        except OSError as error:
            raise cannot_write(out, error) from error
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Make `folder` the working directory for a while (`contextlib.chdir` needs Python 3.11).

    With a relative name the host derives every other name correctly; with an absolute one it replaces each ".pt" in the
    whole path, the parents' names included.
    """
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _copy(checkpoint: Path, copy: Path) -> None:
    """Copy the checkpoint into the workspace."""
    try:
        shutil.copyfile(checkpoint, copy)
    except OSError as error:
        raise cannot_write(copy.parent, error) from error


def _load(name: str) -> Any:
    """Return the host's `YOLO` around `model.pt` of the working directory; `name` is the user's name for it."""
    from ultralytics import YOLO

    with loading(name):
        return YOLO("model.pt")


def _check_request(model: Any, *, format: ExportFormat, imgsz_px: int, end_to_end: bool) -> None:  # noqa: A002
    """Refuse what the host would change with a warning only: another input size, another head."""
    require_imgsz(imgsz_px, stride=int(model.model.stride.max()))
    if end_to_end and (format != "onnx" or getattr(model.model.model[-1], "one2one_cv2", None) is None):
        raise ConfigError(
            f"end_to_end=true with format '{format}' and head {type(model.model.model[-1]).__name__}",
            expected="a twin-headed model (v10, 26) and format 'onnx': the others have no top-k",
            remedy="leave end_to_end out",
        )


def _options(*, half: bool, end_to_end: bool, opset: int | None, batch: int, dynamic: bool) -> dict[str, Any]:
    """Return what differs from the host's own choices, in its words."""
    asked = {
        "quantize": 16 if half else None,
        "nms": False if end_to_end else None,  # "the head without NMS"; its default None is the other head
        "opset": opset,
        "batch": batch if batch != 1 else None,
        "dynamic": dynamic or None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _run_host(model: Any, name: str, options: dict[str, Any]) -> Path:
    """Run the exporter; return the artefact's path relative to the working directory."""
    with host_errors_as(
        ExportError,
        f"Ultralytics could not export '{name}' to {options['format'].upper()}",
        expected="an artefact of the stock exporter",
        remedy="see the host's messages above; `yolo export` on the same checkpoint fails alike",
    ):
        try:
            artefact = Path(model.export(**options))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise cannot_write(Path.cwd().parent, error) from error
            raise
    return artefact


def _move(artefact: Path, out: Path) -> None:
    """Give the finished artefact its name, in one step."""
    if artefact.is_file():
        with new_file(out) as temporary:
            artefact.replace(temporary)
        return
    refuse_existing(out)
    try:
        artefact.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error
