"""Network inputs: from real images, or drawn when there are none."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.runtimes import Array
from yolo_prune.errors import DataError

_FINEST_PX = 4  # side of the smallest square of noise


def to_input(image: NDArray[np.uint8], imgsz_px: int) -> Array:
    """Turn an image into what a session takes.

    Args:
        image: (H, W, 3), 8 bit, in the channel order that the caller likes: it is the same for all runtimes.
        imgsz_px: Side of the square input. The image is stretched to it: both sides of a comparison see the same one.

    Returns:
        Contiguous float32 (1, 3, imgsz_px, imgsz_px) in [0, 1].

    Raises:
        DataError: The array is not such an image.
    """
    require_image(image)
    resized = cv2.resize(image, (imgsz_px, imgsz_px), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(resized.transpose(2, 0, 1)[None], dtype=np.float32) / np.float32(255)


def require_image(image: NDArray[np.uint8]) -> None:
    """Refuse what is no image as `cv2.imread` returns it.

    Raises:
        DataError: Another type or shape than 8 bit (H, W, 3).
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DataError(
            f"image of type {image.dtype} and shape {image.shape}",
            expected="uint8 and (H, W, 3)",
            remedy="read it with cv2.imread",
        )


def synthetic_images(count: int, imgsz_px: int, *, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Draw `count` deterministic images (imgsz_px, imgsz_px, 3).

    Noise of every scale from 4 px to half the image, each octave weighted alike: flat patches, edges and texture
    excite all strides, which white noise does not.
    """
    random = np.random.default_rng(seed)
    return [_draw(random, imgsz_px) for _ in range(count)]


def _draw(random: np.random.Generator, imgsz_px: int) -> NDArray[np.uint8]:
    """Sum enlarged noise of doubling resolution and stretch it to the 8-bit range."""
    canvas = np.zeros((imgsz_px, imgsz_px, 3), dtype=np.float32)
    side = 2
    while side <= imgsz_px // _FINEST_PX:
        octave = random.standard_normal((side, side, 3)).astype(np.float32)
        canvas += cv2.resize(octave, (imgsz_px, imgsz_px), interpolation=cv2.INTER_NEAREST)
        side *= 2
    low, high = canvas.min(), canvas.max()
    return np.asarray((canvas - low) / max(high - low, 1e-6) * 255, dtype=np.uint8)
