"""Draw one image of shapes on a cluttered background, with honest labels.

Every shape in the picture has a label, and every label a shape of which enough can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One labelled shape.

    Attributes:
        label: Index into `CLASSES`.
        mask: Its pixels within the frame, whether or not a later shape covers them.
        area_px: Its pixels within and beyond the frame.
        outline: Its vertices in pixels from the frame's corner, some of them beyond the frame. They go once around a
            centre that is within the frame and sees all of them.
    """

    label: int
    mask: Mask
    area_px: int
    outline: Points


# --- outlines: vertices on or within the unit circle -----------------------------------------------------------------


def _ring(angles: Points, radii: float | Points = 1.0) -> Points:
    """Return the points at these angles and radii, shape (n, 2)."""
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _turns(count: int) -> Points:
    """Return `count` equally spaced angles of a full turn."""
    return np.arange(count, dtype=np.float64) * (2 * np.pi / count)


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
    return Shape(
        label=label,
        mask=pixels[margin:-margin, margin:-margin] > 0,
        area_px=int(pixels.sum()),
        outline=vertices - margin + 0.5,  # OpenCV counts from the centre of the first pixel
    )


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
    waves: Canvas = np.sin(y + x + np.float32(phase))
    return waves


def _clouds(rng: np.random.Generator, height: int, width: int, period: float) -> Canvas:
    """Return smooth coloured noise, mostly from -1 to 1, of about one blob every `period` pixels, (h, w, 3)."""
    cells = (int(height / period) + 2, int(width / period) + 2, 3)
    values = rng.uniform(-1, 1, size=cells).astype(np.float32)
    return np.asarray(cv2.resize(values, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.float32)


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
