"""One artefact: exported, compared with PyTorch, told where it comes from, and kept aside if it disagrees."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from yolo_prune.configuration import require_choice
from yolo_prune.device.detections import letterbox
from yolo_prune.device.runtimes.base import PRECISIONS, Array, Precision
from yolo_prune.device.sources import read_image
from yolo_prune.device.tensorrt_build import require_timing_cache
from yolo_prune.device.tensorrt_recipe import EngineOptions
from yolo_prune.errors import ConfigError, ParityError
from yolo_prune.export.accuracy import Accuracy, measure_accuracy
from yolo_prune.export.feeds import in_batches
from yolo_prune.export.parity import ParityReport, check_parity
from yolo_prune.export.provenance import provenance_of, write_provenance
from yolo_prune.export.quantization import quantize, require_quantizer
from yolo_prune.export.tensorrt import export_engine, require_builder
from yolo_prune.files import cannot_write, parent_folders, refuse_existing, temporary_prefix, write_json
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.hosts.ultralytics.checkpoints import task_of
from yolo_prune.hosts.ultralytics.evaluation import Evaluation, drawn_files, image_files
from yolo_prune.hosts.ultralytics.export import ExportFormat, export_model, require_packages, require_shapes

SUFFIXES = {
    "onnx": ".onnx", "ncnn": "_ncnn_model", "openvino": "_openvino_model", "engine": ".engine",
}  # fmt: skip
"""How artefacts are called, by format; the host's own endings, so that `YOLO(artefact)` knows them."""

FORMAT_OF = {"onnxruntime": "onnx", "ncnn": "ncnn", "openvino": "openvino", "tensorrt": "engine"}
"""The format of the artefacts that a runtime runs, by its name."""

FAILED = ".failed"
"""What the name of an artefact that disagrees gets at its end; a JSON file beside it tells how far it is off."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How TensorRT builds; see `EngineOptions`.

    Attributes:
        workspace_mib: Memory for scratch, MiB.
        dla_core: Deep learning accelerator of a Jetson.
        sparse: Use the sparse units where weights are 2:4 sparse.
        timing_cache: File of timings that a build reads and adds to.
        verbose: Print everything that TensorRT says.
    """

    workspace_mib: int | None = None
    dla_core: int | None = None
    sparse: bool = False
    timing_cache: Path | None = None
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What an artefact is to be.

    Attributes:
        format: One of `SUFFIXES`.
        precision: How it stores its weights.
        imgsz_px: Side of the square input.
        batch: Images of a call.
        dynamic: It takes other numbers and sizes of images as well; of an engine, other numbers up to `batch`.
        engine: For an engine.
    """

    format: str
    imgsz_px: int
    precision: Precision = "fp32"
    batch: int = 1
    dynamic: bool = False
    engine: EngineSettings = EngineSettings()

    def path(self, folder: Path, stem: str) -> Path:
        """Return where the artefact of a checkpoint stands: several precisions side by side."""
        return folder / f"{stem}{'' if self.precision == 'fp32' else f'_{self.precision}'}{SUFFIXES[self.format]}"

    def places(self, folder: Path, stem: str) -> tuple[Path, Path, Path]:
        """Return what `export_proved` may write: the artefact; or where one that disagrees is kept, and its figures."""
        out = self.path(folder, stem)
        return out, out.with_name(out.name + FAILED), out.with_name(f"{out.name}{FAILED}.json")

    @property
    def label(self) -> str:
        """How stages and tables call it: the format alone where it is float32."""
        return self.format if self.precision == "fp32" else f"{self.format}_{self.precision}"

    def require_possible(self) -> None:
        """Refuse what cannot be made on this machine, before any work.

        Raises:
            ConfigError: The format is unknown, or cannot be made here or with these inputs.
            MissingDependencyError: A package that it needs is not installed.
            OutputError: The timing cache cannot be written.
        """
        if self.format == "engine":
            if self.dynamic and self.batch == 1:
                raise ConfigError(
                    "dynamic=true with batch=1 for an engine",
                    expected="batch= of at least 2: it takes from one image to so many",
                    remedy="batch=8, or leave dynamic out",
                )
            options = self.engine_options()
            require_timing_cache(self.engine.timing_cache)
            require_builder(options)
        require_packages("onnx" if self.format == "engine" else self.format)
        require_shapes(self.format, batch=self.batch, dynamic=self.dynamic)
        if self.precision == "int8" and self.format != "engine":
            require_quantizer(self.format)

    def engine_options(self) -> EngineOptions:
        """Return what is asked of TensorRT."""
        settings = self.engine
        return EngineOptions(
            precision=self.precision,
            workspace_mib=settings.workspace_mib,
            dla_core=settings.dla_core,
            sparse=settings.sparse,
        )


def precision_of(*, half: bool, int8: bool) -> Precision:
    """Return the precision that two settings ask for.

    Raises:
        ConfigError: Two precisions at once.
    """
    if half and int8:
        raise ConfigError(
            "both half=true and int8=true",
            expected="one precision",
            remedy="leave one out, and run again for the other",
        )
    return "fp16" if half else "int8" if int8 else "fp32"


def variants(formats: Sequence[str], precisions: Sequence[str], *, imgsz_px: int) -> list[Variant]:
    """Return every precision of every format.

    Raises:
        ConfigError: An unknown format or precision.
    """
    for key, values, known in (("format", formats, SUFFIXES), ("precision", precisions, PRECISIONS)):
        for value in values:
            require_choice(key, value, known)
    return [
        Variant(format=name, precision=cast(Precision, precision), imgsz_px=imgsz_px)
        for name in formats
        for precision in precisions
    ]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An artefact and what was proved of it.

    Attributes:
        path: Where it stands; of one that disagrees, where it was kept aside.
        variant: What it is.
        parity: How far it agrees with PyTorch; None where its outputs cannot be compared at all.
        accuracy: What it loses of mAP; None where that was not measured.
        error: Why it cannot be trusted; None if it can.
    """

    path: Path
    variant: Variant
    parity: ParityReport | None
    accuracy: Accuracy | None
    error: ParityError | None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {
            "path": str(self.path),
            "format": self.variant.format,
            "parity": self.parity and self.parity.to_json(),
            "accuracy": self.accuracy and self.accuracy.to_json(),
            "error": self.error and str(self.error),
        }


