"""Draw a small data set: shapes on cluttered backgrounds, labelled in YOLO format, always the same for a seed.

    python datasets/shapes.py out=DIR [seed=0] [train=384] [val=96] [test=96] [imgsz_px=192] [task=detect]

Four classes (disc, square, triangle, star) of any hue, rotation and a wide range of sizes cover each other in part
and lie among crosses and strokes that carry no label. It needs no download, and a detector learns it from random
weights in minutes, yet not perfectly: small and half hidden shapes stay hard. Every task has the same images; `task`
decides on the labels: boxes (detect), polygons (segment), the four outermost points (pose) or rotated boxes (obb).
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from drawing import CLASSES, draw_image
from labels import DESCRIPTIONS, LABELS, label_lines

from yolo_prune.cli import script
from yolo_prune.configuration import require_choice, setting
from yolo_prune.errors import ConfigError, OutputError
from yolo_prune.files import cannot_write, parent_folders

JPEG_QUALITY = 92
MANIFEST = "shapes.json"
FORMAT = 1  # raise it when the same parameters would draw other files
LEAST = {"seed": 0, "train": 1, "val": 1, "test": 1, "imgsz_px": 64}  # at 64 the smallest shape covers a few pixels


@dataclass(kw_only=True)
class Parameters:
    """What the files of a data set depend on, and nothing else.

    Raises:
        ConfigError: A value is out of range, or an unknown task.
    """

    seed: int = setting(0, help="any integer from 0; the same seed draws the same files")
    train: int = setting(384, help="images to train on", unit="images")
    val: int = setting(96, help="images to validate on", unit="images")
    test: int = setting(96, help="images that no choice has seen", unit="images")
    imgsz_px: int = setting(192, help="side of the square images", unit="px")
    task: str = setting("detect", help=f"what the labels say: {', '.join(LABELS)}")

    def __post_init__(self) -> None:
        require_choice("task", self.task, LABELS)
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}", expected=f"an integer from {least} on")

    @property
    def splits(self) -> dict[str, int]:
        """Number of images by split."""
        return {"train": self.train, "val": self.val, "test": self.test}


@dataclass(kw_only=True)
class ShapesConfig(Parameters):
    """Settings of this script."""

    out: str = setting(help="folder to make, or one that this script made earlier")


def _write_split(root: Path, split: str, index: int, parameters: Parameters) -> None:
    """Write images and labels of one split; every image has its own stream of random numbers."""
    images, labels = root / "images" / split, root / "labels" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for number in range(parameters.splits[split]):
        image, shapes = draw_image(np.random.default_rng([parameters.seed, index, number]), parameters.imgsz_px)
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        (images / f"{number:05d}.jpg").write_bytes(encoded.tobytes())
        (labels / f"{number:05d}.txt").write_text("".join(f"{line}\n" for line in label_lines(shapes, parameters.task)))


def _data_yaml(parameters: Parameters) -> str:
    """Return the description that the host reads; without `path:` its folders are relative to the file."""
    folders = [f"{split}: images/{split}" for split in parameters.splits]
    more = DESCRIPTIONS.get(parameters.task, [])
    names = [f"  {number}: {name}" for number, name in enumerate(CLASSES)]
    return "\n".join([*folders, f"nc: {len(CLASSES)}", "names:", *names, *more, ""])


def _manifest(parameters: Parameters) -> dict[str, Any]:
    """Return what `MANIFEST` says about a data set of these parameters."""
    values = asdict(parameters)
    if parameters.task == "detect":  # sets that were drawn before there were other tasks do not say theirs
        del values["task"]
    return {"drawn_by": "datasets/shapes.py", "format": FORMAT, **values}


def _refuse_other(out: Path, parameters: Parameters) -> None:
    """Raise `OutputError` unless `out` is a complete data set of these parameters."""
    expected = _manifest(parameters)
    try:
        found: Any = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != expected:
        raise OutputError(
            f"'{out}' already exists and is {'no data set of ours' if found is None else f'another one: {found}'}",
            expected=f"a path where nothing stands yet, or the data set {expected}",
            remedy="choose another out=; nothing was overwritten",
        )
    for kind, suffix in (("images", "jpg"), ("labels", "txt")):
        for split, count in parameters.splits.items():
            present = len(list((out / kind / split).glob(f"*.{suffix}")))
            if present != count:
                raise OutputError(
                    f"'{out / kind / split}' has {present} files",
                    expected=f"{count}, as '{MANIFEST}' says",
                    remedy="move the folder away to have it drawn again; nothing was overwritten",
                )


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; on success it becomes `out`, on failure it vanishes."""
    try:
        with parent_folders(out), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            folder = Path(temporary, "data")  # an ordinary folder; the temporary one is private
            folder.mkdir()
            yield folder
            folder.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error


def draw_dataset(out: Path, *, seed: int, train: int, val: int, test: int, imgsz_px: int, task: str = "detect") -> Path:
    """Draw a data set, or leave it as it is if it stands there complete.

    Args:
        out: Folder to make: `images/`, `labels/`, `data.yaml` and a manifest. It appears complete or not at all.
        seed: Any integer from 0; the same seed draws the same files.
        train: Number of images to train on.
        val: Number of images to validate on.
        test: Number of images that no choice has seen.
        imgsz_px: Side of the square images, in pixels.
        task: What the labels say, one of `LABELS`.

    Returns:
        The path of its `data.yaml`.

    Raises:
        ConfigError: A value is out of range, or an unknown task.
        OutputError: Something else stands at `out`, or it cannot be written.
    """
    parameters = Parameters(seed=seed, train=train, val=val, test=test, imgsz_px=imgsz_px, task=task)
    if out.exists() or out.is_symlink():
        _refuse_other(out, parameters)
        return out / "data.yaml"
    with _new_folder(out) as folder:
        for index, split in enumerate(parameters.splits):
            _write_split(folder, split, index, parameters)
        (folder / "data.yaml").write_text(_data_yaml(parameters))
        (folder / MANIFEST).write_text(json.dumps(_manifest(parameters), indent=2) + "\n")
    return out / "data.yaml"


def draw(config: ShapesConfig) -> str:
    """Draw the data set that the settings describe; return the path of its `data.yaml` as a line."""
    parameters = {item.name: getattr(config, item.name) for item in fields(Parameters)}
    return f"{draw_dataset(Path(config.out), **parameters)}\n"


def main(words: Sequence[str] | None = None) -> int:
    """Run this script; returns the exit code."""
    return script("Draw a small data set in YOLO format.", ShapesConfig, draw, words)


if __name__ == "__main__":
    sys.exit(main())
