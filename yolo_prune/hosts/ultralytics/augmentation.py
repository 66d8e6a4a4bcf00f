"""Training images as a model was trained on them, which is what its channels and its batch norms are good for.

A mosaic shows objects at half their size beside grey borders. Letterboxed images have other means and variances: norms
that were measured on them cost a detector 0.05 mAP that nothing was cut from, and gradients of a loss that was never
minimised rank channels worse (README has the figures).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset
from ultralytics.data.augment import Albumentations, BaseMixTransform, Mosaic

from yolo_prune.hosts.randomness import seeded

AUGMENTATION = (
    "hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr", "bgr",
    "mosaic", "mixup", "cutmix", "copy_paste", "copy_paste_mode",
)  # fmt: skip
"""Training keys of the host that say how images are augmented."""


class AugmentedImages(Dataset[dict[str, Any]]):
    """Some images of a dataset of the host, augmented; each is the same whoever loads it, and in whatever order.

    Args:
        dataset: The host's, made for training; its mosaics are made of the same images from now on.
        indices: Which of its images; all others stay unseen.
    """

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self._dataset, self._indices = dataset, indices
        self.collate_fn = dataset.collate_fn
        # A library that is not everywhere, with random numbers of its own; the host uses it for one image in a hundred.
        dataset.transforms.transforms = [t for t in dataset.transforms.transforms if not isinstance(t, Albumentations)]
        for transform in _parts_of(dataset.transforms):
            if isinstance(transform, BaseMixTransform):
                transform.dataset = self
            if isinstance(transform, Mosaic):
                transform.buffer_enabled = False  # of the images that this process happened to load before

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with seeded(index):
            image: dict[str, Any] = self._dataset.transforms(self.get_image_and_label(index))
        return image

    def get_image_and_label(self, index: int) -> dict[str, Any]:
        """Return an image before augmentation, as the host's mosaics ask for it."""
        found: dict[str, Any] = self._dataset.get_image_and_label(self._indices[index])
        return found


def _parts_of(transform: Any) -> Iterator[Any]:
    yield transform
    for part in (*getattr(transform, "transforms", ()), getattr(transform, "pre_transform", None)):
        if part is not None:
            yield from _parts_of(part)
