"""Draw a small object-detection data set: shapes on cluttered backgrounds, in YOLO format, always the same for a seed.

    python datasets/shapes.py out=DIR [seed=0] [train=384] [val=96] [test=96] [imgsz_px=192]

Four classes (disc, square, triangle, star) of any hue, rotation and a wide range of sizes cover each other in part
and lie among crosses and strokes that carry no label. It needs no download, and a detector learns it from random
weights in minutes, yet not perfectly: small and half hidden shapes stay hard.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_prune.errors import ConfigError, OutputError, YoloPruneError
from yolo_prune.files import cannot_write, parent_folders

Points = NDArray[np.float64]  # (n, 2): x, y
Mask = NDArray[np.bool_]  # (side, side)
Canvas = NDArray[np.float32]  # (height, width, 3), about 0 to 255
Image = NDArray[np.uint8]  # (side, side, 3)
Colour = NDArray[np.float32]  # (3,), 0 to 255
Box = tuple[float, float, float, float]  # x centre, y centre, width, height as fractions of the side

MIN_VISIBLE = 0.35  # of a shape's own area; below that not even people agree on what it is
SHAPES_PER_IMAGE = (3, 9)  # first included, last not
RADIUS = (0.07, 0.28)  # of the image's side; drawn log-uniformly, so that every octave of size is as common
TRIES_PER_SHAPE = 4
JPEG_QUALITY = 92
MANIFEST = "shapes.json"
FORMAT = 1  # raise it when the same parameters would draw other files
USAGE = "python datasets/shapes.py out=DIR [seed=0] [train=384] [val=96] [test=96] [imgsz_px=192]"


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What the files of a data set depend on, and nothing else.

    Attributes:
        seed: Any integer from 0; the same seed draws the same files.
        train: Number of images to train on.
        val: Number of images to validate on.
        test: Number of images that no choice has seen.
        imgsz_px: Side of the square images, in pixels.

    Raises:
        ConfigError: A value is out of range.
    """

    seed: int = field(default=0, metadata={"least": 0})
    train: int = field(default=384, metadata={"least": 1})
    val: int = field(default=96, metadata={"least": 1})
    test: int = field(default=96, metadata={"least": 1})
    imgsz_px: int = field(default=192, metadata={"least": 64})  # the smallest shape still covers a few pixels

    def __post_init__(self) -> None:
        for item in fields(self):
            value, least = getattr(self, item.name), item.metadata["least"]
            if value < least:
                raise ConfigError(f"{item.name}={value}", expected=f"an integer from {least} on", remedy=USAGE)

    @property
    def splits(self) -> dict[str, int]:
        """Number of images by split."""
        return {"train": self.train, "val": self.val, "test": self.test}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One labelled shape.

    Attributes:
        label: Index into `CLASSES`.
        mask: Its pixels within the frame, whether or not a later shape covers them.
        area_px: Its pixels within and beyond the frame.
    """

    label: int
    mask: Mask
    area_px: int


# --- outlines: vertices on or within the unit circle -----------------------------------------------------------------


def _ring(angles: Points, radii: float | Points = 1.0) -> Points:
    """Return the points at these angles and radii, shape (n, 2)."""
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _turns(count: int) -> Points:
    """Return `count` equally spaced angles of a full turn."""
    return np.arange(count) * (2 * np.pi / count)


def disc(rng: np.random.Generator) -> Points:
    """Return a circle, or an ellipse that is close to one."""
    return _ring(_turns(64)) * [1.0, rng.uniform(0.75, 1.0)]


def square(rng: np.random.Generator) -> Points:
    """Return a square, or a rectangle that is close to one."""
    return _ring(_turns(4) + np.pi / 4) * [1.0, rng.uniform(0.75, 1.0)]


def triangle(rng: np.random.Generator) -> Points:
    """Return a triangle whose corners are moved a little."""
    return _ring(_turns(3) + rng.uniform(-0.15, 0.15, size=3))


def star(rng: np.random.Generator) -> Points:
    """Return a star of five rays."""
    return _ring(_turns(10), np.tile([1.0, rng.uniform(0.38, 0.5)], 5))


CLASSES: dict[str, Callable[[np.random.Generator], Points]] = {
    "disc": disc,
    "square": square,
    "triangle": triangle,
    "star": star,
}


# --- shapes ----------------------------------------------------------------------------------------------------------


def _rotated(points: Points, angle: float) -> Points:
    """Return the points turned about the origin by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform between those of `low` and `high`."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def random_shape(rng: np.random.Generator, side: int) -> Shape:
    """Draw class, size, rotation and place of a shape, most of which lies within the frame."""
    label = int(rng.integers(len(CLASSES)))
    radius = side * _log_uniform(rng, *RADIUS)
    outline = _rotated(list(CLASSES.values())[label](rng), rng.uniform(0, 2 * np.pi))
    margin = int(np.ceil(radius)) + 1  # room for the part beyond the frame, so that its area can be counted
    pixels = np.zeros((side + 2 * margin, side + 2 * margin), np.uint8)
    vertices = outline * radius + rng.uniform(radius / 2, side - radius / 2, size=2) + margin
    cv2.fillPoly(pixels, [np.rint(vertices * 16).astype(np.int32)], 1, shift=4)
    return Shape(label=label, mask=pixels[margin:-margin, margin:-margin] > 0, area_px=int(pixels.sum()))