def export_one(source: Path, folder: Path, variant: Variant, *, calibration: Sequence[Array] = ()) -> Path:
    """Export a checkpoint into a folder under the name that the host would give it.

    Args:
        source: The checkpoint.
        folder: For the artefact.
        variant: What it is to be.
        calibration: Images for 8 bit, as `calibration_inputs` returns them.
    """
    out = variant.path(folder, source.stem)
    if variant.format == "engine":
        return _engine(source, variant, out, calibration)
    if variant.precision != "int8":
        return _export(source, variant, out)
    refuse_existing(out)
    try:
        with parent_folders(out), tempfile.TemporaryDirectory(prefix=temporary_prefix(out), dir=out.parent) as name:
            whole = _export(source, replace(variant, precision="fp32"), Path(name, f"whole{SUFFIXES[variant.format]}"))
            small = quantize(whole, in_batches(calibration, variant.batch), Path(name, out.name), format=variant.format)
            refuse_existing(out)
            small.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error
    return out


def _engine(source: Path, variant: Variant, out: Path, calibration: Sequence[Array]) -> Path:
    """Let TensorRT build."""
    return export_engine(
        source,
        imgsz_px=variant.imgsz_px,
        out=out,
        options=variant.engine_options(),
        batch=variant.batch,
        dynamic=variant.dynamic,
        images=calibration,
        timing_cache=variant.engine.timing_cache,
        verbose=variant.engine.verbose,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )


def _export(source: Path, variant: Variant, out: Path) -> Path:
    """Let the host export."""
    return export_model(
        source,
        format=cast(ExportFormat, variant.format),
        imgsz_px=variant.imgsz_px,
        out=out,
        half=variant.precision == "fp16",
        batch=variant.batch,
        dynamic=variant.dynamic,
    )


