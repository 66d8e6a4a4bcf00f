"""How far two decoded outputs of the same model are apart: arrays in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Mapping, Sequence  # Python 3.8 cannot subscript those of collections.abc

import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.runtimes import Array
from yolo_prune.errors import ParityError

# Smallest scales that errors are divided by. One pixel; and a score that no detector would act on: an untrained head
# scores everything below it, where the noise floor of ONNX Runtime's sigmoid (2.6e-8, measured) is already visible.
_BOX_FLOOR_PX = 1.0
_SCORE_FLOOR = 1e-3
_EXTRA_FLOORS = {"key_points": _BOX_FLOOR_PX}  # the other extras are coefficients, probabilities and radians
_OTHER_CLASS = 1e6  # cost that no difference of boxes and scores reaches
_MAX_EXCUSED = 0.5  # if more than half of the detections cannot be judged, nothing was shown

Extras = Mapping[str, Sequence[int]]
"""Which of the rows behind box and scores hold what, counted from 0: `task_rows` of the host. Empty for detection."""


@dataclass(frozen=True)
class Difference:
    """The largest difference among rows of one kind.

    Attributes:
        max_abs: In pixels for boxes and key points, in probability for scores and visibility, in radians for angles.
        scale: Peak magnitude of the expected rows, in the same unit.
    """

    max_abs: float
    scale: float

    @property
    def max_rel(self) -> float:
        """The largest difference as a fraction of the output's own scale."""
        return self.max_abs / self.scale


@dataclass(frozen=True)
class Agreement:
    """Two outputs compared.

    Attributes:
        boxes: Difference of the box rows.
        scores: Difference of the score rows.
        rows: Anchors or detections compared, over all images.
        excused: Detections among them whose boxes do not count, being at the edge of the top-k.
        extras: What else the task predicts, by name: mask coefficients and prototypes, key points and their visibility,
            or angles. Empty for detection.
    """

    boxes: Difference
    scores: Difference
    rows: int
    excused: int = 0
    extras: dict[str, Difference] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Difference]:
        """Every difference by its name."""
        return {"boxes": self.boxes, "scores": self.scores, **self.extras}

    @property
    def max_abs(self) -> float:
        """Largest absolute difference, boxes in pixels and scores in probability alike."""
        return max(part.max_abs for part in self.parts.values())

    @property
    def max_rel(self) -> float:
        """Largest difference relative to the scale of its kind of row."""
        return max(part.max_rel for part in self.parts.values())

    def within(self, tolerance: float) -> bool:
        """Return whether no difference is larger, and enough rows could be judged."""
        return self.max_rel <= tolerance and self.excused <= _MAX_EXCUSED * self.rows


def compare_outputs(
    expected: Sequence[Array], found: Sequence[Array], extras: Extras, *, end_to_end: bool, tolerance: float
) -> Agreement:
    """Compare raw outputs, stacked over images: boxes, scores and what else the task predicts.

    Args:
        expected: The reference's outputs: the predictions, and of a segmenter the prototypes of its masks.
        found: The artefact's, of the same shapes; see `require_comparable`.
        extras: What the predictions hold behind box and scores.
        end_to_end: They are those of a head with a top-k.
        tolerance: See `compare_detections`.
    """
    agreement = (
        compare_detections(expected[0], found[0], extras, tolerance=tolerance)
        if end_to_end
        else compare_anchors(expected[0], found[0], extras)
    )
    if len(expected) == 1:
        return agreement
    return replace(agreement, extras={**agreement.extras, "prototypes": compare_entries(expected[1], found[1])})


def require_comparable(
    expected: Sequence[Array], found: Sequence[Array], artefact: str, *, reference: str, of_shape: str, of_values: str
) -> None:
    """Refuse outputs whose difference cannot be computed.

    Args:
        expected: The reference's outputs.
        found: The artefact's.
        artefact: Its name.
        reference: What the reference is called.
        of_shape: What to do about other shapes.
        of_values: What to do about values that are not finite.

    Raises:
        ParityError: Their shapes differ, or values are not finite.
    """
    shapes, wanted = ([values.shape for values in outputs] for outputs in (found, expected))
    if shapes != wanted:
        raise ParityError(
            f"artefact '{artefact}' answers with shape {', '.join(map(str, shapes))}",
            expected=f"{', '.join(map(str, wanted))}, as {reference}",
            remedy=of_shape,
        )
    for side, outputs in ((reference, expected), (f"artefact '{artefact}'", found)):
        wrong = sum(int((~np.isfinite(values)).sum()) for values in outputs)
        if wrong:
            raise ParityError(
                f"{wrong} of {sum(values.size for values in outputs)} outputs of {side} are not finite",
                expected="finite boxes and scores",
                remedy=of_values,
            )


