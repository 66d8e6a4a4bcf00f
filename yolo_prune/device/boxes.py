"""Do two networks find the same objects? Detections in, shares out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.runtimes.base import Array

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


def compare_boxes(expected: list[Array], found: list[Array], *, iou: float) -> BoxAgreement:
    """Match detections of the same images, one to one, by class and overlap.

    Args:
        expected: The reference's detections above `ANSWER` of every image, as `detections` returns them: (n, 6 or more)
            x1, y1, x2, y2, score, class, best first.
        found: The artefact's.
        iou: See `BoxAgreement`.
    """
    pairs = list(zip(expected, found))
    return BoxAgreement(
        iou=iou,
        expected=sum(len(_sure(want)) for want, _ in pairs),
        found=sum(_matched(_sure(want), got, iou) for want, got in pairs),
        answered=sum(len(_sure(got)) for _, got in pairs),
        backed=sum(_matched(_sure(got), want, iou) for want, got in pairs),
    )


def _sure(rows: Array) -> Array:
    """Return the detections that the other side has to find."""
    return rows[rows[:, 4] > CONFIDENCE]


def _matched(wanted: Array, offered: Array, iou: float) -> int:
    """Return how many of the wanted detections find a partner of their own; the best choose first."""
    if not len(offered):
        return 0
    overlaps = np.where(wanted[:, None, 5] == offered[None, :, 5], _overlaps(wanted, offered), 0)
    count = 0
    for row in overlaps:
        partner = int(row.argmax())
        if row[partner] >= iou:
            overlaps[:, partner] = 0  # taken; the row is a view, and done
            count += 1
    return count


def _overlaps(first: Array, second: Array) -> NDArray[np.float64]:
    """Return the intersection over union of every pair of boxes, (n, m)."""
    one, other = first[:, None, :4].astype(np.float64), second[None, :, :4].astype(np.float64)
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    common = np.clip(sides, 0, None).prod(axis=2)
    union = sum((box[..., 2:] - box[..., :2]).prod(axis=2) for box in (one, other)) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)
