"""From a checkpoint to an engine, where TensorRT and a GPU are at hand; elsewhere a bundle builds it on the device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from yolo_prune.device.calibration import Calibration
from yolo_prune.device.runtimes.base import Array, Precision
from yolo_prune.device.tensorrt_build import build_engine, require_timing_cache
from yolo_prune.device.tensorrt_library import Version, require_tensorrt
from yolo_prune.device.tensorrt_recipe import STRONGLY_TYPED, BatchRange, EngineOptions, require_accelerator
from yolo_prune.errors import ConfigError, YoloPruneError
from yolo_prune.export.onnx_contract import require_contract
from yolo_prune.export.tensorrt_onnx import export_typed_onnx, require_images
from yolo_prune.files import require_writable


def export_engine(
    checkpoint: Path,
    *,
    imgsz_px: int,
    out: Path,
    options: EngineOptions | None = None,
    batch: int = 1,
    dynamic: bool = False,
    images: Sequence[Array] = (),
    timing_cache: Path | None = None,
    verbose: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Export a checkpoint and build an engine of it on this machine's GPU.

    Args:
        checkpoint: A `.pt` file of the host, dense or slim.
        imgsz_px: Side of the square input.
        out: Where the engine shall stand; nothing may stand there yet.
        options: Precision, accelerator, sparse units; shapes are taken from here.
        batch: Images in a call; the most of them if `dynamic`.
        dynamic: Take any number of images up to `batch`; the engine is tuned for `batch`.
        images: For int8: inputs (1, 3, imgsz_px, imgsz_px), letterboxed as they will be.
        timing_cache: See `build_engine`.
        verbose: See `build_engine`.
        progress: See `build_engine`.

    Returns:
        `out`.

    Raises:
        ConfigError: There is no GPU, or the options cannot be had.
        DataError: int8 and no images, or too few for the batch.
        MissingDependencyError: TensorRT is not installed.
        YoloPruneError: As `export_model` and `build_engine` raise.
    """
    options = options or EngineOptions()
    require_writable(out)
    require_timing_cache(timing_cache)
    if options.precision == "int8":
        require_images(images)
    version = require_builder(options)  # before minutes of work
    written = onnx_precision(version, options)
    calibration = Calibration(images) if options.precision == "int8" else None
    if calibration is not None and written != "int8":
        calibration.require_usable(batch)
    shaped = replace(options, imgsz_px=imgsz_px, batch=BatchRange(1, batch, batch) if dynamic else None)
    with tempfile.TemporaryDirectory(prefix="engine.") as folder:
        onnx = export_typed_onnx(
            checkpoint,
            imgsz_px=imgsz_px,
            out=Path(folder) / "model.onnx",
            precision=written,
            images=images,
            batch=batch,
            dynamic=dynamic,
        )
        require_contract(onnx, version, shaped)
        return build_engine(
            onnx,
            out,
            shaped,
            calibration,
            timing_cache=timing_cache,
            verbose=verbose,
            progress=progress,
        )


def require_builder(options: EngineOptions) -> Version:
    """Return the version of the TensorRT that builds engines on this machine.

    Raises:
        ConfigError: There is none, or no GPU, or it does not build for the accelerator that is asked for.
    """
    try:
        version, _ = require_tensorrt()
    except YoloPruneError as error:
        raise ConfigError(
            f"no engine can be built on this machine: {error.found}",
            expected="TensorRT and the GPU that will run the engine: it fits no other ones",
            remedy=f"build it on the device, with what `yolo-prune bundle target=jetson` makes; or {error.remedy}",
        ) from error
    require_accelerator(version, options)
    return version


def onnx_precision(version: Version, options: EngineOptions) -> Precision:
    """Return the precision that the ONNX file has to hold: the engine's own where the network is strongly typed."""
    return options.precision if version.major >= STRONGLY_TYPED else "fp32"
