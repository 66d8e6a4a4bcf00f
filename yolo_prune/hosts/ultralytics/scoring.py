"""What slim candidates are worth: mAP on held-out training images after their batch norms were recalibrated.

Source: Li et al., EagleEye, 2020, section 3.3. The images that candidates are scored on are none of those that their
norms are recalibrated on, and none of the split that results are reported on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.models.yolo.obb import OBBValidator
from ultralytics.models.yolo.pose import PoseValidator
from ultralytics.models.yolo.segment import SegmentationValidator

from yolo_prune.errors import DataError
from yolo_prune.hosts.ultralytics.checkpoints import task_of
from yolo_prune.hosts.ultralytics.collection import (
    TrainingImages,
    augmented_images,
    first_batches,
    shuffled,
    training_dataset,
)
from yolo_prune.hosts.ultralytics.networks import bare_copy
from yolo_prune.search import recalibrate

VALIDATORS: dict[str, Any] = {
    "detect": DetectionValidator,
    "segment": SegmentationValidator,
    "pose": PoseValidator,
    "obb": OBBValidator,
}
"""The host's validator of each task."""


class Scorer:
    """Scores slim copies of a model.

    Args:
        model: The dense model.
        images: Training images; `batches` of them recalibrate norms.
        held_out: Fraction of the training images that candidates are scored on.
        seed: Of the choice of these.

    Attributes:
        counts: Images for recalibration and for scoring.

    Raises:
        DataError: The images do not fit the model, or are too few.
        CheckpointError: A task that is pruned only.
    """

    def __init__(self, model: nn.Module, images: TrainingImages, *, held_out: float, seed: int) -> None:
        self._images = images
        dataset = training_dataset(model, images)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        scored = round(held_out * len(dataset))
        if not 0 < scored < len(dataset):
            raise DataError(
                f"held_out={held_out:g} of {len(dataset)} training images leaves {scored} to score candidates on",
                expected="some images to score them on, and some to recalibrate their norms on",
                remedy="another held_out, or more data",
            )
        self.counts = (len(dataset) - scored, scored)
        self._recalibration = shuffled(augmented_images(model, images, order[scored:]), images)
        self._scoring = DataLoader(
            Part(dataset, order[:scored]),
            batch_size=images.batch,
            num_workers=images.workers,
            collate_fn=dataset.collate_fn,
        )

    def score(self, slim: nn.Module, *, recalibrated: bool = True) -> float:
        """Return the mAP50-95 of a slim model, 0 to 1; the mean of boxes and masks, or of boxes and poses.

        Args:
            slim: The candidate; it is left as it is.
            recalibrated: Measure the statistics of its batch norms anew first, as EagleEye does.
        """
        candidate = bare_copy(slim).to(self._images.device)
        if recalibrated:
            self._recalibration.generator.manual_seed(0)  # the same images in the same order for every candidate
            batches = first_batches(self._recalibration, self._images)
            recalibrate(candidate, batches, lambda network, batch: network(batch["img"]))
        return self._map(candidate)

    def _map(self, candidate: Any) -> float:
        images, task = self._images, task_of(candidate)
        settings = {"task": task, "data": str(images.data), "imgsz": images.imgsz_px, "batch": images.batch}
        settings |= {"mode": "val", "split": "train", "plots": False, "verbose": False, "device": images.device}
        with tempfile.TemporaryDirectory() as folder:  # the validator insists on one for its pictures
            validator = VALIDATORS[task](dataloader=self._scoring, save_dir=Path(folder), args=settings)
            validator(model=candidate)
        kinds = [getattr(validator.metrics, name, None) for name in ("box", "seg", "pose")]
        return float(np.mean([kind.map for kind in kinds if kind is not None]))


class Part(Subset[Any]):
    """Some images of a dataset of the host, with what its validators read of one."""

    @property
    def im_files(self) -> list[str]:
        """Paths of the images."""
        dataset: Any = self.dataset
        return [dataset.im_files[index] for index in self.indices]

    @property
    def labels(self) -> list[dict[str, Any]]:
        """Labels of the images."""
        dataset: Any = self.dataset
        return [dataset.labels[index] for index in self.indices]
