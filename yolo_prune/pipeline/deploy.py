"""`export`: artefacts that agree with PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.errors import DataError
from yolo_prune.export.parity import ParityReport, check_parity
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint, require_deployable
from yolo_prune.hosts.ultralytics.evaluation import image_files
from yolo_prune.hosts.ultralytics.export import ExportFormat, export_model
from yolo_prune.report import render

SUFFIXES = {"onnx": ".onnx", "ncnn": "_ncnn_model", "openvino": "_openvino_model"}
"""How artefacts are called, by format; the host's own endings, so that `YOLO(artefact)` knows them."""

BACKENDS = {"onnxruntime": "onnx", "ncnn": "ncnn", "openvino": "openvino"}
"""Formats by the runtime that runs them."""


@dataclass(kw_only=True)
class ExportConfig:
    """Settings of `export`."""

    model: str = setting(help="checkpoint (.pt), dense or slim")
    out: str = setting(help="folder for the artefacts")
    format: str = setting("onnx", help=f"comma-separated: {', '.join(SUFFIXES)}")
    imgsz: int = setting(640, help="image side", unit="px")
    data: str | None = setting(None, help="data yaml whose val images prove parity; default: drawn images")
    images: int = setting(4, help="number of images for parity", unit="images")
    json: str | None = json_setting("the parity figures")


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Artefacts and how far they agree with PyTorch."""

    artefacts: tuple[Path, ...]
    parity: tuple[ParityReport, ...]

    def to_json(self) -> dict[str, Any]:
        """Return paths and parity as plain values."""
        return {"artefacts": [str(path) for path in self.artefacts], "parity": [one.to_json() for one in self.parity]}

    def table(self) -> str:
        """Return one row per artefact."""
        rows = [
            [
                str(path),
                one.backend,
                one.precision,
                f"{one.max_rel:.1e}",
                f"{one.tolerance:g}",
                "yes" if one.passed else "NO",
            ]
            for path, one in zip(self.artefacts, self.parity, strict=True)
        ]
        return render(["artefact", "backend", "precision", "max relative error", "tolerance", "parity"], rows)


def export(config: ExportConfig) -> ExportResult:
    """Export a checkpoint and prove that every artefact agrees with PyTorch.

    Raises:
        YoloPruneError: Unknown format, a failed export, or an artefact that disagrees.
    """
    formats = [name.strip() for name in config.format.split(",") if name.strip()]
    for name in formats:
        require_choice("format", name, SUFFIXES)
    source = Path(config.model)
    model: Any = read_checkpoint(source).model
    require_deployable(model, config.model)
    require_imgsz(config.imgsz, stride=int(model.stride.max()))
    images = sample_images(Path(config.data), "val", config.images) if config.data else None
    artefacts, reports = [], []
    for name in formats:
        artefact = export_one(source, Path(config.out), name, imgsz_px=config.imgsz)
        reports.append(check_parity(source, artefact, imgsz_px=config.imgsz, images=images).require())
        artefacts.append(artefact)
    return ExportResult(artefacts=tuple(artefacts), parity=tuple(reports))


def export_one(source: Path, folder: Path, format_name: str, *, imgsz_px: int) -> Path:
    """Export a checkpoint into a folder under the name that the host would give it."""
    out = folder / f"{source.stem}{SUFFIXES[format_name]}"
    return export_model(source, format=cast(ExportFormat, format_name), imgsz_px=imgsz_px, out=out)


def sample_images(data: Path, split: str, count: int) -> list[NDArray[np.uint8]]:
    """Return the first images of a split, BGR, in their own sizes.

    Raises:
        DataError: The split has no readable image.
    """
    images = [cv2.imread(str(file)) for file in image_files(data, split)[:count]]
    found = [cast(NDArray[np.uint8], image) for image in images if image is not None]
    if not found:
        raise DataError(f"split '{split}' of '{data}' has no readable image", expected="at least one image file")
    return found
