"""The whole way from an image to boxes, in three stages that are timed apart: letterbox, forward, suppression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.detections import Placement, detections, letterbox
from yolo_prune.device.images import synthetic_images
from yolo_prune.device.runtimes.base import Array, Session
from yolo_prune.device.timings import LatencySummary, Stage

Images = Sequence["NDArray[np.uint8]"]
_DRAWN_WIDTH_PX, _DRAWN_HEIGHT_PX = 1280, 720


@dataclass(frozen=True)
class ImageToBoxes:
    """Times of the whole way in milliseconds, one a round in each stage.

    Attributes:
        pre_ms: Letterbox: 8-bit images in their own size to the network's input.
        forward_ms: The network.
        post_ms: Threshold, suppression and back into the image.
    """

    pre_ms: tuple[float, ...]
    forward_ms: tuple[float, ...]
    post_ms: tuple[float, ...]

    @property
    def latencies_ms(self) -> tuple[float, ...]:
        """The three stages together, one a round."""
        return tuple(sum(parts) for parts in zip(self.pre_ms, self.forward_ms, self.post_ms))

    @property
    def summary(self) -> dict[str, LatencySummary]:
        """Order statistics of each stage and of all three together."""
        stages = {"pre": self.pre_ms, "forward": self.forward_ms, "post": self.post_ms, "total": self.latencies_ms}
        return {name: LatencySummary.of(times_ms) for name, times_ms in stages.items()}


def stages(session: Session, imgsz_px: int) -> list[Stage]:
    """Return the three stages: images (H, W, 3), 8 bit, BGR -> inputs -> raw outputs -> detections.

    An artefact that does not name its classes is taken for a detector, whose rows behind the box are classes.
    """

    def pre(images: Images) -> tuple[Array, list[Placement]]:
        placed = [letterbox(image, imgsz_px) for image in images]
        inputs = [tensor for tensor, _ in placed]
        return inputs[0] if len(inputs) == 1 else np.concatenate(inputs), [placement for _, placement in placed]

    def forward(given: tuple[Array, list[Placement]]) -> tuple[Array, list[Placement]]:
        return session(given[0])[0], given[1]

    def post(given: tuple[Array, list[Placement]]) -> list[Any]:
        predictions, placements = given
        classes = session.classes or predictions.shape[1] - 4
        return [
            detections(predictions[at : at + 1], placement, classes=classes, end_to_end=session.end_to_end)
            for at, placement in enumerate(placements)
        ]

    return [pre, forward, post]


def drawn_image() -> NDArray[np.uint8]:
    """Draw an image of a camera's size. How long suppression takes depends on what is found: a real one says more."""
    return synthetic_images(1, _DRAWN_WIDTH_PX)[0][:_DRAWN_HEIGHT_PX]
