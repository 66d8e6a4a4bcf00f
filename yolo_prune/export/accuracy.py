"""Does an exported artefact find what PyTorch finds, measured as mAP on a split?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolo_prune.device.runtimes.base import Precision
from yolo_prune.hosts.ultralytics.evaluation import Evaluation, evaluate_artefact

LOSS_LIMITS: Mapping[Precision, float] = {"fp32": 0.005, "fp16": 0.005, "int8": 0.03}
"""Most mAP50-95 that an artefact may lose against its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """mAP50-95 of a checkpoint and of an artefact of it, on the same square inputs.

    Attributes:
        split: Split of the data.
        images: Number of images.
        pytorch: Of the checkpoint's boxes.
        artefact: Of the artefact's boxes.
        losses: pytorch - artefact by kind of prediction: box, and mask or pose where the task has them.
        limit: Most that may be lost.
    """

    split: str
    images: int
    pytorch: float
    artefact: float
    losses: Mapping[str, float]
    limit: float

    @property
    def passed(self) -> bool:
        """Whether no kind of prediction lost more than allowed."""
        return max(self.losses.values()) <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value; the verdict is included for readers."""
        return {**asdict(self), "passed": self.passed}


def measure_accuracy(artefact: Path, reference: Evaluation, *, task: str, data: Path, precision: Precision) -> Accuracy:
    """Measure mAP of an artefact beside that of its checkpoint.

    Args:
        artefact: What the host's validator reads.
        reference: mAP of the checkpoint, measured with `square=True`.
        task: Of the model.
        data: Data yaml.
        precision: Chooses the limit.

    Raises:
        DataError: The host cannot evaluate it.
    """
    found = evaluate_artefact(artefact, task=task, data=data, split=reference.split, imgsz_px=reference.imgsz_px)
    return compare_accuracy(reference, found, precision=precision)


def compare_accuracy(reference: Evaluation, found: Evaluation, *, precision: Precision) -> Accuracy:
    """Compare two evaluations of the same images."""
    losses = {"box": reference.map50_95 - found.map50_95}
    for kind in ("mask", "pose"):
        before, after = getattr(reference, kind), getattr(found, kind)
        if before is not None and after is not None:
            losses[kind] = before.map50_95 - after.map50_95
    return Accuracy(
        split=reference.split,
        images=reference.images,
        pytorch=reference.map50_95,
        artefact=found.map50_95,
        losses=losses,
        limit=LOSS_LIMITS[precision],
    )
