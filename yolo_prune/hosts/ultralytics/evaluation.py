"""mAP of a checkpoint, as the host measures it, and checks of data descriptions before long work begins."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from yolo_prune.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the host's validator measured.

    Attributes:
        split: Split of the data.
        images: Number of images.
        map50: Mean average precision at IoU 0.5.
        map50_95: Mean average precision over IoU 0.5 to 0.95.
        precision: At the confidence of the best F1.
        recall: At the confidence of the best F1.
        imgsz_px: Side of the input.
    """

    split: str
    images: int
    map50: float
    map50_95: float
    precision: float
    recall: float
    imgsz_px: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return asdict(self)


def evaluate(model: Path, *, data: Path, split: str, imgsz_px: int, batch: int = 16, workers: int = 2) -> Evaluation:
    """Measure mAP with the host's validator.

    Args:
        model: Checkpoint, dense or slim.
        data: Data yaml.
        split: `train`, `val` or `test`.
        imgsz_px: Side of the input.
        batch: Images per batch.
        workers: Loader processes.

    Raises:
        DataError: The yaml or the split is missing.
    """
    from ultralytics import YOLO

    require_split(data, split)
    with tempfile.TemporaryDirectory() as scratch:  # the validator insists on a folder for its pictures
        metrics = YOLO(str(model)).val(
            data=str(data), split=split, imgsz=imgsz_px, batch=batch, workers=workers, plots=False, verbose=False,
            project=scratch, name="val",
        )  # fmt: skip
    box = metrics.box
    return Evaluation(
        split=split,
        images=len(image_files(data, split)),
        map50=float(box.map50),
        map50_95=float(box.map),
        precision=float(box.mp),
        recall=float(box.mr),
        imgsz_px=imgsz_px,
    )


def require_split(data: Path, split: str) -> list[Path]:
    """Return the places of a split's images.

    Raises:
        DataError: No such yaml, not a data description, or the split is not in it or not on disk.
    """
    description = read_data(data)
    entry = description.get(split)
    if not entry:
        found = ", ".join(key for key in ("train", "val", "test") if description.get(key)) or "none"
        raise DataError(
            f"'{data}' has no split '{split}' (it has: {found})",
            expected=f"a line `{split}: path/to/images`",
            remedy="add the split to the yaml, or name another one",
        )
    root = data.parent / description["path"] if description.get("path") else data.parent
    places = [root / place for place in (entry if isinstance(entry, list) else [entry])]
    for place in places:
        if not place.exists():
            raise DataError(f"split '{split}' of '{data}' points to '{place}', which does not exist", expected="images")
    return places


def image_files(data: Path, split: str) -> list[Path]:
    """Return the image files of a split, sorted."""
    from ultralytics.data.utils import IMG_FORMATS

    files: list[Path] = []
    for place in require_split(data, split):
        if place.is_dir():
            files += [file for file in place.rglob("*") if file.suffix[1:].lower() in IMG_FORMATS]
        else:  # a text file that lists images
            files += [place.parent / line.strip() for line in place.read_text().splitlines() if line.strip()]
    return sorted(files)


def read_data(data: Path) -> dict[str, Any]:
    """Read a data yaml.

    Raises:
        DataError: No such file, or not a mapping.
    """
    try:
        description = yaml.safe_load(data.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read data yaml '{data}': {error}", expected="a YAML file with train, val and names"
        ) from error
    if not isinstance(description, dict):
        raise DataError(f"'{data}' is not a data description", expected="a YAML mapping with train, val and names")
    return description
