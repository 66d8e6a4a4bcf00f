"""Building an engine with `trtexec`: JetPack has it even where Python's package is missing."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from yolo_prune.device.tensorrt_library import Version
from yolo_prune.device.tensorrt_recipe import Recipe
from yolo_prune.errors import ConfigError, ExportError

_JETPACK = Path("/usr/src/tensorrt/bin/trtexec")  # not on the search path there
_BANNER = re.compile(r"\[TensorRT v(\d+)\]")
_OPTIONS = {
    "FP16": "--fp16",
    "INT8": "--int8",
    "GPU_FALLBACK": "--allowGPUFallback",
    "SPARSE_WEIGHTS": "--sparsity=enable",
}
_LAST_LINES = 15


def find_trtexec() -> Path | None:
    """Return the program, if there is one."""
    found = shutil.which("trtexec")
    return Path(found) if found else _JETPACK if _JETPACK.is_file() else None


def trtexec_version(program: Path) -> Version:
    """Ask the program for its version.

    Raises:
        ConfigError: It does not answer as trtexec does.
    """
    _, lines = _run([str(program), "--help"])
    banner = _BANNER.search("\n".join(lines))
    if banner is None:
        raise ConfigError(f"'{program}' does not say its version", expected="trtexec of TensorRT 8.5 or newer")
    return decode_version(int(banner[1]))


def decode_version(number: int) -> Version:
    """Read NV_TENSORRT_VERSION: 8601 is 8.6.1; since TensorRT 10 the major version has four digits, 100300 is 10.3."""
    base = 1_000 if number < 10_000 else 10_000
    return Version(number // base, number % base // 100)


def trtexec_command(
    recipe: Recipe,
    *,
    version: Version,
    onnx: Path,
    plan: Path,
    timing_cache: Path | None = None,
    calibration_cache: Path | None = None,
    program: Path = Path("trtexec"),
    verbose: bool = False,
) -> list[str]:
    """Return the command that builds an engine as the Python API would.

    The result is a plan without metadata; `EngineFile` adds them.

    Args:
        recipe: What was decided.
        version: Of the program.
        onnx: The ONNX file.
        plan: Where the plan shall stand.
        timing_cache: Read where it exists, and written back.
        calibration_cache: What a calibration left; trtexec itself cannot calibrate.
        program: The program.
        verbose: Print everything.

    Raises:
        ConfigError: The recipe needs a calibration and there is no cache.
    """
    if recipe.calibrate and calibration_cache is None:
        raise ConfigError(
            "int8 with trtexec, which cannot calibrate, and no calibration cache",
            expected="the cache of an earlier calibration, or an ONNX file that is quantized",
            remedy="install TensorRT's package for Python (on a Jetson: apt install python3-libnvinfer)",
        )
    return [
        str(program),
        f"--onnx={onnx}",
        f"--saveEngine={plan}",
        "--skipInference" if version >= (8, 6) else "--buildOnly",
        *(_OPTIONS[flag] for flag in recipe.builder_flags if flag in _OPTIONS),
        *_shapes(recipe),
        *_kept(recipe),
        *([f"--memPoolSize=workspace:{recipe.workspace_mib}"] if recipe.workspace_mib else []),
        *([f"--useDLACore={recipe.dla_core}"] if recipe.dla_core is not None else []),
        *([f"--timingCacheFile={timing_cache}"] if timing_cache else []),
        *([f"--calib={calibration_cache}"] if recipe.calibrate else []),
        *(["--verbose"] if verbose else []),
    ]


def _shapes(recipe: Recipe) -> list[str]:
    """Return the options of a dynamic input."""
    if recipe.shapes is None:
        return []
    sizes = ("x".join(map(str, shape)) for shape in recipe.shapes)
    return [f"--{name}Shapes={recipe.input_name}:{size}" for name, size in zip(("min", "opt", "max"), sizes)]


def _kept(recipe: Recipe) -> list[str]:
    """Return the options that hold layers in a higher precision."""
    if not recipe.kept:
        return []
    pairs = ",".join(f"{name}:{precision}" for name, precision in recipe.kept.items())
    return ["--precisionConstraints=prefer", f"--layerPrecisions={pairs}", f"--layerOutputTypes={pairs}"]


def run_trtexec(command: list[str], *, verbose: bool = False) -> None:
    """Build an engine.

    Args:
        command: What `trtexec_command` returned.
        verbose: Print what it says, while it says it.

    Raises:
        ExportError: The program failed; the message ends with its last lines.
    """
    status, lines = _run(command, verbose=verbose)
    if status != 0:
        shown = [word for word in command if not word.startswith("--saveEngine=")]  # a temporary file
        wrong = [line for line in lines if "[E]" in line] or lines
        raise ExportError(
            "trtexec failed:\n    " + "\n    ".join(wrong[-_LAST_LINES:]),
            expected="an engine",
            remedy=f"run it yourself to see everything: {shlex.join(shown)}",
        )


def _run(command: list[str], *, verbose: bool = False) -> tuple[int, list[str]]:
    """Run a program to its end; return its exit status and its lines, both of its streams in one."""
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            if verbose:
                print(lines[-1], flush=True)
    return process.returncode, lines
