"""Pictures that stand in a page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from yolo_prune.report.records import Detections

LARGEST_BYTES = 400_000
"""Of one picture; a stage of `run` writes them far smaller."""

JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture of a model's detections.

    Attributes:
        model: Name of the model.
        objects: How many it found.
        source: Data URI; None where the file is missing, too large or no JPEG.
    """

    model: str
    objects: int
    source: Markup | None


def embedded(folder: Path, detections: Detections) -> list[Shown]:
    """Return the pictures of one image, by model."""
    return [
        Shown(model=model, objects=objects, source=data_uri(folder, name))
        for model, (name, objects) in detections.pictures.items()
    ]


def data_uri(folder: Path, name: str) -> Markup | None:
    """Return a JPEG below a folder as a data URI; None where there is none, or one that a page had better not hold."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file() or path.stat().st_size > LARGEST_BYTES:
        return None
    content = path.read_bytes()
    if not content.startswith(JPEG):
        return None
    return Markup("data:image/jpeg;base64,") + base64.b64encode(content).decode()
