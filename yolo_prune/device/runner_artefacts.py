"""Which artefacts a bundle has on this device, its engines among them, and which of them can run here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

from yolo_prune.device.bundle import Bundle
from yolo_prune.device.runtimes import runtime_for
from yolo_prune.errors import ConfigError, MissingDependencyError, YoloPruneError

ENGINES = "*.engine"
"""What `build` leaves in `out=`."""

BUILT = "built"
"""Where `build` writes unless it is told otherwise: a folder inside the bundle."""


@dataclass(frozen=True)
class Here:
    """An artefact on this device.

    Attributes:
        path: Where it is.
        name: How reports call it.
        backend: Name of its runtime.
        part: How the bundle's manifest calls it; None for an engine that was built here.
    """

    path: Path
    name: str
    backend: str
    part: str | None = None


def artefacts_here(bundle: Bundle, out: str) -> list[Here]:
    """Return the engines that were built here, then what the bundle brought, be it intact or not.

    Args:
        bundle: The bundle.
        out: The user's `out=`; empty for the default.
    """
    engines = sorted(built_folder(bundle, out).glob(ENGINES))
    return [
        *(Here(path=engine, name=engine.name, backend="tensorrt") for engine in engines),
        *(
            Here(
                path=bundle.path(artefact),
                name=Path(artefact.path).name,
                backend=artefact.backend,
                part=artefact.path,
            )
            for artefact in bundle.artefacts
        ),
    ]


def built_folder(bundle: Bundle, out: str) -> Path:
    """Return where engines are."""
    return Path(out) if out else bundle.folder / BUILT


def split_by_runtime(artefacts: Sequence[Here]) -> tuple[list[Here], list[tuple[Here, str]]]:
    """Return the artefacts whose runtime is installed, and the others with what is wrong.

    A runtime that is installed may still fail to start: libraries that it links may be missing.
    """
    able: list[Here] = []
    unable: list[tuple[Here, str]] = []
    for here in artefacts:
        try:
            runtime_for(here.path).version()
        except YoloPruneError as error:
            unable.append((here, error.found))
        except (ImportError, OSError) as error:
            unable.append((here, f"{here.backend} does not start: {error}"))
        else:
            able.append(here)
    return able, unable


def failures_of(artefacts: Sequence[Here], attempt: Callable[[Here], object]) -> dict[str, YoloPruneError]:
    """Return by name why an attempt at artefacts failed: one of them must not stop the others."""
    failures: dict[str, YoloPruneError] = {}
    for here in artefacts:
        try:
            attempt(here)
        except YoloPruneError as error:
            failures[here.name] = error
        except Exception as error:  # whatever a runtime raises, on one line
            failures[here.name] = DoesNotRunError(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return failures


def install_line(bundle: Bundle) -> str:
    """Return the command that installs what the target needs; TensorRT is not to be had from a package index there."""
    if bundle.engine is not None:
        return "python3 run.py build, where JetPack has brought TensorRT; or: python3 -m pip install onnxruntime"
    return f"python3 -m pip install -r '{bundle.folder / requirements_file(bundle.target)}'"


def requirements_file(target: str) -> str:
    """Return the name of the list of packages for a target."""
    return f"requirements-{target}.txt"


def choose(bundle: Bundle, backend: str, out: str, name: str = "") -> Here:
    """Return the first artefact that can run, or the one of a backend or a name.

    Raises:
        ConfigError: No artefact for that backend or of that name, or an artefact of the bundle is missing or damaged.
        MissingDependencyError: No runtime for any of them.
    """
    bundle.require_intact(*(artefact.path for artefact in bundle.artefacts))
    artefacts = artefacts_here(bundle, out)
    backends = list(dict.fromkeys(here.backend for here in artefacts))
    wanted = [here for here in artefacts if backend in ("auto", here.backend)]
    if not wanted:
        raise ConfigError(
            f"backend={backend}",
            expected=f"one of: auto, {', '.join(backends)}",
            remedy="an engine for TensorRT is built by: python3 run.py build" if backend == "tensorrt" else "",
        )
    if name:
        named = [here for here in wanted if here.name == name]
        if not named:
            raise ConfigError(f"artefact={name}", expected=f"one of: {', '.join(here.name for here in wanted)}")
        wanted = named
    able, unable = split_by_runtime(wanted)
    if able:
        return able[0]
    raise NoRuntimeError([problem for _, problem in unable], bundle)


class DoesNotRunError(YoloPruneError):
    """An artefact that should run here does not."""

    exit_code = 1

    def __init__(self, found: str) -> None:
        super().__init__(
            found,
            expected="artefacts that are intact and run here",
            remedy="copy the bundle again if one is damaged; build an engine of another device or TensorRT anew",
        )


class NoRuntimeError(MissingDependencyError):
    """Nothing that could run the artefacts is installed; says what to install on the device."""

    def __init__(self, problems: Sequence[str], bundle: Bundle) -> None:
        YoloPruneError.__init__(
            self,
            "; ".join(problems),
            expected="a runtime for one of the bundle's artefacts",
            remedy=install_line(bundle),
        )
