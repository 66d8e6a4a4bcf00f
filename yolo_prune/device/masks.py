"""Masks of task segment: from prototypes and coefficients to pixels of the image, as the host's prediction does it."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.detections import Placement
from yolo_prune.device.runtimes.base import Array


def masks_in_image(
    prototypes: Array, coefficients: Array, boxes: Array, placement: Placement, imgsz_px: int
) -> list[NDArray[np.bool_]]:
    """Return the mask (H, W) of every detection, in pixels of the image and inside its box.

    Args:
        prototypes: Second output for one image: (1, masks, h, w).
        coefficients: (n, masks).
        boxes: (n, 4), x1, y1, x2, y2 in pixels of the image.
        placement: What `letterbox` returned for the image.
        imgsz_px: Side of the input.
    """
    logits = np.tensordot(coefficients, prototypes[0], axes=1)
    scale, shift = [placement.scale_x, placement.scale_y] * 2, [placement.left_px, placement.top_px] * 2
    return [
        _mask(np.ascontiguousarray(one), box, placement, imgsz_px) for one, box in zip(logits, boxes * scale + shift)
    ]


def outline(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return the outline (n, 2) of the largest connected part of a mask, in pixels; empty for an empty mask."""
    found: Any = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    contours = found[-2]  # OpenCV 3 returns the image first
    if not contours:
        return np.zeros((0, 2), dtype=np.int32)
    return np.asarray(max(contours, key=cv2.contourArea), dtype=np.int32).reshape(-1, 2)


def _mask(logits: Array, box: NDArray[np.floating[Any]], placement: Placement, imgsz_px: int) -> NDArray[np.bool_]:
    """Enlarge one mask to the input, cut it to its box, and take it into the image."""
    enlarged = cv2.resize(logits, (imgsz_px, imgsz_px), interpolation=cv2.INTER_LINEAR) > 0
    at = np.arange(imgsz_px)
    inside = ((at >= box[1]) & (at < box[3]))[:, None] & ((at >= box[0]) & (at < box[2]))[None]
    height, width = (
        round(placement.height_px * placement.scale_y),
        round(placement.width_px * placement.scale_x),
    )
    top, left = placement.top_px, placement.left_px
    cut = (enlarged & inside)[top : top + height, left : left + width].astype(np.uint8)
    size = (placement.width_px, placement.height_px)
    return np.asarray(cv2.resize(cut, size, interpolation=cv2.INTER_NEAREST), dtype=np.bool_)
