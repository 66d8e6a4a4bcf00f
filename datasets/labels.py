"""Labels of drawn shapes, one function a task: the numbers behind the class in a line of a YOLO label file."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from drawing import Mask, Points, Shape, box

Label = list[float]  # coordinates are fractions of the side

KEY_POINTS = ("top", "right", "bottom", "left")
"""The outermost points of a shape: corners and tips, and defined for a disc as well, whatever its rotation."""

DESCRIPTIONS = {
    # Key points are x, y and visibility. A mirror image swaps left and right.
    "pose": [f"kpt_shape: [{len(KEY_POINTS)}, 3]", "flip_idx: [0, 3, 2, 1]"],
}
"""Lines of the data yaml that a task needs besides the class names."""


def within_frame(outline: Points, side: int) -> Points:
    """Return the part of an outline that lies within the frame, (n, 2).

    Exact for shapes that are seen whole from a centre within the frame, as ours are (Sutherland and Hodgman 1974).

    Args:
        outline: Vertices in pixels.
        side: Side of the frame, in pixels.
    """
    for axis, sign, limit in ((0, -1, 0), (0, 1, side), (1, -1, 0), (1, 1, side)):
        outline = _cut(outline, sign * (limit - outline[:, axis]))
    return outline


def _cut(outline: Points, inside: Points) -> Points:
    """Cut an outline along a straight line; `inside` is each vertex's distance from it, negative beyond it."""
    kept = []
    for number, (point, here) in enumerate(zip(outline, inside, strict=True)):
        before, there = outline[number - 1], inside[number - 1]
        if (here < 0) != (there < 0):
            kept.append(before + (point - before) * there / (there - here))
        if here >= 0:
            kept.append(point)
    return np.array(kept)


def bounding_box(shape: Shape, _covered: Mask) -> Label:
    """Return x centre, y centre, width, height of the shape's pixels."""
    return list(box(shape.mask))


def polygon(shape: Shape, _covered: Mask) -> Label:
    """Return x, y of every vertex of the part within the frame; what later shapes cover belongs to it."""
    side = len(shape.mask)
    return [float(value) for value in (within_frame(shape.outline, side) / side).flat]


def pose(shape: Shape, covered: Mask) -> Label:
    """Return the box, then x, y, visibility of every key point: 2 seen, 1 covered, 0 beyond the frame (x = y = 0)."""
    return [*box(shape.mask), *(value for point in extremes(shape.outline) for value in _key_point(point, covered))]


def extremes(outline: Points) -> list[Points]:
    """Return the points (2,) of an outline in the order of `KEY_POINTS`."""
    x, y = outline.T
    return [outline[index] for index in (y.argmin(), x.argmax(), y.argmax(), x.argmin())]


def _key_point(point: Points, covered: Mask) -> Label:
    x, y = (float(value) / len(covered) for value in point)
    if not (0 <= x < 1 and 0 <= y < 1):
        return [0.0, 0.0, 0.0]
    return [x, y, 1.0 if covered[int(point[1]), int(point[0])] else 2.0]


def rotated_box(shape: Shape, _covered: Mask) -> Label:
    """Return x, y of the four corners of the smallest rotated box around the part within the frame.

    Where that box sticks out of the frame it is the upright one: the host refuses corners beyond the frame.
    """
    side = len(shape.mask)
    inside = within_frame(shape.outline, side)
    corners = cv2.boxPoints(cv2.minAreaRect(inside.astype(np.float32))) / side
    if corners.min() < 0 or corners.max() > 1:
        (left, top), (right, bottom) = inside.min(axis=0) / side, inside.max(axis=0) / side
        corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    return [float(value) for value in corners.flat]


LABELS: dict[str, Callable[[Shape, Mask], Label]] = {
    "detect": bounding_box,
    "segment": polygon,
    "pose": pose,
    "obb": rotated_box,
}
"""Functions of a shape and the pixels (side, side) that later shapes cover, by the host's name of the task."""


def label_lines(shapes: list[Shape], task: str) -> list[str]:
    """Return the lines of a YOLO label file for shapes in the order in which they were painted."""
    lines = []
    covered = np.zeros_like(shapes[0].mask) if shapes else np.zeros((0, 0), np.bool_)
    for shape in reversed(shapes):
        label = LABELS[task](shape, covered)
        lines.append(" ".join([str(shape.label), *(f"{value:.6f}" for value in label)]))
        covered = covered | shape.mask
    return lines[::-1]
