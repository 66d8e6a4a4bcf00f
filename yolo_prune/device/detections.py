"""From an image to a network's input, and from its raw predictions to boxes in that image: numpy and OpenCV alone.

The steps and their numbers are the host's, so that a device finds what `YOLO(...).predict` finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.runtimes.base import Array

_GREY = (114, 114, 114)  # what the host pads with, in training too
_CANDIDATES = 30_000  # suppression is quadratic in the worst case; the host stops at as many


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the network's input.

    Attributes:
        scale_x: Width in the input / width of the image.
        scale_y: Height in the input / height of the image.
        left_px: Padding on its left.
        top_px: Padding above it.
        width_px: The image's width.
        height_px: The image's height.
    """

    scale_x: float
    scale_y: float
    left_px: int
    top_px: int
    width_px: int
    height_px: int

    def undo(self, boxes: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Return boxes (n, 4), x1, y1, x2, y2 in pixels of the input, in pixels of the image, inside of it."""
        moved = (boxes - [self.left_px, self.top_px] * 2) / ([self.scale_x, self.scale_y] * 2)
        limits = [self.width_px, self.height_px] * 2
        return np.clip(moved, 0, np.asarray(limits, dtype=moved.dtype))


def letterbox(image: NDArray[np.uint8], imgsz_px: int) -> tuple[Array, Placement]:
    """Fit an image into the square input of a network, its proportions kept.

    Args:
        image: (H, W, 3), 8 bit, BGR as OpenCV reads it.
        imgsz_px: Side of the input.

    Returns:
        The input, contiguous float32 (1, 3, imgsz_px, imgsz_px), RGB in [0, 1], and where the image lies in it.
    """
    height, width = image.shape[:2]
    scale = min(imgsz_px / height, imgsz_px / width)
    inner_height, inner_width = max(round(height * scale), 1), max(round(width * scale), 1)
    if (inner_height, inner_width) != (height, width):
        image = cv2.resize(image, (inner_width, inner_height), interpolation=cv2.INTER_LINEAR)  # type: ignore[assignment]
    # An odd pixel of padding goes to the right and below.
    left, top = (imgsz_px - inner_width) // 2, (imgsz_px - inner_height) // 2
    right, below = imgsz_px - inner_width - left, imgsz_px - inner_height - top
    padded = cv2.copyMakeBorder(image, top, below, left, right, cv2.BORDER_CONSTANT, value=_GREY)
    tensor = np.ascontiguousarray(padded[..., ::-1].transpose(2, 0, 1)[None], dtype=np.float32) / np.float32(255)
    return tensor, Placement(inner_width / width, inner_height / height, left, top, width, height)


def detections(
    predictions: Array,
    placement: Placement,
    *,
    classes: int,
    end_to_end: bool = False,
    confidence: float = 0.25,
    iou: float = 0.7,
    limit: int = 300,
) -> Array:
    """Choose the boxes that a raw output stands for.

    Args:
        predictions: Output for one image: (1, 4 + classes + extras, anchors), or (1, k, 6 + extras) of an end-to-end
            head; see `Session`.
        placement: What `letterbox` returned for the image.
        classes: Number of classes.
        end_to_end: Which of the two it is.
        confidence: Lowest score that counts.
        iou: Overlap above which the lower one of two boxes of a class goes; end-to-end heads need none.
        limit: Most detections.

    Returns:
        Rows x1, y1, x2, y2 in pixels of the image, score, class, then what else the task predicts as the network gave
        it (in pixels of the input), best first: float32 (n, 6 + extras).
    """
    rows = (
        predictions[0][predictions[0][:, 4] > confidence]
        if end_to_end
        else _candidates(predictions, classes, confidence)
    )
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    kept = rows[:limit] if end_to_end else _suppressed(rows[:_CANDIDATES], iou)[:limit]
    return np.concatenate([placement.undo(kept[:, :4]), kept[:, 4:]], axis=1).astype(np.float32)


def _candidates(predictions: Array, classes: int, confidence: float) -> Array:
    """Return rows (n, 6 + extras) of the anchors whose best class scores above a threshold, boxes by their corners."""
    anchors = predictions[0].T
    scores = anchors[:, 4 : 4 + classes]
    best = scores.argmax(axis=1)
    score = scores[np.arange(len(scores)), best]
    at = score > confidence
    centre, half = anchors[at, :2], anchors[at, 2:4] / 2
    columns = (centre - half, centre + half, score[at, None], best[at, None], anchors[at, 4 + classes :])
    return np.concatenate(columns, axis=1).astype(np.float32)


def _suppressed(rows: Array, iou: float) -> Array:
    """Drop each row that overlaps a better one of its class; rows come best first.

    Written out, since OpenCV's suppression by class is younger than the OpenCV of JetPack 5.
    """
    corners, areas = rows[:, :4], (rows[:, 2:4] - rows[:, :2]).prod(axis=1)
    alive, kept = np.arange(len(rows)), []
    while alive.size:
        first, rest = alive[0], alive[1:]
        kept.append(first)
        lower, upper = (
            np.maximum(corners[first, :2], corners[rest, :2]),
            np.minimum(corners[first, 2:], corners[rest, 2:]),
        )
        common = np.clip(upper - lower, 0, None).prod(axis=1)
        same = rows[rest, 5] == rows[first, 5]
        with np.errstate(invalid="ignore"):  # two boxes without an area: the comparison is false
            alive = rest[~(same & (common / (areas[first] + areas[rest] - common) > iou))]
    return rows[kept]
