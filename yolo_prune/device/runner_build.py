"""`run.py build`: the engine of a Jetson, made on the Jetson, because an engine runs on the kind of GPU that built it."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Optional  # Python 3.8 cannot subscript the built-in ones

from yolo_prune.device.bundle import Bundle
from yolo_prune.device.detections import letterbox
from yolo_prune.device.options import option
from yolo_prune.device.runner_artefacts import built_folder
from yolo_prune.device.runtimes.base import Array, import_runtime
from yolo_prune.device.sources import read_image
from yolo_prune.errors import ConfigError, ExportError, MissingDependencyError
from yolo_prune.files import new_file, refuse_existing

_TRTEXEC = ("trtexec", "/usr/src/tensorrt/bin/trtexec")  # JetPack installs it beside its samples, not on PATH
_PRECISIONS = ("fp32", "fp16", "int8")


@dataclass
class BuildOptions:
    """Settings of `build`."""

    precision: str = option("", help="fp32, fp16 or int8; default: what the bundle was made for")
    out: str = option("", help="folder for engine and timing cache; default: 'built' in the bundle")
    dla: int = option(-1, help="core of the deep-learning accelerator; -1: the GPU")


def build(bundle: Bundle, options: BuildOptions) -> None:
    """Build an engine from the bundle's ONNX file.

    Raises:
        ConfigError: The bundle is for another target, or an option makes no sense.
        ExportError: TensorRT could not build it.
        MissingDependencyError: There is neither TensorRT's Python package nor `trtexec`.
        OutputError: The engine exists already, or cannot be written.
    """
    precision = _require_buildable(bundle, options)
    onnx = next(artefact for artefact in bundle.artefacts if artefact.path.endswith(".onnx"))
    bundle.require_intact(onnx.path, *bundle.calibration)
    out = built_folder(bundle, options.out)
    engine = out / f"{Path(onnx.path).stem}_{precision}.engine"
    refuse_existing(engine)
    tensorrt = importlib.import_module("yolo_prune.device.tensorrt_build")
    wanted = tensorrt.BuildOptions(
        precision=precision,
        timing_cache=out / "timing.cache",
        dla_core=None if options.dla < 0 else options.dla,
    )
    if _has_python_package():
        tensorrt.build_engine(bundle.path(onnx), engine, wanted, calibration=_calibration(bundle, precision))
    else:
        _with_trtexec(tensorrt, bundle.path(onnx), engine, wanted)
    print(f"{engine}\nnow: python3 run.py check")


def _require_buildable(bundle: Bundle, options: BuildOptions) -> str:
    """Refuse what TensorRT need not be asked for; return the precision."""
    if bundle.engine is None:
        raise ConfigError(
            f"this bundle is for target '{bundle.target}', whose artefacts need no building",
            expected="a bundle for a Jetson",
            remedy="yolo-prune bundle target=jetson ... makes one; here: python3 run.py detect source=...",
        )
    precision = options.precision or bundle.engine
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision={precision}", expected=f"one of: {', '.join(_PRECISIONS)}")
    if precision == "int8" and not bundle.calibration:
        raise ConfigError(
            "precision=int8, and the bundle has no images to calibrate it on",
            expected="a bundle made with int8=true data=...",
            remedy="build with precision=fp16, or make the bundle anew",
        )
    return precision


def _has_python_package() -> bool:
    """Return whether TensorRT can be imported; a folder of type stubs is none."""
    try:
        return hasattr(import_runtime("tensorrt", purpose="build engines"), "Builder")
    except MissingDependencyError:
        return False


def _calibration(bundle: Bundle, precision: str) -> Optional[List[Array]]:
    """Return the network inputs that 8-bit ranges are measured on."""
    if precision != "int8":
        return None
    images = (read_image(bundle.folder / name) for name in bundle.calibration)
    return [letterbox(image, bundle.network.imgsz_px)[0] for image in images]


def _with_trtexec(tensorrt: Any, onnx: Path, engine: Path, wanted: Any) -> None:
    """Build with NVIDIA's command-line tool."""
    program = next(filter(None, map(shutil.which, _TRTEXEC)), None)
    if program is None:
        raise ConfigError(
            "there is neither the Python package 'tensorrt' nor 'trtexec' on this machine",
            expected="a Jetson with JetPack, or a machine with TensorRT and an NVIDIA GPU",
            remedy="sudo apt install nvidia-jetpack, then run this on the Jetson itself; elsewhere use ONNX Runtime",
        )
    with new_file(engine) as temporary:
        command = [str(word) for word in tensorrt.trtexec_command(onnx, temporary, wanted)]
        done = subprocess.run([program, *command[1:]], check=False)
        if done.returncode:
            raise ExportError(
                f"trtexec ended with code {done.returncode}",
                expected="an engine",
                remedy="see its messages above; with little memory close other programs and try again",
            )
