"""ONNX files of small networks, exported once a process."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from checkpoint_files import save_as_host
from models import lively

from yolo_prune.device.images import synthetic_images, to_input
from yolo_prune.export.tensorrt_onnx import export_typed_onnx, set_precision

IMGSZ_PX = 64
FOLDER = tempfile.TemporaryDirectory(prefix="exported_onnx_")


def checkpoint(name: str) -> Path:
    """A network with random weights."""
    path = Path(FOLDER.name, f"{name}_lively.pt")  # the host takes yolov5n.pt for a file of its own
    return path if path.is_file() else save_as_host(lively(name), path)


def exported(name: str, *, dynamic: bool = False, end_to_end: bool = False) -> Path:
    """The network in fp32; not to be changed."""
    path = Path(FOLDER.name, f"{name}_{dynamic}_{end_to_end}.onnx")
    if not path.is_file():
        export_typed_onnx(checkpoint(name), imgsz_px=IMGSZ_PX, out=path, dynamic=dynamic, end_to_end=end_to_end)
    return path


def typed(name: str, precision: str, *, dynamic: bool = False, end_to_end: bool = False) -> Path:
    """The network in some precision; not to be changed."""
    source = exported(name, dynamic=dynamic, end_to_end=end_to_end)
    path = source.with_suffix(f".{precision}.onnx")
    if not path.is_file():
        images = [to_input(image, IMGSZ_PX) for image in synthetic_images(4, IMGSZ_PX)]
        set_precision(Path(shutil.copy(source, path)), precision, images=images)
    return path
