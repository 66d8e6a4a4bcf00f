"""Stages of `run` that only make things to look at: widths of layers, and detections side by side.

A report reads records and files, never a model; what it shows of models is written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yolo_prune.hosts.slim import widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import image_files
from yolo_prune.hosts.ultralytics.pictures import draw_detections

IMAGES = 4
"""Images on which detections are drawn, evenly spaced over a split."""

CONFIDENCE = 0.25
"""Least confidence of a detection that is drawn; the host's own default."""

FOLDER = "detections"


def layer_widths(checkpoints: Mapping[str, Path]) -> dict[str, dict[str, int]]:
    """Return the output channels of every convolution by its path, of each checkpoint by its name.

    Raises:
        YoloPruneError: A checkpoint cannot be read.
    """
    return {
        name: {layer: size[0] for layer, size in widths(read_checkpoint(path).model).items()}
        for name, path in checkpoints.items()
    }


def side_by_side(
    checkpoints: Mapping[str, Path], folder: Path, *, data: Path, split: str, imgsz_px: int
) -> dict[str, Any]:
    """Draw what each checkpoint finds in the same images; return the record.

    Args:
        checkpoints: By name.
        folder: Of the run; the pictures come into `detections` below it.
        data: Data yaml.
        split: Whose images.
        imgsz_px: Side of the input.

    Raises:
        YoloPruneError: The split is not there, or a picture cannot be written.
    """
    files = image_files(data, split)
    spread = [files[index] for index in np.unique(np.linspace(0, len(files) - 1, IMAGES).round().astype(int))]
    chosen = [file for file in spread if cv2.imread(str(file)) is not None]  # the host trains past damaged images, too
    images: list[dict[str, Any]] = [{"image": file.name, "models": {}} for file in chosen]
    for name, model in checkpoints.items():
        pictures = [Path(FOLDER, f"{index}_{name}.jpg") for index in range(len(chosen))]
        counts = draw_detections(
            model, chosen, [folder / path for path in pictures], imgsz_px=imgsz_px, confidence=CONFIDENCE
        )
        for image, path, count in zip(images, pictures, counts, strict=True):
            image["models"][name] = {"file": path.as_posix(), "objects": count}
    return {"split": split, "confidence": CONFIDENCE, "images": images}
