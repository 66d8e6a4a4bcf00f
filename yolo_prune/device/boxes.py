"""Do two networks find the same objects? Detections in, shares out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Tuple

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.runtimes.base import Array

Overlaps = Callable[[Array, Array], NDArray[np.float64]]
"""From detections (n, 6 or more) and (m, 6 or more) to the intersection over union of every pair, (n, m)."""

Rectangle = Tuple[Tuple[float, float], Tuple[float, float], float]
"""A rotated box as OpenCV describes it: centre, size, angle in degrees."""

CONFIDENCE = 0.25
"""Lowest score of a detection that the other side has to find too: what the host's prediction shows."""

ANSWER = 0.5 * CONFIDENCE
"""Lowest score of a detection that counts as finding one: another score is not another object."""


@dataclass(frozen=True)
class BoxAgreement:
    """Which detections of two networks are of the same objects, over all images.

    Attributes:
        iou: Least overlap of two boxes of a class that count as one object.
        expected: Detections of the reference.
        found: Those that the artefact has too.
        answered: Detections of the artefact.
        backed: Those that the reference has too.
    """

    iou: float
    expected: int
    found: int
    answered: int
    backed: int

    @property
    def share(self) -> float:
        """The smaller one of found / expected and backed / answered; 1 where neither side detects anything."""
        pairs = ((self.found, self.expected), (self.backed, self.answered))
        return min((part / whole for part, whole in pairs if whole), default=1.0)


def upright_overlaps(first: Array, second: Array) -> NDArray[np.float64]:
    """Return the overlaps of rows x1, y1, x2, y2, ..., as `detections` returns them; see `Overlaps`."""
    one, other = first[:, None, :4].astype(np.float64), second[None, :, :4].astype(np.float64)
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    common = np.clip(sides, 0, None).prod(axis=2)
    union = sum((box[..., 2:] - box[..., :2]).prod(axis=2) for box in (one, other)) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def rotated_overlaps(first: Array, second: Array) -> NDArray[np.float64]:
    """Return the overlaps of rows x, y, width, height, score, class, angle, as `rotated_detections` returns them.

    The boxes themselves are cut, not their Gaussians: a box turned by a right angle with its sides swapped is the same.
    See `Overlaps`.
    """
    sides = [[_rectangle(row) for row in rows] for rows in (first, second)]
    common = np.array([[_common(one, other) for other in sides[1]] for one in sides[0]]).reshape(
        len(first), len(second)
    )
    areas = [rows[:, 2:4].astype(np.float64).prod(axis=1) for rows in (first, second)]
    union = areas[0][:, None] + areas[1][None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def compare_boxes(
    expected: list[Array], found: list[Array], *, iou: float, overlaps: Overlaps = upright_overlaps
) -> BoxAgreement:
    """Match detections of the same images, one to one, by class and overlap.

    Args:
        expected: The reference's detections above `ANSWER` of every image: (n, 6 or more) four numbers of the box,
            score, class, best first.
        found: The artefact's.
        iou: See `BoxAgreement`.
        overlaps: What the first four numbers mean, and what else a box is made of.
    """
    pairs = list(zip(expected, found))
    return BoxAgreement(
        iou=iou,
        expected=sum(len(_sure(want)) for want, _ in pairs),
        found=sum(_matched(_sure(want), got, iou, overlaps) for want, got in pairs),
        answered=sum(len(_sure(got)) for _, got in pairs),
        backed=sum(_matched(_sure(got), want, iou, overlaps) for want, got in pairs),
    )


def _sure(rows: Array) -> Array:
    """Return the detections that the other side has to find."""
    return rows[rows[:, 4] > CONFIDENCE]


def _matched(wanted: Array, offered: Array, iou: float, overlaps: Overlaps) -> int:
    """Return how many of the wanted detections find a partner of their own; the best choose first."""
    if not len(offered):
        return 0
    left = np.where(wanted[:, None, 5] == offered[None, :, 5], overlaps(wanted, offered), 0)
    count = 0
    for row in left:
        partner = int(row.argmax())
        if row[partner] >= iou:
            left[:, partner] = 0  # taken; the row is a view, and done
            count += 1
    return count


def _rectangle(row: Array) -> Rectangle:
    """Return a rotated box as OpenCV describes it."""
    return (float(row[0]), float(row[1])), (float(row[2]), float(row[3])), float(np.degrees(row[6]))


def _common(one: Rectangle, other: Rectangle) -> float:
    """Return the area that two rectangles share."""
    _, points = cv2.rotatedRectangleIntersection(one, other)
    return 0.0 if points is None else float(cv2.contourArea(cv2.convexHull(points)))
