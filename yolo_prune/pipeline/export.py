"""`export`: artefacts that agree with PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_prune.configuration import json_setting, require_choice, require_least, setting
from yolo_prune.device.runtimes.base import Precision
from yolo_prune.errors import ConfigError, ParityError
from yolo_prune.files import require_writable
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.hosts.ultralytics.checkpoints import read_deployable
from yolo_prune.hosts.ultralytics.evaluation import evaluate, require_split
from yolo_prune.pipeline.artefacts import (
    SUFFIXES,
    EngineSettings,
    Exported,
    Variant,
    calibration_inputs,
    export_proved,
    precision_of,
    sample_images,
)
from yolo_prune.report import render

CALIBRATION: dict[str, Any] = {
    "default": 64,
    "help": "images of the train split that 8 bit is calibrated with, at most",
}
"""Setting that `export` and `run` share."""


@dataclass(kw_only=True)
class ExportConfig:
    """Settings of `export`."""

    model: str = setting(help="checkpoint (.pt), dense or slim")
    out: str = setting(help="folder for the artefacts")
    format: str = setting("onnx", help=f"comma-separated: {', '.join(SUFFIXES)}")
    half: bool = setting(False, help="16-bit weights")
    int8: bool = setting(False, help="8-bit weights and activations, calibrated on images of data=")
    imgsz: int = setting(640, help="image side", unit="px")
    batch: int = setting(1, help="images of a call", unit="images")
    dynamic: bool = setting(
        False, help="take other numbers and sizes of images as well (not ncnn; of an engine, other numbers up to batch)"
    )
    data: str | None = setting(None, help="data yaml whose images prove parity and mAP; default: drawn images")
    split: str = setting("val", help="split of data= that they come from")
    images: int = setting(16, help="number of images for parity", unit="images")
    map: bool = setting(True, help="with data=: measure mAP of checkpoint and artefacts on the whole split")
    calibration: int = setting(**CALIBRATION)
    threads: int = setting(1, help="threads of each runtime while it is compared")
    workspace: int | None = setting(None, help="engine only: TensorRT's memory for scratch", unit="MiB")
    dla: int | None = setting(None, help="engine only: accelerator of a Jetson that runs what it can")
    sparse: bool = setting(False, help="engine only: use sparse units where weights are 2:4 sparse")
    timing_cache: str | None = setting(None, help="engine only: file of timings, read and added to")
    verbose: bool = setting(False, help="engine only: print everything that TensorRT says")
    json: str | None = json_setting("the parity figures")

    def precision(self) -> Precision:
        """Return how the artefacts store their weights; see `precision_of`."""
        return precision_of(half=self.half, int8=self.int8)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Artefacts and how far they agree with PyTorch."""

    exported: tuple[Exported, ...]

    @property
    def failure(self) -> ParityError | None:
        """The first artefact's that disagrees; it was kept aside, and those that agree stay."""
        return next((one.error for one in self.exported if one.error is not None), None)

    def to_json(self) -> dict[str, Any]:
        """Return paths, parity and mAP as plain values."""
        found = [one.to_json() for one in self.exported]
        return {
            "artefacts": [one["path"] for one in found],
            **{key: [one[key] for one in found] for key in ("parity", "accuracy", "error")},
        }

    def table(self) -> str:
        """Return one row per artefact."""
        head = ["artefact", "backend", "precision", "max relative error", "tolerance", "same boxes", "needed"]
        return render([*head, "mAP50-95", "PyTorch", "agrees"], [_row(one) for one in self.exported])


def _row(one: Exported) -> list[str]:
    """Return the cells of an artefact."""
    parity, accuracy = one.parity, one.accuracy
    cells = [str(one.path), "-", one.variant.precision, "-", "-", "-", "-"]
    if parity is not None:
        raw = [f"{parity.max_rel:.1e}", "-" if parity.tolerance is None else f"{parity.tolerance:g}"]
        boxes = parity.boxes
        shares = ["-", "-"] if boxes is None else [f"{boxes.share:.1%} of {boxes.expected}", f"{parity.box_share:.0%}"]
        cells[1:] = [parity.backend, parity.precision, *raw, *shares]
    figures = ["-", "-"] if accuracy is None else [f"{accuracy.artefact:.4f}", f"{accuracy.pytorch:.4f}"]
    return [*cells, *figures, "yes" if one.error is None else "NO"]


def export(config: ExportConfig) -> ExportResult:
    """Export a checkpoint and prove that every artefact agrees with PyTorch.

    Returns:
        The artefacts; `failure` says whether one disagrees.

    Raises:
        YoloPruneError: Bad input, before any work, or a failed export.
    """
    variants = _variants(config)
    source = _source(config)
    for variant in variants:
        variant.require_possible()
        for path in variant.places(Path(config.out), source.path.stem):
            require_writable(path)
    data = Path(config.data) if config.data else None
    images = sample_images(data, config.split, config.images) if data else None
    calibration = calibration_inputs(data, config.calibration, config.imgsz) if data and config.int8 else []
    reference = None
    if data and config.map:
        reference = evaluate(source.path, data=data, split=config.split, imgsz_px=config.imgsz, square=True)
    exported = tuple(
        export_proved(
            source,
            Path(config.out),
            variant,
            images=images,
            calibration=calibration,
            data=data,
            reference=reference,
            threads=config.threads,
        )
        for variant in variants
    )
    return ExportResult(exported=exported)


def _variants(config: ExportConfig) -> list[Variant]:
    """Return what is to be exported."""
    formats = [name.strip() for name in config.format.split(",") if name.strip()]
    if not formats or len(set(formats)) < len(formats):
        raise ConfigError(f"format={config.format}", expected=f"one or more, each once, of: {', '.join(SUFFIXES)}")
    for name in formats:
        require_choice("format", name, SUFFIXES)
    require_least(config, batch=1, images=1, calibration=1, threads=1)
    precision = config.precision()
    if precision == "int8" and not config.data:
        raise ConfigError(
            "int8=true without data=",
            expected="a data yaml: 8 bit is calibrated on images of its train split",
            remedy="data=your.yaml, or half=true, which needs none",
        )
    engine = EngineSettings(
        workspace_mib=config.workspace,
        dla_core=config.dla,
        sparse=config.sparse,
        timing_cache=Path(config.timing_cache) if config.timing_cache else None,
        verbose=config.verbose,
    )
    if engine != EngineSettings() and "engine" not in formats:
        raise ConfigError(
            f"workspace, dla, sparse, timing_cache or verbose with format={config.format}",
            expected="format=engine: they are TensorRT's",
            remedy="leave them out",
        )
    return [
        Variant(
            format=name, imgsz_px=config.imgsz, precision=precision, batch=config.batch, dynamic=config.dynamic,
            engine=engine,
        )
        for name in formats
    ]  # fmt: skip


def _source(config: ExportConfig) -> Checkpoint:
    """Read the checkpoint, and refuse what does not fit it."""
    source = read_deployable(Path(config.model), imgsz_px=config.imgsz)
    if config.data:
        for split in {config.split, *(["train"] if config.int8 else [])}:
            require_split(Path(config.data), split)
    return source
