"""Where an artefact comes from and what was proved of it, written into the artefact itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from yolo_prune import __version__
from yolo_prune.device.onnx_facts import PROVENANCE
from yolo_prune.device.runtimes.base import Precision
from yolo_prune.errors import ConfigError
from yolo_prune.export.metadata import read_metadata, write_metadata
from yolo_prune.hosts.slim import MARKER, Checkpoint
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.plan import cost_at

ENTRY = PROVENANCE
"""Key of the artefact's metadata."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What an artefact carries about itself.

    Attributes:
        version: Of yolo_prune that made it.
        checkpoint_sha256: Hash of the checkpoint that was exported.
        lineage: Hashes of the checkpoints that one was made from, the oldest first.
        plan_sha256: Hash of the plan that cut it, as JSON with sorted keys; None if no plan did.
        choice: How that plan was chosen: criterion, target and so on.
        macs: Multiply-adds of one image of `imgsz_px`, before quantization.
        params: Parameters.
        imgsz_px: Side of the square input.
        precision: How it stores its weights.
        calibration_images: Images that an 8-bit artefact was calibrated with.
        parity: What `ParityReport.to_json` returns; None until it was compared.
        accuracy: What `Accuracy.to_json` returns; None where mAP was not measured.
    """

    version: str
    checkpoint_sha256: str
    lineage: tuple[str, ...]
    plan_sha256: str | None
    choice: Mapping[str, Any]
    macs: int
    params: int
    imgsz_px: int
    precision: Precision
    calibration_images: int = 0
    parity: Mapping[str, Any] | None = None
    accuracy: Mapping[str, Any] | None = None

    @property
    def verified(self) -> bool:
        """Whether it was compared with PyTorch, and agreed in all that was compared."""
        compared = [part for part in (self.parity, self.accuracy) if part is not None]
        return self.parity is not None and all(part["passed"] for part in compared)


def provenance_of(source: Checkpoint, *, imgsz_px: int, precision: Precision, calibration_images: int) -> Provenance:
    """Return what an artefact of a checkpoint tells before it was compared."""
    marker = getattr(source.model, MARKER, {})
    plan = marker.get("plan")
    graph = trace_model(source.model)
    cost = cost_at(graph, graph.widths(), imgsz_px)
    return Provenance(
        version=__version__,
        checkpoint_sha256=source.sha256,
        lineage=(*marker.get("lineage", ()), *filter(None, [marker.get("source_sha256")])),
        plan_sha256=_hash(plan) if plan else None,
        choice=plan["choice"] if plan else {},
        macs=cost.macs,
        params=cost.params,
        imgsz_px=imgsz_px,
        precision=precision,
        calibration_images=calibration_images,
    )


def write_provenance(artefact: Path, provenance: Provenance) -> None:
    """Write, or renew, what an artefact tells about itself.

    Raises:
        ConfigError: The artefact is damaged.
        OutputError: It cannot be written.
    """
    write_metadata(artefact, {ENTRY: asdict(provenance)})


def read_provenance(artefact: Path) -> Provenance:
    """Read what an artefact tells about itself.

    Raises:
        ConfigError: It is missing or damaged, or was not exported by yolo-prune.
    """
    text = read_metadata(artefact).get(ENTRY)
    if text is None:
        raise _unknown(artefact, "it says nothing about where it comes from")
    try:
        value = json.loads(text)
        known = {field.name: value[field.name] for field in fields(Provenance)}
        return Provenance(**{**known, "lineage": tuple(known["lineage"])})
    except (KeyError, TypeError, ValueError) as error:
        raise _unknown(artefact, f"what it says of itself cannot be read: {error!r}") from error


def _unknown(artefact: Path, what: str) -> ConfigError:
    return ConfigError(
        f"artefact '{artefact}': {what}",
        expected="one that `yolo-prune export` of this version wrote",
        remedy="export the checkpoint again",
    )


def _hash(plan: Any) -> str:
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
