"""Ranges of activations for int8 in weakly typed networks (up to TensorRT 10): what a calibrator is fed with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Protocol, cast

import numpy as np

from yolo_prune.device.cuda import Stream
from yolo_prune.device.runtimes.base import Array
from yolo_prune.device.tensorrt_recipe import Recipe
from yolo_prune.errors import DataError
from yolo_prune.files import new_file

if TYPE_CHECKING:
    import tensorrt as trt
    from typing_extensions import Buffer


class Images(Protocol):
    """A list, or what reads each one when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Array: ...


@dataclass(frozen=True)
class Calibration:
    """What ranges are measured with.

    Attributes:
        images: Inputs of the network (1, 3, H, W), float32 in [0, 1], letterboxed as they will be (`letterbox`).
        cache: Ranges of an earlier calibration of the same network with the same images, used in their stead where the
            file exists, and written otherwise. None keeps none.
    """

    images: Images
    cache: Path | None = None

    @property
    def existing_cache(self) -> Path | None:
        """The cache, where there is one already."""
        return self.cache if self.cache is not None and self.cache.is_file() else None

    def require_usable(self, batch: int) -> None:
        """Refuse to start without enough images for one batch.

        Raises:
            DataError: There are fewer.
        """
        if self.existing_cache is None and len(self.images) < batch:
            raise DataError(
                f"{len(self.images)} images to calibrate int8 with",
                expected=f"at least {batch}, the batch size; some hundreds of the model's own kind are usual",
                remedy="give more images",
            )

    def batches(self, size: int) -> Iterator[Array]:
        """Yield the images in batches (size, 3, H, W); what is left over is not used."""
        whole = len(self.images) // size * size
        return (np.concatenate([self.images[at + index] for index in range(size)]) for at in range(0, whole, size))


def calibrator(calibration: Calibration, recipe: Recipe, stream: Stream) -> trt.IInt8Calibrator:
    """Return what TensorRT calibrates with: the second entropy calibrator, the one that the DLA supports too.

    Args:
        calibration: Images and cache.
        recipe: For the batch size.
        stream: Holds the batch on the GPU.
    """
    import tensorrt as trt

    batches = calibration.batches(recipe.batch)

    class Calibrator(trt.IInt8EntropyCalibrator2):
        """Hands out one batch after the other."""

        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self) -> int:
            return recipe.batch

        def get_batch(self, names: list[str]) -> list[int]:
            batch = next(batches, None)
            if batch is None:
                return cast("list[int]", None)  # ends the calibration; its types do not know that
            address = stream.upload(names[0], batch)
            stream.wait()
            return [address]

        def read_calibration_cache(self) -> Buffer | None:
            cache = calibration.existing_cache
            return cache.read_bytes() if cache else None

        def write_calibration_cache(self, cache: Buffer) -> None:
            if calibration.cache is not None:
                with new_file(calibration.cache, replace=True) as temporary:
                    temporary.write_bytes(cache)

    return Calibrator()