def bounds(mask: Mask) -> tuple[slice, slice]:
    """Return the rows and columns of the tight box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def box(mask: Mask) -> Box:
    """Return the tight box around a mask that is not empty; a pixel is one unit wide."""
    rows, columns = bounds(mask)
    height, width = mask.shape
    return (
        (columns.start + columns.stop) / 2 / width,
        (rows.start + rows.stop) / 2 / height,
        (columns.stop - columns.start) / width,
        (rows.stop - rows.start) / height,
    )


def visible_fractions(shapes: Sequence[Shape]) -> list[float]:
    """Return how much of each shape can be seen when they are painted in this order."""
    covered = np.zeros_like(shapes[0].mask) if shapes else np.zeros((0, 0), np.bool_)
    fractions = []
    for shape in reversed(shapes):
        fractions.append(float((shape.mask & ~covered).sum() / shape.area_px))
        covered = covered | shape.mask
    return fractions[::-1]


def place_shapes(rng: np.random.Generator, side: int) -> list[Shape]:
    """Draw shapes in the order in which they are to be painted.

    A candidate that would be, or would leave an earlier one, less than `MIN_VISIBLE` visible is dropped and never
    painted: every shape in the picture has a label and every label a shape to be seen.
    """
    shapes: list[Shape] = []
    wanted = int(rng.integers(*SHAPES_PER_IMAGE))
    for _ in range(wanted * TRIES_PER_SHAPE):
        candidate = [*shapes, random_shape(rng, side)]
        if min(visible_fractions(candidate)) >= MIN_VISIBLE:
            shapes = candidate
        if len(shapes) == wanted:
            break
    return shapes


# --- painting --------------------------------------------------------------------------------------------------------


def _colour(rng: np.random.Generator) -> Colour:
    """Draw any colour."""
    return rng.uniform(0, 255, size=3).astype(np.float32)


def _muted_colour(rng: np.random.Generator) -> Colour:
    """Draw a colour that is close to grey."""
    return (rng.uniform(50, 205) + rng.uniform(-25, 25, size=3)).astype(np.float32)


def _vivid_colour(rng: np.random.Generator) -> Colour:
    """Draw a colour that is far from grey: one channel is low, one is high, one is anything."""
    levels = np.array([rng.uniform(0, 70), rng.uniform(0, 255), rng.uniform(185, 255)])
    return rng.permutation(levels).astype(np.float32)


def _ramp(rng: np.random.Generator, height: int, width: int, period: float) -> Canvas:
    """Return values from -1 to 1 that rise and fall in a random direction, once every `period` pixels, (h, w, 1)."""
    angle, phase = rng.uniform(0, 2 * np.pi, size=2)
    y = np.arange(height, dtype=np.float32)[:, None, None] * np.float32(2 * np.pi / period * np.sin(angle))
    x = np.arange(width, dtype=np.float32)[:, None] * np.float32(2 * np.pi / period * np.cos(angle))
    return np.sin(y + x + np.float32(phase))


def _clouds(rng: np.random.Generator, height: int, width: int, period: float) -> Canvas:
    """Return smooth coloured noise, mostly from -1 to 1, of about one blob every `period` pixels, (h, w, 3)."""
    cells = (int(height / period) + 2, int(width / period) + 2, 3)
    return cv2.resize(rng.uniform(-1, 1, size=cells).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)


def texture(rng: np.random.Generator, height: int, width: int, side: int) -> Canvas:
    """Return a gradient, clouds and sometimes stripes, about -80 to 80, to be added to a colour."""
    surface = 30 * _ramp(rng, height, width, side * rng.uniform(1.6, 5))
    surface = surface + 25 * _clouds(rng, height, width, side * rng.uniform(0.04, 0.3))
    if rng.random() < 0.3:
        surface += np.float32(rng.uniform(10, 35)) * _ramp(rng, height, width, side * rng.uniform(0.06, 0.25))
    return surface


def _cross(rng: np.random.Generator, side: int) -> Points:
    """Return a cross somewhere in the frame: about as large as a shape, but none of the classes."""
    arm, reach = rng.uniform(0.15, 0.35), side * _log_uniform(rng, *RADIUS)
    corner = np.array([[1, arm], [arm, arm], [arm, 1], [-arm, 1], [-arm, arm], [-1, arm]])
    return _rotated(np.concatenate([corner, -corner]), rng.uniform(0, np.pi)) * reach + rng.uniform(0, side, size=2)


def _stroke(rng: np.random.Generator, side: int) -> Points:
    """Return a straight or bent line across a part of the frame."""
    start, middle, end = rng.uniform(-0.2, 1.2, size=(3, 1, 2)) * side
    t = np.linspace(0, 1, 24)[:, None]
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end


def clutter(rng: np.random.Generator, canvas: Canvas) -> None:
    """Paint crosses and strokes, none of which has a label, onto `canvas`."""
    side = canvas.shape[0]
    for _ in range(rng.integers(0, 4)):
        cv2.fillPoly(canvas, [np.rint(_cross(rng, side)).astype(np.int32)], _colour(rng).tolist())
    for _ in range(rng.integers(1, 6)):
        thickness = int(rng.integers(1, max(2, side // 40) + 1))
        cv2.polylines(canvas, [np.rint(_stroke(rng, side)).astype(np.int32)], False, _colour(rng).tolist(), thickness)


def paint(rng: np.random.Generator, canvas: Canvas, shape: Shape) -> None:
    """Paint a shape onto `canvas`, calmer than a background and in a stronger colour."""
    part = bounds(shape.mask)
    mask, target = shape.mask[part], canvas[part]  # a view: what is painted on it is painted on the canvas
    height, width = mask.shape
    target[mask] = (_vivid_colour(rng) + 0.5 * texture(rng, height, width, canvas.shape[0]))[mask]


def photograph(rng: np.random.Generator, canvas: Canvas) -> Image:
    """Return the canvas as a middling camera would see it: a little blurred and noisy."""
    blurred = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.0))
    noisy = blurred + np.float32(rng.uniform(2, 10)) * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def draw_image(rng: np.random.Generator, side: int) -> tuple[Image, list[Shape]]:
    """Draw one image and return it with its labelled shapes."""
    canvas = _muted_colour(rng) + texture(rng, side, side, side)
    clutter(rng, canvas)
    shapes = place_shapes(rng, side)
    for shape in shapes:
        paint(rng, canvas, shape)
    return photograph(rng, canvas), shapes


# --- files -----------------------------------------------------------------------------------------------------------


def _label_line(shape: Shape) -> str:
    """Return a line of a YOLO label file: class, then the box."""
    return " ".join([str(shape.label), *(f"{value:.6f}" for value in box(shape.mask))])


def _write_split(root: Path, split: str, index: int, parameters: Parameters) -> None:
    """Write images and labels of one split; every image has its own stream of random numbers."""
    images, labels = root / "images" / split, root / "labels" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for number in range(parameters.splits[split]):
        image, shapes = draw_image(np.random.default_rng([parameters.seed, index, number]), parameters.imgsz_px)
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        (images / f"{number:05d}.jpg").write_bytes(encoded.tobytes())
        (labels / f"{number:05d}.txt").write_text("".join(f"{_label_line(shape)}\n" for shape in shapes))


def _data_yaml(splits: Sequence[str]) -> str:
    """Return the description that the host reads; without `path:` its folders are relative to the file."""
    folders = [f"{split}: images/{split}" for split in splits]
    names = [f"  {number}: {name}" for number, name in enumerate(CLASSES)]
    return "\n".join([*folders, f"nc: {len(CLASSES)}", "names:", *names, ""])


def _manifest(parameters: Parameters) -> dict[str, Any]:
    """Return what `MANIFEST` says about a data set of these parameters."""
    return {"drawn_by": "datasets/shapes.py", "format": FORMAT, **asdict(parameters)}


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


def draw_dataset(out: Path, *, seed: int, train: int, val: int, test: int, imgsz_px: int) -> Path:
    """Draw a data set, or leave it as it is if it stands there complete.

    Args:
        out: Folder to make: `images/`, `labels/`, `data.yaml` and a manifest. It appears complete or not at all.
        seed: Any integer from 0; the same seed draws the same files.
        train: Number of images to train on.
        val: Number of images to validate on.
        test: Number of images that no choice has seen.
        imgsz_px: Side of the square images, in pixels.

    Returns:
        The path of its `data.yaml`.

    Raises:
        ConfigError: A value is out of range.
        OutputError: Something else stands at `out`, or it cannot be written.
    """
    parameters = Parameters(seed=seed, train=train, val=val, test=test, imgsz_px=imgsz_px)
    if out.exists() or out.is_symlink():
        _refuse_other(out, parameters)
        return out / "data.yaml"
    with _new_folder(out) as folder:
        for index, split in enumerate(parameters.splits):
            _write_split(folder, split, index, parameters)
        (folder / "data.yaml").write_text(_data_yaml(list(parameters.splits)))
        (folder / MANIFEST).write_text(json.dumps(_manifest(parameters), indent=2) + "\n")
    return out / "data.yaml"


# --- command line ----------------------------------------------------------------------------------------------------


def _integer(key: str, text: str) -> int:
    """Return the integer that `text` spells."""
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{key}={text}", expected="an integer", remedy=USAGE) from None


def parse_arguments(arguments: Sequence[str]) -> tuple[Path, Parameters]:
    """Read `key=value` arguments.

    Raises:
        ConfigError: A key is unknown, `out` is missing, or a value is no integer in range.
    """
    known = ["out", *(item.name for item in fields(Parameters))]
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ConfigError(
                f"unknown key '{key}'", expected=f"one of {', '.join(known)}", remedy=f"mean '{nearest}'?"
            )
        if not (equals and value):
            raise ConfigError(f"'{argument}' has no value", expected=f"{key}=VALUE", remedy=USAGE)
        values[key] = value
    if "out" not in values:
        raise ConfigError("key 'out' is missing", expected="the folder to make", remedy=USAGE)
    out = Path(values.pop("out"))
    return out, Parameters(**{key: _integer(key, value) for key, value in values.items()})


def main(arguments: Sequence[str]) -> int:
    """Draw the data set that the arguments describe; return the exit code."""
    try:
        out, parameters = parse_arguments(arguments)
        print(draw_dataset(out, **asdict(parameters)))
    except YoloPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
