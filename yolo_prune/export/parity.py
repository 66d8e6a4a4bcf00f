"""Does an exported artefact say the same as PyTorch?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.agreement import (
    Agreement,
    Difference,
    compare_anchors,
    compare_detections,
    compare_entries,
)
from yolo_prune.device.images import synthetic_images, to_input
from yolo_prune.device.runtimes import Array
from yolo_prune.device.runtimes.base import Precision, Session
from yolo_prune.errors import DataError, ParityError
from yolo_prune.export.pytorch_runtime import PyTorchRuntime
from yolo_prune.export.runtimes import runtime_for
from yolo_prune.hosts.ultralytics.inference import task_rows

# Largest allowed difference, as a fraction of the output's scale. Measured at 320 px with yolov8n trained on COCO, on 8
# images of bccd, 8 of COCO and 4 drawn ones: ONNX 9e-6 (boxes) and 1e-5 (scores), NCNN 1e-5 and 1.6e-5; PyTorch's own
# float32 is 3e-6 and 5e-6 away from float64. Untrained v8n, v10n and 26n with recalibrated batch norms reach 4e-4 on
# drawn images; at 64 px, mask coefficients, prototypes, key points, visibility and angles of untrained v8n and 26n
# models differ by at most 6e-5. One filter set to zero, in any of ten layers of the trained model, is off by 2e-2 to
# 5e-1. 16-bit weights are off by 3e-2 in boxes and 2e-2 in scores, so that verdict is a coarse one.
TOLERANCES: Mapping[Precision, float] = {"fp32": 1e-3, "fp16": 5e-2}

_SYNTHETIC_COUNT = 4
_MAX_EXCUSED = 0.5  # if more than half of the detections cannot be judged, nothing was shown


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What a comparison found.

    Attributes:
        artefact: Name of the artefact, without its folder.
        backend: Name of the runtime that ran it.
        precision: How the artefact stores its weights.
        imgsz_px: Side of the square input.
        images: Number of images compared.
        tolerance: Largest allowed `max_rel`.
        agreement: The differences of boxes, scores and what else the task predicts.
    """

    artefact: str
    backend: str
    precision: Precision
    imgsz_px: int
    images: int
    tolerance: float
    agreement: Agreement

    @property
    def max_abs(self) -> float:
        """Largest absolute difference, boxes in pixels and scores in probability alike."""
        return max(part.max_abs for part in self.agreement.parts.values())

    @property
    def max_rel(self) -> float:
        """Largest difference relative to the scale of its kind of row."""
        return max(part.max_rel for part in self.agreement.parts.values())

    @property
    def passed(self) -> bool:
        """Whether all differences are within the tolerance and enough rows were judged."""
        return self.max_rel <= self.tolerance and self.agreement.excused <= _MAX_EXCUSED * self.agreement.rows

    def require(self) -> ParityReport:
        """Return the report itself, or raise `ParityError` if it did not pass."""
        if self.passed:
            return self
        parts = [
            f"{name} by {part.max_abs:.3g} ({part.max_rel:.2e} of the scale)"
            for name, part in self.agreement.parts.items()
        ]
        raise ParityError(
            f"artefact '{self.artefact}' ({self.backend}) differs from PyTorch: {', '.join(parts)}, "
            f"{self.agreement.excused} of {self.agreement.rows} rows tie at the edge of the top-k",
            expected=f"at most {self.tolerance:.0e} of the scale ({self.precision})",
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
        return cls(agreement=Agreement(boxes=boxes, scores=scores, extras=extras, **agreement), **own)


def check_parity(
    reference: Path,
    artefact: Path,
    *,
    imgsz_px: int,
    images: Sequence[NDArray[np.uint8]] | None = None,
    tolerance: float | None = None,
    threads: int = 1,
) -> ParityReport:
    """Compare an artefact's raw decoded predictions with those of the checkpoint that it was exported from.

    The reference runs the same head as the artefact, which for twin heads (v10, 26) the exporter noted in the artefact.

    Args:
        reference: The `.pt` checkpoint.
        artefact: What `runtime_for` accepts.
        imgsz_px: Side of the square input that the artefact was exported for.
        images: 8-bit images (H, W, 3) of any size, read one way for both sides; None draws four. Trained models show
            more on images of their own kind, where something is found.
        tolerance: Largest allowed difference as a fraction of the output's scale; None takes the one of `TOLERANCES`
            for the artefact's precision.
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
    images = synthetic_images(_SYNTHETIC_COUNT, imgsz_px) if images is None else images
    if not images:
        raise DataError("no images", expected="at least one image", remedy="pass None for synthetic ones")
    inputs = [to_input(image, imgsz_px) for image in images]
    runtime = runtime_for(artefact, full_precision=True)
    with runtime.load(artefact, imgsz_px=imgsz_px, threads=threads) as session:
        found, end_to_end, precision = _predict(session, inputs), session.end_to_end, session.precision
    with PyTorchRuntime(end_to_end=end_to_end).load(reference, imgsz_px=imgsz_px, threads=threads) as torch_session:
        expected, rows = _predict(torch_session, inputs), task_rows(torch_session.model)
    _require_comparable(expected, found, artefact.name)
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    agreement = (
        compare_detections(expected[0], found[0], rows, tolerance=tolerance)
        if end_to_end
        else compare_anchors(expected[0], found[0], rows)
    )
    return ParityReport(
        artefact=artefact.name,
        backend=runtime.name,
        precision=precision,
        imgsz_px=imgsz_px,
        images=len(inputs),
        tolerance=tolerance,
        agreement=_with_prototypes(agreement, expected, found),
    )


def _predict(session: Session, inputs: Sequence[Array]) -> list[Array]:
    """Return every output for all inputs, stacked."""
    return [np.concatenate(parts) for parts in zip(*(session(image) for image in inputs), strict=True)]


def _with_prototypes(agreement: Agreement, expected: Sequence[Array], found: Sequence[Array]) -> Agreement:
    """Add the second output, of which masks are made, where there is one."""
    if len(expected) == 1:
        return agreement
    return replace(agreement, extras={**agreement.extras, "prototypes": compare_entries(expected[1], found[1])})


def _require_comparable(expected: Sequence[Array], found: Sequence[Array], artefact: str) -> None:
    """Raise `ParityError` where no difference can be computed."""
    shapes, wanted = ([values.shape for values in outputs] for outputs in (found, expected))
    if shapes != wanted:
        raise ParityError(
            f"artefact '{artefact}' answers with shape {', '.join(map(str, shapes))}",
            expected=f"{', '.join(map(str, wanted))}, as PyTorch does",
            remedy="make sure that the artefact was exported from this checkpoint, with the same imgsz and head",
        )
    for side, outputs in (("PyTorch", expected), (f"artefact '{artefact}'", found)):
        values = np.concatenate([output.ravel() for output in outputs])
        if not np.isfinite(values).all():
            raise ParityError(
                f"{int((~np.isfinite(values)).sum())} of {values.size} outputs of {side} are not finite",
                expected="finite boxes and scores",
                remedy="export without `half` if it was set; otherwise the checkpoint itself is broken",
            )
