"""Does an exported artefact say the same as PyTorch?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.agreement import Agreement, Difference, compare_outputs, require_comparable
from yolo_prune.device.boxes import ANSWER, BoxAgreement, compare_boxes, rotated_overlaps, upright_overlaps
from yolo_prune.device.detections import Placement, detections, letterbox
from yolo_prune.device.images import require_image, synthetic_images
from yolo_prune.device.rotated import rotated_detections
from yolo_prune.device.runtimes import Array
from yolo_prune.device.runtimes.base import Precision, Session
from yolo_prune.errors import DataError, ParityError
from yolo_prune.export.pytorch_runtime import PyTorchRuntime
from yolo_prune.export.runtimes import runtime_for
from yolo_prune.hosts.ultralytics.checkpoints import task_of
from yolo_prune.hosts.ultralytics.inference import task_rows

# Largest allowed difference, as a fraction of the output's scale. Measured at 320 px with yolov8n trained on COCO, on 8
# images of bccd, 8 of COCO and 4 drawn ones: ONNX 9e-6 (boxes) and 1e-5 (scores), NCNN 1e-5 and 1.6e-5; PyTorch's own
# float32 is 3e-6 and 5e-6 away from float64. Untrained v8n, v10n and 26n with recalibrated batch norms reach 4e-4 on
# drawn images; at 64 px, mask coefficients, prototypes, key points, visibility and angles of untrained v8n and 26n
# models differ by at most 6e-5. One filter set to zero, in any of ten layers of the trained model, is off by 2e-2 to
# 5e-1. 16-bit weights are off by 3e-2 in boxes and 2e-2 in scores, so that verdict is a coarse one. Raw outputs of
# 8-bit networks say nothing: single anchors are off by half the scale, and boxes and mAP are hardly touched.
TOLERANCES: Mapping[Precision, float | None] = {"fp32": 1e-3, "fp16": 5e-2, "int8": None}

# Least overlap of two detections of one object, and least share of detections that both sides have. Measured with
# yolov8n trained on COCO at 320 px, 63 detections on 16 images of COCO: all of them in 32 and 16 bit (ONNX, NCNN,
# OpenVINO); in 8 bit 95% to 98%. Of a network with random weights, 8 bit keeps 77%.
BOX_LIMITS: Mapping[Precision, tuple[float, float]] = {"fp32": (0.9, 0.98), "fp16": (0.9, 0.95), "int8": (0.7, 0.85)}

_SYNTHETIC_COUNT = 4
_ANY_BATCH = 2  # images of a call where any number goes: more than one, so that the axis is proven too


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What a comparison found.

    Attributes:
        artefact: Name of the artefact, without its folder.
        backend: Name of the runtime that ran it.
        precision: How the artefact stores its weights.
        imgsz_px: Side of the square input.
        images: Number of images compared.
        tolerance: Largest allowed `max_rel`; None where the raw outputs are not judged (8 bit).
        agreement: The differences of boxes, scores and what else the task predicts.
        boxes: Which detections agree; None on drawn images.
        box_share: Least share of them.
    """

    artefact: str
    backend: str
    precision: Precision
    imgsz_px: int
    images: int
    tolerance: float | None
    agreement: Agreement
    boxes: BoxAgreement | None = None
    box_share: float = 0.0

    @property
    def max_abs(self) -> float:
        """Largest absolute difference, boxes in pixels and scores in probability alike."""
        return self.agreement.max_abs

    @property
    def max_rel(self) -> float:
        """Largest difference relative to the scale of its kind of row."""
        return self.agreement.max_rel

    @property
    def passed(self) -> bool:
        """Whether raw outputs and boxes are within their limits; without a single detection, 8 bit shows nothing."""
        boxes_agree = self.boxes is None or self.boxes.share >= self.box_share
        if self.tolerance is None:
            return self.boxes is not None and self.boxes.expected > 0 and boxes_agree
        return self.agreement.within(self.tolerance) and boxes_agree

    def require(self) -> ParityReport:
        """Return the report itself, or raise `ParityError` if it did not pass."""
        if self.passed:
            return self
        raise self.error()

    def error(self) -> ParityError:
        """Return what to raise for a report that did not pass."""
        parts = [
            f"{name} by {part.max_abs:.3g} ({part.max_rel:.2e} of the scale)"
            for name, part in self.agreement.parts.items()
        ]
        found = f"{self.agreement.excused} of {self.agreement.rows} rows tie at the edge of the top-k"
        wanted = [] if self.tolerance is None else [f"at most {self.tolerance:.0e} of the scale"]
        if self.boxes is not None:
            found += f", {self.boxes.found} of {self.boxes.expected} detections found, {self.boxes.backed} of "
            found += f"{self.boxes.answered} backed"
            wanted.append(f"{self.box_share:.0%} of the detections, at least one, with IoU {self.boxes.iou:g}")
        return ParityError(
            f"artefact '{self.artefact}' ({self.backend}) differs from PyTorch: {', '.join(parts)}, {found}",
            expected=f"{', '.join(wanted) or 'boxes that can be matched'} ({self.precision})",
            remedy="make sure that the artefact was exported from this checkpoint; do not deploy it",
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value; the derived numbers are included for readers."""
        return {**asdict(self), "max_abs": self.max_abs, "max_rel": self.max_rel, "passed": self.passed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ParityReport:
        """Undo `to_json`."""
        own = {key: item for key, item in value.items() if key in cls.__dataclass_fields__}
        agreement = dict(own.pop("agreement"))
        boxes, scores = Difference(**agreement.pop("boxes")), Difference(**agreement.pop("scores"))
        extras = {name: Difference(**part) for name, part in agreement.pop("extras", {}).items()}
        matched = own.pop("boxes", None)
        return cls(
            agreement=Agreement(boxes=boxes, scores=scores, extras=extras, **agreement),
            boxes=None if matched is None else BoxAgreement(**matched),
            **own,
        )


def check_parity(
    reference: Path,
    artefact: Path,
    *,
    imgsz_px: int,
    images: Sequence[NDArray[np.uint8]] | None = None,
    tolerance: float | None = None,
    threads: int = 1,
) -> ParityReport:
    """Compare an artefact's predictions with those of the checkpoint that it was exported from: raw, and as boxes.

    The reference runs the same head as the artefact, which for twin heads (v10, 26) the exporter noted in the artefact.

    Args:
        reference: The `.pt` checkpoint.
        artefact: What `runtime_for` accepts.
        imgsz_px: Side of the square input that the artefact was exported for.
        images: 8-bit images (H, W, 3) of any size, BGR, which are letterboxed; None draws four, on which no boxes are
            compared: nothing is to be found on them, and of equal scores a rounding error suppresses either box.
        tolerance: Largest allowed difference as a fraction of the output's scale; None takes the one of `TOLERANCES`
            for the artefact's precision. `BOX_LIMITS` holds those of the boxes.
        threads: CPU threads for either side.

    Returns:
        The report; nothing is raised for a mere difference: call `require()` on it.

    Raises:
        ConfigError: The artefact is missing, damaged, or made for another input size.
        CheckpointError: The reference cannot be loaded, or lacks the head that was exported.
        DataError: `images` is empty or holds something else.
        MissingDependencyError: The artefact's runtime is not installed.
        ParityError: The outputs cannot be compared: shapes differ, or values are not finite.
    """
    inputs, placements = _inputs(synthetic_images(_SYNTHETIC_COUNT, imgsz_px) if images is None else images, imgsz_px)
    runtime = runtime_for(artefact, full_precision=True)
    with runtime.load(artefact, imgsz_px=imgsz_px, threads=threads) as session:
        found, end_to_end, precision = _predict(session, inputs), session.end_to_end, session.precision
    with PyTorchRuntime(end_to_end=end_to_end).load(reference, imgsz_px=imgsz_px, threads=threads) as torch_session:
        expected, model = _predict(torch_session, inputs), torch_session.model
    rows = task_rows(model)
    require_comparable(
        expected, found, artefact.name, reference="PyTorch",
        of_shape="make sure that the artefact was exported from this checkpoint, with the same imgsz and head",
        of_values="export without `half` if it was set; otherwise the checkpoint itself is broken",
    )  # fmt: skip
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    agreement = compare_outputs(expected, found, rows, end_to_end=end_to_end, tolerance=tolerance or 0.0)
    iou, box_share = BOX_LIMITS[precision]
    boxes = None
    if images is not None:
        sides = [_boxes(side[0], placements, model, end_to_end=end_to_end) for side in (expected, found)]
        overlaps = rotated_overlaps if task_of(model) == "obb" else upright_overlaps
        boxes = compare_boxes(sides[0], sides[1], iou=iou, overlaps=overlaps)
    return ParityReport(
        artefact=artefact.name,
        backend=runtime.name,
        precision=precision,
        imgsz_px=imgsz_px,
        images=len(inputs),
        tolerance=tolerance,
        agreement=agreement,
        boxes=boxes,
        box_share=box_share,
    )


def _inputs(images: Sequence[NDArray[np.uint8]], imgsz_px: int) -> tuple[list[Array], list[Placement]]:
    """Letterbox images; return the inputs, (1, 3, imgsz_px, imgsz_px) each, and where the images lie in them."""
    if not images:
        raise DataError("no images", expected="at least one image", remedy="pass None for synthetic ones")
    for image in images:
        require_image(image)
    inputs, placements = zip(*(letterbox(image, imgsz_px) for image in images), strict=True)
    return list(inputs), list(placements)


def _predict(session: Session, inputs: Sequence[Array]) -> list[Array]:
    """Return every output for all inputs, stacked; a last batch that is too small is filled up with its last image."""
    size = session.batch or _ANY_BATCH
    filled = [*inputs, *[inputs[-1]] * (-len(inputs) % size)]
    batches = [np.concatenate(filled[at : at + size]) for at in range(0, len(filled), size)]
    outputs = [np.concatenate(parts) for parts in zip(*map(session, batches), strict=True)]
    return [values[: len(inputs)] for values in outputs]


def _boxes(raw: Array, placements: Sequence[Placement], model: Any, *, end_to_end: bool) -> list[Array]:
    """Return the detections of every image."""
    classes = len(model.names)
    choose = rotated_detections if task_of(model) == "obb" else detections
    return [
        choose(raw[at : at + 1], placement, classes=classes, end_to_end=end_to_end, confidence=ANSWER)
        for at, placement in enumerate(placements)
    ]
