"""What models find in images, drawn by the host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_prune.errors import DataError
from yolo_prune.files import new_file
from yolo_prune.hosts.refusals import host_errors_as

LARGEST_PX = 640
"""Longest side of a picture: enough to see a box, and small enough to stand in a page with others."""

JPEG_QUALITY = 80


def draw_detections(
    model: Path, images: Sequence[Path], out: Sequence[Path], *, imgsz_px: int, confidence: float
) -> list[int]:
    """Write a JPEG of every image with what a checkpoint finds in it: boxes, masks, key points, as its task has them.

    Args:
        model: Checkpoint, dense or slim.
        images: Image files.
        out: Where each picture shall stand; an earlier one is replaced.
        imgsz_px: Side of the input.
        confidence: Least confidence that is drawn.

    Returns:
        Number of objects found in each image.

    Raises:
        DataError: An image cannot be read, or the host cannot predict on it.
        OutputError: A picture cannot be written.
    """
    from ultralytics import YOLO

    yolo, counts = YOLO(str(model)), []
    for source, path in zip(images, out, strict=True):
        pixels = cv2.imread(str(source))
        if pixels is None:
            raise DataError(f"cannot read image '{source}'", expected="an image file")
        with host_errors_as(DataError, f"Ultralytics cannot predict on '{source}'", expected="an image"):
            result: Any = yolo.predict(pixels, imgsz=imgsz_px, conf=confidence, save=False, verbose=False)[0]
            drawn: NDArray[np.uint8] = result.plot()
        counts.append(len(result))
        with new_file(path, replace=True) as temporary:
            temporary.write_bytes(_jpeg(drawn))
    return counts


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Encode BGR pixels, shape (height, width, 3), scaled down to `LARGEST_PX` where they are larger."""
    height, width = pixels.shape[:2]
    scale = min(1.0, LARGEST_PX / max(height, width))
    if scale < 1.0:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    done, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert done  # three channels of bytes always encode
    return encoded.tobytes()
