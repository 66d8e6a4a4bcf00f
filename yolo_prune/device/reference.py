"""Does an artefact say on this device what PyTorch said where the bundle was made?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.agreement import Agreement, compare_outputs, require_comparable
from yolo_prune.device.bundle import Bundle
from yolo_prune.device.detections import letterbox
from yolo_prune.device.findings import Finding, find
from yolo_prune.device.runtimes import Array, Runtime, runtime_for
from yolo_prune.device.runtimes.base import Session
from yolo_prune.device.sources import read_image
from yolo_prune.errors import ConfigError

# A reference detection counts if it scores that much above the threshold: whether one at the threshold is found is a
# matter of rounding. Half precision moves scores of a trained yolov8n by 2e-2 (see TOLERANCES of export/parity.py).
_MARGIN = 0.1
_SAME_OBJECT = 0.5  # overlap of boxes, as COCO counts
_FOUND_AGAIN = 0.9  # share of the detections that count, either way: 8-bit weights lose a few, a broken artefact more


@dataclass(frozen=True)
class Verdict:
    """What the comparison of one artefact found.

    Attributes:
        artefact: Its name.
        backend: The runtime that ran it.
        version: The runtime's version.
        precision: How the artefact stores its weights.
        tolerance: Largest difference of raw outputs that is allowed, as a fraction of their scale; None where the
            precision has none, and the detections alone decide.
        agreement: Raw outputs compared, the runtime computing in full precision where it can.
        expected: Detections of the reference that count.
        found_again: How many of them were found as the artefact is deployed, with the runtime's default precision.
        answered: Detections of the artefact, as it is deployed, that count.
        backed: How many of them the reference has too.
    """

    artefact: str
    backend: str
    version: str
    precision: str
    tolerance: float | None
    agreement: Agreement
    expected: int
    found_again: int
    answered: int
    backed: int

    @property
    def max_rel(self) -> float:
        """Largest difference relative to the scale of its kind of row."""
        return self.agreement.max_rel

    @property
    def passed(self) -> bool:
        """Whether raw outputs and detections both agree; where only detections are judged, there must be some."""
        again = self.found_again >= _FOUND_AGAIN * self.expected and self.backed >= _FOUND_AGAIN * self.answered
        if self.tolerance is None:
            return again and self.expected > 0
        return again and self.agreement.within(self.tolerance)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        parts = {name: part.max_rel for name, part in self.agreement.parts.items()}
        own = {name: value for name, value in vars(self).items() if name != "agreement"}
        return {**own, "max_rel": self.max_rel, "parts": parts, "passed": self.passed}


def compare_with_reference(bundle: Bundle, artefact: Path, *, threads: int) -> Verdict:
    """Run an artefact on the reference images.

    Args:
        bundle: Holds the reference.
        artefact: What `runtime_for` accepts: the bundle's own, or an engine that was built from it.
        threads: CPU threads of the runtime.

    Raises:
        ConfigError: The artefact or the reference is damaged.
        MissingDependencyError: The artefact's runtime is not installed.
        ParityError: The outputs cannot be compared: shapes differ, or values are not finite.
    """
    proving, deployed = runtime_for(artefact, full_precision=True), runtime_for(artefact)
    images = [read_image(bundle.folder / name) for name in bundle.reference.images]
    inputs = [letterbox(image, bundle.network.imgsz_px) for image in images]
    tensors = [tensor for tensor, _ in inputs]
    found, precision = _run(proving, artefact, bundle, tensors, threads)
    expected = read_outputs(bundle.folder / bundle.reference.outputs)
    require_comparable(
        expected, found, artefact.name, reference="the reference", of_shape="build or copy it again",
        of_values="build the engine in fp32, or make the bundle without half",
    )  # fmt: skip
    network, tolerance = bundle.network, bundle.tolerances.get(precision)
    agreement = compare_outputs(
        expected, found, network.extras, end_to_end=network.end_to_end, tolerance=tolerance or 1.0
    )
    as_deployed = found if deployed == proving else _run(deployed, artefact, bundle, tensors, threads)[0]
    seen = [
        [one.to_json() for one in _findings(as_deployed, index, bundle, placement)]
        for index, (_, placement) in enumerate(inputs)
    ]
    pairs = list(zip(bundle.reference.detections, seen))
    again = [count_found_again(wanted, offered, bundle.reference.confidence) for wanted, offered in pairs]
    backed = [count_found_again(wanted, offered, bundle.reference.confidence) for offered, wanted in pairs]
    return Verdict(
        artefact=artefact.name,
        backend=proving.name,
        version=proving.version(),
        precision=precision,
        tolerance=tolerance,
        agreement=agreement,
        expected=sum(due for due, _ in again),
        found_again=sum(found for _, found in again),
        answered=sum(due for due, _ in backed),
        backed=sum(found for _, found in backed),
    )


def count_found_again(
    wanted: Sequence[Mapping[str, Any]], offered: Sequence[Mapping[str, Any]], confidence: float
) -> tuple[int, int]:
    """Count the detections of one side that the other has to have, and those that it has: same class, IoU >= 0.5.

    Args:
        wanted: Of the one side, as `Finding.to_json` gives them.
        offered: Of the other, at the same threshold.
        confidence: That threshold.
    """
    due = [one for one in wanted if one["score"] >= confidence + _MARGIN]
    left = list(offered)
    again = 0
    for one in due:
        same = [other for other in left if other["class"] == one["class"]]
        best = max(same, key=lambda other: overlap(one["box"], other["box"]), default=None)
        if best is not None and overlap(one["box"], best["box"]) >= _SAME_OBJECT:
            left.remove(best)
            again += 1
    return len(due), again


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the intersection over union of two upright boxes x1, y1, x2, y2."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - common
    return common / union if union > 0 else 0.0


def read_outputs(file: Path) -> list[Array]:
    """Read the reference outputs.

    Raises:
        ConfigError: They cannot be read.
    """
    try:
        with np.load(str(file)) as stored:
            return [stored[name] for name in sorted(stored.files)]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"cannot read '{file}': {error}", expected="the reference outputs of the bundle", remedy="copy it again"
        ) from error


def _run(
    runtime: Runtime, artefact: Path, bundle: Bundle, inputs: Sequence[Array], threads: int
) -> tuple[list[Array], str]:
    """Return every output, stacked over the images, and the artefact's precision."""
    with runtime.load(artefact, imgsz_px=bundle.network.imgsz_px, threads=threads) as session:
        return stacked(session, inputs), session.precision


def stacked(session: Session, inputs: Sequence[Array]) -> list[Array]:
    """Return every output of a session for all inputs, stacked."""
    return [np.concatenate(parts) for parts in zip(*(session(tensor) for tensor in inputs))]


def _findings(outputs: Sequence[Array], index: int, bundle: Bundle, placement: Any) -> list[Finding]:
    """Return what the outputs find in one of the images."""
    one: list[NDArray[np.float32]] = [output[index : index + 1] for output in outputs]
    reference = bundle.reference
    return find(one, placement, bundle.network, confidence=reference.confidence, iou=reference.iou)
