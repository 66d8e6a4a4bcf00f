"""The command line of a bundle: `python3 run.py VERB key=value ...`, with the project's words and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from yolo_prune.device.bundle import Bundle
from yolo_prune.device.options import describe_options, read_options
from yolo_prune.device.runner_benchmark import BenchmarkOptions, benchmark_here
from yolo_prune.device.runner_build import BuildOptions, build
from yolo_prune.device.runner_check import CheckOptions, check
from yolo_prune.device.runner_detect import DetectOptions, detect
from yolo_prune.errors import ConfigError, YoloPruneError


@dataclass(frozen=True)
class Verb:
    """One command.

    Attributes:
        summary: One line for `--help`.
        options: Schema of its settings.
        work: What it does; it prints its results.
    """

    summary: str
    options: Any
    work: Callable[[Bundle, Any], None]


VERBS: Mapping[str, Verb] = {
    "check": Verb("are all files intact, and does every artefact say what PyTorch said?", CheckOptions, check),
    "build": Verb("build the engine of a Jetson from the ONNX file", BuildOptions, build),
    "benchmark": Verb("time the artefacts on this device", BenchmarkOptions, benchmark_here),
    "detect": Verb("find objects in images, a video or before a camera", DetectOptions, detect),
}


def main(folder: Path, words: Sequence[str]) -> int:
    """Run the command line of the bundle in a folder; returns the exit code.

    0: done. 1: an artefact does not agree, or cannot be timed. 2: bad input. Without `--debug` no traceback is shown
    for these.
    """
    debug = "--debug" in words
    try:
        _dispatch(folder, [word for word in words if word != "--debug"])
    except YoloPruneError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the lines has had enough; the interpreter would complain at its end again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _dispatch(folder: Path, words: Sequence[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage(Bundle.read(folder)), end="")
        return
    if words[0] not in VERBS:
        raise ConfigError(f"unknown command '{words[0]}'", expected=f"one of: {', '.join(VERBS)}")
    verb = VERBS[words[0]]
    if any(word in ("-h", "--help") for word in words[1:]):
        print("\n".join([f"run.py {words[0]}: {verb.summary}", "", *describe_options(verb.options)]))
        return
    options = read_options(verb.options, words[1:])
    verb.work(Bundle.read(folder), options)


def _usage(bundle: Bundle) -> str:
    """Return what there is to do, and what this bundle holds."""
    network = bundle.network
    lines = [
        f"{network.name}: task {network.task}, {len(network.classes)} classes, {network.imgsz_px} px, "
        f"for target '{bundle.target}'",
        "",
        "usage: python3 run.py COMMAND key=value ... [--debug]",
        "",
        *(f"  {name:<9}  {verb.summary}" for name, verb in VERBS.items()),
        "",
        "run.py COMMAND --help lists its keys.",
    ]
    return "\n".join(lines) + "\n"