def compare_anchors(expected: Array, found: Array, extras: Extras | None = None) -> Agreement:
    """Compare outputs (B, 4 + classes + extras, anchors) entry by entry; their shapes must be equal."""
    extras = extras or {}
    first = expected.shape[1] - _count(extras)

    def difference(rows: slice | Sequence[int], floor: float) -> Difference:
        return compare_entries(expected[:, rows], found[:, rows], floor=floor)

    return Agreement(
        boxes=difference(slice(0, 4), _BOX_FLOOR_PX),
        scores=difference(slice(4, first), _SCORE_FLOOR),
        rows=expected.shape[0] * expected.shape[2],
        extras={name: difference([first + row for row in rows], _floor(name)) for name, rows in extras.items()},
    )


def compare_entries(expected: Array, found: Array, *, floor: float = _SCORE_FLOOR) -> Difference:
    """Compare arrays of equal shape entry by entry.

    Args:
        expected: The reference's output.
        found: The artefact's output.
        floor: Smallest scale, in the unit of the entries.
    """
    return Difference(max_abs=float(np.abs(expected.astype(np.float64) - found).max()), scale=_peak(expected, floor))


def compare_detections(expected: Array, found: Array, extras: Extras | None = None, *, tolerance: float) -> Agreement:
    """Compare outputs (B, k, 6 + extras) of end-to-end heads, whose shapes must be equal.

    A row is x1, y1, x2, y2 (x, y, width, height for rotated boxes), score, class, and what else the task predicts.

    The rows are the k best of all (anchor, class) pairs in order of score, and that order is not continuous: a rounding
    error swaps two rows of nearly equal score, and at the edge of the top-k one row replaces another. So
    - scores are compared sorted: order statistics never differ by more than the scores themselves do, so nothing need
      be forgiven;
    - boxes and extras are compared between rows matched one to one by class, box and score (an assignment problem), and
      a pair that differs by more than `tolerance` is excused if both rows score within `tolerance` of the lowest that
      got in: these may be different anchors, and both right. The number of excused rows is part of the result.

    Args:
        expected: The reference's output.
        found: The artefact's output.
        extras: What the columns behind the class hold.
        tolerance: What counts as equal, as a fraction of the scale.
    """
    columns = {"boxes": [0, 1, 2, 3], **{name: [6 + row for row in rows] for name, rows in (extras or {}).items()}}
    scales = {name: _peak(expected[..., at], _floor(name)) for name, at in columns.items()}
    score_scale = _peak(expected[..., 4], _SCORE_FLOOR)
    worst, excused = dict.fromkeys(columns, 0.0), 0
    for want, got in zip(expected.astype(np.float64), found.astype(np.float64)):
        rows, partners, at_edge = _match(want, got, scales["boxes"], score_scale, tolerance)
        same_class = want[rows, 5] == got[partners, 5]
        gaps = {
            name: np.where(same_class, np.abs(want[rows][:, at] - got[partners][:, at]).max(axis=1), scales[name])
            for name, at in columns.items()
        }
        forgiven = at_edge & np.any([gap > tolerance * scales[name] for name, gap in gaps.items()], axis=0)
        worst = {name: max(worst[name], float(gap[~forgiven].max(initial=0.0))) for name, gap in gaps.items()}
        excused += int(forgiven.sum())
    differences = {name: Difference(max_abs=worst[name], scale=scales[name]) for name in columns}
    return Agreement(
        boxes=differences.pop("boxes"),
        scores=compare_entries(np.sort(expected[..., 4]), np.sort(found[..., 4])),
        rows=expected.shape[0] * expected.shape[1],
        excused=excused,
        extras=differences,
    )


def _match(
    want: NDArray[np.float64], got: NDArray[np.float64], box_scale: float, score_scale: float, tolerance: float
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
    """Pair the detections (k, 6 + extras) of one image.

    Returns:
        For every pair: the row in `want`, the row in `got`, and whether both score at the edge of the top-k.
    """
    box_gaps = np.abs(want[:, None, :4] - got[None, :, :4]).max(axis=2)
    score_gaps = np.abs(want[:, None, 4] - got[None, :, 4])
    same_class = want[:, None, 5] == got[None, :, 5]
    from scipy.optimize import linear_sum_assignment  # only heads with a top-k need it, and a device may lack it

    rows, columns = linear_sum_assignment(
        box_gaps / box_scale + score_gaps / score_scale + np.where(same_class, 0.0, _OTHER_CLASS)
    )
    edge = max(want[:, 4].min(), got[:, 4].min())
    at_edge = np.maximum(want[rows, 4], got[columns, 4]) <= edge + tolerance * max(edge, _SCORE_FLOOR)
    return rows, columns, at_edge


def _count(extras: Extras) -> int:
    """Return the number of rows that the extras take."""
    return sum(len(rows) for rows in extras.values())


def _floor(name: str) -> float:
    """Return the smallest scale of boxes or of an extra."""
    return _BOX_FLOOR_PX if name == "boxes" else _EXTRA_FLOORS.get(name, _SCORE_FLOOR)


def _peak(values: Array, floor: float) -> float:
    """Return the largest magnitude, at least `floor`."""
    return max(float(np.abs(values).max()), floor)
