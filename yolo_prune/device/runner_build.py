"""`run.py build`: the engine of a Jetson, made on the Jetson: it runs on the kind of GPU that it was built with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence, cast

from yolo_prune.device import tensorrt_recipe as recipe
from yolo_prune.device.bundle import Bundle
from yolo_prune.device.calibration import Calibration
from yolo_prune.device.detections import letterbox
from yolo_prune.device.options import option
from yolo_prune.device.runner_artefacts import built_folder
from yolo_prune.device.runtimes.base import PRECISIONS, Array, Precision
from yolo_prune.device.sources import read_image
from yolo_prune.device.tensorrt_build import build_engine
from yolo_prune.device.tensorrt_library import is_installed
from yolo_prune.device.trtexec import find_trtexec
from yolo_prune.errors import ConfigError
from yolo_prune.files import refuse_existing


@dataclass
class BuildOptions:
    """Settings of `build`."""

    precision: str = option("", help="fp32, fp16 or int8; default: what the bundle was made for")
    out: str = option("", help="folder for engine and timing cache; default: 'built' in the bundle")
    dla: int = option(-1, help="core of the deep-learning accelerator; -1: the GPU")
    sparse: bool = option(False, help="use the sparse units where weights are 2:4 sparse")
    workspace: int = option(0, help="TensorRT's memory for scratch, MiB; 0: as much as it wants")
    verbose: bool = option(False, help="print everything that TensorRT says")


def build(bundle: Bundle, options: BuildOptions) -> None:
    """Build an engine from the bundle's ONNX file, with TensorRT's Python package or else with `trtexec`.

    Raises:
        ConfigError: The bundle is for another target, an option makes no sense, or there is no TensorRT here.
        ExportError: TensorRT could not build it.
        OutputError: The engine exists already, or cannot be written.
    """
    precision = _require_buildable(bundle, options)
    onnx = next(artefact for artefact in bundle.artefacts if artefact.path.endswith(".onnx"))
    bundle.require_intact(onnx.path, *bundle.calibration)
    out = built_folder(bundle, options.out)
    marks = [precision, *([] if options.dla < 0 else [f"dla{options.dla}"]), *(["sparse"] if options.sparse else [])]
    engine = out / f"{Path(onnx.path).stem}_{'_'.join(marks)}.engine"
    refuse_existing(engine)
    _require_tensorrt()
    if not is_installed():
        print(
            "TensorRT's Python package is missing: trtexec builds the engine, but check, benchmark and detect need the "
            "package to run it: sudo apt install python3-libnvinfer",
            flush=True,
        )
    build_engine(
        bundle.path(onnx),
        engine,
        recipe.EngineOptions(
            precision=precision,
            workspace_mib=options.workspace or None,
            dla_core=None if options.dla < 0 else options.dla,
            sparse=options.sparse,
        ),
        _calibration(bundle, onnx.path, out) if precision == "int8" else None,
        timing_cache=out / "timing.cache",
        verbose=options.verbose,
        progress=print,
    )
    print(f"{engine}\nnow: python3 run.py check" + (f" out='{options.out}'" if options.out else ""))


def _require_buildable(bundle: Bundle, options: BuildOptions) -> Precision:
    """Refuse what TensorRT need not be asked for; return the precision."""
    if bundle.engine is None:
        raise ConfigError(
            f"this bundle is for target '{bundle.target}', whose artefacts need no building",
            expected="a bundle for a Jetson",
            remedy="yolo-prune bundle target=jetson ... makes one; here: python3 run.py detect source=...",
        )
    precision = options.precision or bundle.engine
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision}", expected=f"one of: {', '.join(PRECISIONS)}")
    if precision == "int8" and not bundle.calibration:
        raise ConfigError(
            "precision=int8, and the bundle has no images to calibrate it on",
            expected="a bundle made with int8=true data=...",
            remedy="build with precision=fp16, or make the bundle anew",
        )
    return cast(Precision, precision)


def _require_tensorrt() -> None:
    """Refuse a machine without TensorRT."""
    if not is_installed() and find_trtexec() is None:
        raise ConfigError(
            "there is neither the Python package 'tensorrt' nor 'trtexec' on this machine",
            expected="a Jetson with JetPack, or a machine with TensorRT and an NVIDIA GPU",
            remedy="run this on the Jetson itself, after `sudo apt install nvidia-jetpack`; elsewhere the ONNX file "
            "runs with: python3 -m pip install onnxruntime",
        )


def _calibration(bundle: Bundle, onnx: str, out: Path) -> Calibration:
    """Return the network inputs that 8-bit ranges are measured on, and where those of these very files are kept."""
    sums = "".join(bundle.files[name] for name in (onnx, *bundle.calibration))
    cache = out / f"calibration_{hashlib.sha256(sums.encode()).hexdigest()[:8]}.cache"
    files = [bundle.folder / name for name in bundle.calibration]
    return Calibration(_Letterboxed(files, bundle.network.imgsz_px), cache=cache)


class _Letterboxed:
    """Images as the network takes them, read when they are asked for: all at once would be much for a small Jetson."""

    def __init__(self, files: Sequence[Path], imgsz_px: int) -> None:
        self._files, self._imgsz_px = files, imgsz_px

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int, /) -> Array:
        return letterbox(read_image(self._files[index]), self._imgsz_px)[0]
