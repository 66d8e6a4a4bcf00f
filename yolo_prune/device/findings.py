"""From a network's raw outputs to what is found in an image, whatever the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.bundle import Network
from yolo_prune.device.detections import Placement, detections
from yolo_prune.device.masks import masks_in_image, outline
from yolo_prune.device.rotated import corners, rotated_detections
from yolo_prune.device.runtimes.base import Array


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth
class Finding:
    """One object in an image; all coordinates in pixels of the image.

    Attributes:
        class_id: Its class.
        name: The class's name.
        score: Between 0 and 1.
        box: x1, y1, x2, y2, upright; of a rotated box, the upright one around it.
        corners: (4, 2); task obb only.
        key_points: (k, 2), or (k, 3) with the visibility last; task pose only.
        mask: (H, W); task segment only.
    """

    class_id: int
    name: str
    score: float
    box: tuple[float, float, float, float]
    corners: Array | None = None
    key_points: Array | None = None
    mask: NDArray[np.bool_] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values: pixels to two digits, scores to four, a mask by its outline."""
        value: dict[str, Any] = {
            "class": self.class_id,
            "name": self.name,
            "score": round(self.score, 4),
            "box": [round(at, 2) for at in self.box],
        }
        for key, points in (("corners", self.corners), ("key_points", self.key_points)):
            if points is not None:
                value[key] = np.round(points.astype(np.float64), 2).tolist()
        if self.mask is not None:
            value["outline"] = outline(self.mask).tolist()
        return value


def find(
    outputs: Sequence[Array], placement: Placement, network: Network, *, confidence: float, iou: float
) -> list[Finding]:
    """Read the outputs for one image.

    Args:
        outputs: What a session returned.
        placement: What `letterbox` returned for the image.
        network: What the outputs mean.
        confidence: Lowest score that counts.
        iou: Overlap above which the lower one of two boxes of a class goes.

    Returns:
        The best first.
    """
    choose = rotated_detections if network.task == "obb" else detections
    rows = choose(
        outputs[0],
        placement,
        classes=len(network.classes),
        end_to_end=network.end_to_end,
        confidence=confidence,
        iou=iou,
    )
    boxes, more = _of_task(rows, outputs, placement, network)
    found = [
        Finding(
            class_id=int(row[5]),
            name=network.classes[int(row[5])],
            score=float(row[4]),
            box=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
            **extra,
        )
        for row, box, extra in zip(rows, boxes, more)
    ]
    return [one for one in found if one.mask is None or one.mask.any()]  # the host drops empty masks too


def _of_task(
    rows: Array, outputs: Sequence[Array], placement: Placement, network: Network
) -> tuple[Array, list[dict[str, Any]]]:
    """Return upright boxes (n, 4) and what else the task knows of each row."""
    if network.task == "obb":
        points = corners(rows[:, [0, 1, 2, 3, 6]])
        return np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1), [{"corners": one} for one in points]
    if network.task == "pose":
        return rows, [{"key_points": one} for one in _key_points(rows[:, 6:], placement, network)]
    if network.task == "segment":
        masks = masks_in_image(outputs[1], rows[:, 6:], rows[:, :4], placement, network.imgsz_px)
        return rows, [{"mask": one} for one in masks]
    return rows, [{} for _ in rows]


def _key_points(extras: Array, placement: Placement, network: Network) -> Array:
    """Return key points (n, k, 2 or 3), their places in pixels of the image and inside of it."""
    values = 3 if "visibility" in network.extras else 2
    points = extras.reshape(len(extras), extras.shape[1] // values, values).copy()
    for axis, (shift, scale, limit) in enumerate(
        (
            (placement.left_px, placement.scale_x, placement.width_px),
            (placement.top_px, placement.scale_y, placement.height_px),
        )
    ):
        points[..., axis] = np.clip((points[..., axis] - shift) / scale, 0, limit)
    return points