def export_proved(
    source: Checkpoint,
    folder: Path,
    variant: Variant,
    *,
    images: Sequence[NDArray[np.uint8]] | None,
    calibration: Sequence[Array] = (),
    data: Path | None = None,
    reference: Evaluation | None = None,
    threads: int = 1,
) -> Exported:
    """Export a checkpoint, compare the artefact with it, and write into the artefact what was found.

    Nothing stands under its name before it was compared, whatever ends the work.

    Args:
        source: The checkpoint.
        folder: For the artefact.
        variant: What it is to be.
        images: For parity; None draws some.
        calibration: See `export_one`.
        data: Data yaml of `reference`.
        reference: mAP of the checkpoint, measured with `square=True`; None does not measure the artefact's.
        threads: CPU threads of the comparison.

    Returns:
        The artefact. One that disagrees is renamed, with the figures in a JSON file beside it, and says why; nothing is
        raised for it.

    Raises:
        YoloPruneError: It cannot be made.
    """
    out, aside, figures = variant.places(folder, source.path.stem)
    for place in (out, aside, figures):
        refuse_existing(place)
    try:
        with parent_folders(out), tempfile.TemporaryDirectory(prefix=temporary_prefix(out), dir=out.parent) as name:
            path = export_one(source.path, Path(name), variant, calibration=calibration)
            result = _compared(source, path, variant, images, len(calibration), data, reference, threads)
            place = out if result.error is None else aside
            refuse_existing(place)
            path.rename(place)
    except OSError as error:
        raise cannot_write(out, error) from error
    found = replace(result, path=place)
    if found.error is not None:
        write_json(figures, found.to_json())
    return found


def _compared(
    source: Checkpoint,
    path: Path,
    variant: Variant,
    images: Sequence[NDArray[np.uint8]] | None,
    calibration_images: int,
    data: Path | None,
    reference: Evaluation | None,
    threads: int,
) -> Exported:
    """Compare an artefact with its checkpoint and write into it what was found; see `export_proved`."""
    told = provenance_of(
        source, imgsz_px=variant.imgsz_px, precision=variant.precision, calibration_images=calibration_images
    )
    write_provenance(path, told)
    parity, accuracy, error = None, None, None
    try:
        parity = check_parity(source.path, path, imgsz_px=variant.imgsz_px, images=images, threads=threads)
        if reference is not None and data is not None:
            task = task_of(source.model)
            accuracy = measure_accuracy(path, reference, task=task, data=data, precision=variant.precision)
        error = _disagreement(path, parity, accuracy)
    except ParityError as incomparable:
        error = incomparable
    figures = [None if part is None else part.to_json() for part in (parity, accuracy)]
    write_provenance(path, replace(told, parity=figures[0], accuracy=figures[1]))
    return Exported(path=path, variant=variant, parity=parity, accuracy=accuracy, error=error)


def _disagreement(path: Path, parity: ParityReport, accuracy: Accuracy | None) -> ParityError | None:
    """Return why an artefact cannot be trusted; None if it can."""
    if not parity.passed:
        return parity.error()
    if accuracy is None or accuracy.passed:
        return None
    losses = ", ".join(f"{loss:.4f} ({kind})" for kind, loss in accuracy.losses.items())
    return ParityError(
        f"artefact '{path.name}' loses {losses} mAP50-95 of the {accuracy.pytorch:.4f} that PyTorch has on split "
        f"'{accuracy.split}' ({accuracy.images} images)",
        expected=f"a loss of at most {accuracy.limit:g}",
        remedy="export with another precision or more calibration images; do not deploy it",
    )


def sample_images(data: Path, split: str, count: int) -> list[NDArray[np.uint8]]:
    """Return the first images of a split, BGR, in their own sizes.

    Raises:
        DataError: The split is empty, or one of them cannot be read.
    """
    return [read_image(file) for file in image_files(data, split)[:count]]


def calibration_inputs(data: Path, count: int, imgsz_px: int, *, seed: int = 0) -> list[Array]:
    """Draw images of the train split, letterboxed as the network takes them: (1, 3, imgsz_px, imgsz_px) each.

    Args:
        data: Data yaml.
        count: Number of images at most.
        imgsz_px: Side of the square input.
        seed: Of the choice.

    Raises:
        DataError: The split is empty, or an image cannot be read.
    """
    return [letterbox(read_image(file), imgsz_px)[0] for file in drawn_files(data, "train", count, seed=seed)]
