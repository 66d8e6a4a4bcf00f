"""Rotated boxes: from raw predictions to boxes in the image, as the host's prediction for task obb does it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.detections import Placement
from yolo_prune.device.runtimes.base import Array

_EPSILON = 1e-7  # what the host keeps its roots and logarithms away from zero with
_CANDIDATES = 3_000  # overlaps of all pairs are held at once: 72 MB


def rotated_detections(
    predictions: Array,
    placement: Placement,
    *,
    classes: int,
    end_to_end: bool = False,
    confidence: float = 0.25,
    iou: float = 0.7,
    limit: int = 300,
) -> Array:
    """Choose the rotated boxes that a raw output stands for; see `detections` for the arguments.

    Returns:
        Rows centre x, centre y, width, height in pixels of the image, score, class, angle in radians, best first:
        float32 (n, 7).
    """
    rows = predictions[0] if end_to_end else _rows(predictions, classes)
    rows = rows[rows[:, 4] > confidence]
    rows = rows[np.argsort(-rows[:, 4], kind="stable")][:_CANDIDATES]
    kept = (rows if end_to_end else _suppressed(rows, iou))[:limit]
    moved = kept[:, :4] - [placement.left_px, placement.top_px, 0, 0]
    boxes = moved / ([placement.scale_x, placement.scale_y] * 2)
    return np.concatenate([boxes, kept[:, 4:]], axis=1).astype(np.float32)


def corners(boxes: Array) -> Array:
    """Return the corners (n, 4, 2) of rotated boxes (n, 5): centre x and y, width, height, angle in radians."""
    centre, size, angle = boxes[:, None, :2], boxes[:, None, 2:4] / 2, boxes[:, None, 4:5]
    along = np.concatenate([np.cos(angle), np.sin(angle)], axis=2)
    across = np.concatenate([-np.sin(angle), np.cos(angle)], axis=2)
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]], dtype=boxes.dtype)[None]
    found: Array = centre + signs[..., :1] * size[..., :1] * along + signs[..., 1:] * size[..., 1:] * across
    return found


def _rows(predictions: Array, classes: int) -> Array:
    """Return every anchor (n, 7) with the best of its classes."""
    anchors = predictions[0].T
    scores = anchors[:, 4 : 4 + classes]
    columns = (anchors[:, :4], scores.max(axis=1)[:, None], scores.argmax(axis=1)[:, None], anchors[:, -1:])
    return np.concatenate(columns, axis=1).astype(np.float32)


def _suppressed(rows: Array, iou: float) -> Array:
    """Drop each row that overlaps any better one of its class, itself dropped or not; rows come best first.

    That is the host's Fast NMS (https://arxiv.org/abs/1904.02689), which it uses for rotated boxes.
    """
    overlap = similarity(rows[:, [0, 1, 2, 3, 6]]) > iou
    better = np.triu(overlap & (rows[:, None, 5] == rows[None, :, 5]), k=1)
    kept: Array = rows[~better.any(axis=0)]
    return kept


def similarity(boxes: Array) -> NDArray[np.float64]:
    """Return the probabilistic overlap (n, n) of rotated boxes (n, 5): 1 - Hellinger distance of their Gaussians.

    Source: "Gaussian Bounding Boxes and Probabilistic Intersection-over-Union", https://arxiv.org/abs/2106.06072.
    """
    wide = boxes.astype(np.float64)
    x, y = wide[:, 0], wide[:, 1]
    a, b, c = _covariances(wide)
    a_sum, b_sum, c_sum = (part[:, None] + part[None] for part in (a, b, c))
    dx, dy = x[:, None] - x[None], y[:, None] - y[None]
    determinant = a_sum * b_sum - c_sum**2
    distance = (a_sum * dy**2 + b_sum * dx**2 - 2 * c_sum * dx * dy) / (determinant + _EPSILON) / 4
    own = np.clip(a * b - c**2, 0, None)
    spread = np.log(determinant / (4 * np.sqrt(own[:, None] * own[None]) + _EPSILON) + _EPSILON) / 2
    bhattacharyya = np.clip(distance + spread, _EPSILON, 100.0)
    overlap: NDArray[np.float64] = 1 - np.sqrt(1 - np.exp(-bhattacharyya) + _EPSILON)
    return overlap


def _covariances(boxes: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the variances along x and y and the covariance of the Gaussians that stand for boxes."""
    width, height = boxes[:, 2] ** 2 / 12, boxes[:, 3] ** 2 / 12
    cosine, sine = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    return (
        width * cosine**2 + height * sine**2,
        width * sine**2 + height * cosine**2,
        (width - height) * cosine * sine,
    )
