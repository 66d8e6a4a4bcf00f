"""Calibration images as quantizers read them: in batches, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from yolo_prune.device.runtimes import Array


def in_batches(images: Sequence[Array], size: int) -> list[Array]:
    """Stack images (1, 3, H, W) to (size, 3, H, W); the last batch is filled up with the first images."""
    starts = range(0, len(images), size)
    return [np.concatenate([images[(start + at) % len(images)] for at in range(size)]) for start in starts]


class Feeds:
    """Hands inputs to the calibration of ONNX Runtime; `get_next` is the protocol of its `CalibrationDataReader`."""

    def __init__(self, name: str, inputs: Iterable[Array]) -> None:
        """Take the name of the graph's input and what it shall get."""
        self._name, self._rest = name, iter(inputs)

    def get_next(self) -> dict[str, Array] | None:
        """Return the next feed; None after the last."""
        batch = next(self._rest, None)
        return None if batch is None else {self._name: batch}
