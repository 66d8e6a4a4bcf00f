"""How far two decoded outputs of the same model are apart: arrays in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from yolo_prune.export.runtimes import Array

# Smallest scales that errors are divided by. One pixel; and a score that no detector would act on: an untrained head
# scores everything below it, where the noise floor of ONNX Runtime's sigmoid (2.6e-8, measured) is already visible.
_BOX_FLOOR_PX = 1.0
_SCORE_FLOOR = 1e-3
_OTHER_CLASS = 1e6  # cost that no difference of boxes and scores reaches


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest difference among rows of one kind.

    Attributes:
        max_abs: In pixels for boxes, in probability for scores.
        scale: Peak magnitude of the expected rows, in the same unit.
    """

    max_abs: float
    scale: float

    @property
    def max_rel(self) -> float:
        """The largest difference as a fraction of the output's own scale."""
        return self.max_abs / self.scale


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two outputs compared.

    Attributes:
        boxes: Difference of the box rows.
        scores: Difference of the score rows.
        rows: Anchors or detections compared, over all images.
        excused: Detections among them whose boxes do not count, being at the edge of the top-k.
    """

    boxes: Difference
    scores: Difference
    rows: int
    excused: int = 0


def compare_anchors(expected: Array, found: Array) -> Agreement:
    """Compare outputs (B, 4 + classes, anchors) entry by entry; their shapes must be equal."""
    gap = np.abs(expected.astype(np.float64) - found)
    boxes, scores = expected[:, :4], expected[:, 4:]
    return Agreement(
        boxes=Difference(max_abs=float(gap[:, :4].max()), scale=_peak(boxes, _BOX_FLOOR_PX)),
        scores=Difference(max_abs=float(gap[:, 4:].max()), scale=_peak(scores, _SCORE_FLOOR)),
        rows=expected.shape[0] * expected.shape[2],
    )


def compare_detections(expected: Array, found: Array, *, tolerance: float) -> Agreement:
    """Compare outputs (B, k, 6) of end-to-end heads, rows x1, y1, x2, y2, score, class; their shapes must be equal.

    The rows are the k best of all (anchor, class) pairs in order of score, and that order is not continuous: a rounding
    error swaps two rows of nearly equal score, and at the edge of the top-k one row replaces another. So
    - scores are compared sorted: order statistics never differ by more than the scores themselves do, so nothing need
      be forgiven;
    - boxes are compared between rows matched one to one by class, box and score (an assignment problem), and a pair
      that differs by more than `tolerance` is excused if both rows score within `tolerance` of the lowest that got in:
      these may be different anchors, and both right. The number of excused rows is part of the result.

    Args:
        expected: The reference's output.
        found: The artefact's output.
        tolerance: What counts as equal, as a fraction of the scale.
    """
    box_scale = _peak(expected[..., :4], _BOX_FLOOR_PX)
    score_scale = _peak(expected[..., 4], _SCORE_FLOOR)
    box_gap, excused = 0.0, 0
    for want, got in zip(expected.astype(np.float64), found.astype(np.float64), strict=True):
        gaps, at_edge = _match(want, got, box_scale, score_scale, tolerance)
        forgiven = at_edge & (gaps > tolerance * box_scale)
        box_gap = max(box_gap, float(gaps[~forgiven].max(initial=0.0)))
        excused += int(forgiven.sum())
    score_gap = np.abs(np.sort(expected[..., 4].astype(np.float64)) - np.sort(found[..., 4])).max()
    return Agreement(
        boxes=Difference(max_abs=box_gap, scale=box_scale),
        scores=Difference(max_abs=float(score_gap), scale=score_scale),
        rows=expected.shape[0] * expected.shape[1],
        excused=excused,
    )


def _match(
    want: NDArray[np.float64], got: NDArray[np.float64], box_scale: float, score_scale: float, tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Pair the detections (k, 6) of one image.

    Returns:
        For every pair: the largest difference of the four coordinates in pixels (the whole scale if the classes
        differ), and whether both rows score at the edge of the top-k.
    """
    box_gaps = np.abs(want[:, None, :4] - got[None, :, :4]).max(axis=2)
    score_gaps = np.abs(want[:, None, 4] - got[None, :, 4])
    same_class = want[:, None, 5] == got[None, :, 5]
    rows, columns = linear_sum_assignment(
        box_gaps / box_scale + score_gaps / score_scale + np.where(same_class, 0.0, _OTHER_CLASS)
    )
    edge = max(want[:, 4].min(), got[:, 4].min())
    at_edge = np.maximum(want[rows, 4], got[columns, 4]) <= edge + tolerance * max(edge, _SCORE_FLOOR)
    return np.where(same_class[rows, columns], box_gaps[rows, columns], box_scale), at_edge


def _peak(values: Array, floor: float) -> float:
    """Return the largest magnitude, at least `floor`."""
    return max(float(np.abs(values).max()), floor)
