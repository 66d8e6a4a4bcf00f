"""Findings drawn into an image with OpenCV."""

from __future__ import annotations

import colorsys
from typing import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.findings import Finding

_VISIBLE = 0.5  # visibility from which on the host draws a key point
_GOLDEN = 0.618034  # multiples of it, modulo 1, spread hues evenly however many classes there are


def draw(image: NDArray[np.uint8], findings: Iterable[Finding]) -> NDArray[np.uint8]:
    """Return a copy of an image (H, W, 3), BGR, with findings drawn into it."""
    canvas = image.copy()
    for one in findings:
        if one.mask is not None:
            canvas[one.mask] = canvas[one.mask] // 2 + np.asarray(_colour(one.class_id), dtype=np.uint8) // 2
    width = max(round(sum(canvas.shape[:2]) / 600), 1)
    for one in findings:
        _draw_box(canvas, one, width)
        _draw_points(canvas, one, width)
    return canvas


def _draw_box(canvas: NDArray[np.uint8], one: Finding, width: int) -> None:
    """Draw the box, rotated where it is, and its label."""
    colour = _colour(one.class_id)
    x1, y1, x2, y2 = (round(at) for at in one.box)
    if one.corners is None:
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, width, cv2.LINE_AA)
    else:
        cv2.polylines(canvas, [np.round(one.corners).astype(np.int32)], True, colour, width, cv2.LINE_AA)
    # OpenCV's fonts have ASCII alone.
    text = f"{one.name.encode('ascii', 'replace').decode()} {one.score:.2f}"
    scale = width / 3
    (text_width, text_height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, width)
    base = max(y1, text_height + below)
    cv2.rectangle(canvas, (x1, base - text_height - below), (x1 + text_width, base), colour, -1)
    cv2.putText(canvas, text, (x1, base - below // 2), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), width)


def _draw_points(canvas: NDArray[np.uint8], one: Finding, width: int) -> None:
    """Draw the key points that are visible."""
    for point in () if one.key_points is None else one.key_points:
        if len(point) < 3 or point[2] > _VISIBLE:
            cv2.circle(canvas, (round(float(point[0])), round(float(point[1]))), 2 * width, _colour(one.class_id), -1)


def _colour(class_id: int) -> tuple[int, int, int]:
    """Return the BGR colour of a class."""
    red, green, blue = colorsys.hsv_to_rgb(class_id * _GOLDEN % 1, 0.9, 0.8)
    return round(blue * 255), round(green * 255), round(red * 255)
