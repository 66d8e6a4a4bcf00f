"""What a bundle holds besides artefacts and reference: the runner, its licence, a README, the packages to install."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import yaml

import yolo_prune
from yolo_prune.device.bundle import MANIFEST, Bundle
from yolo_prune.device.runner_artefacts import requirements_file
from yolo_prune.errors import ConfigError
from yolo_prune.files import sha256, write_json

_TEMPLATES = Path(__file__).parent / "templates"
_CARRIED = ("__init__.py", "errors.py", "files.py")  # besides device/


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """A kind of device.

    Attributes:
        title: How its README calls it.
        formats: Export formats, the preferred one first.
        packages: What the runner needs there; what the system brings is not listed.
        engine: Whether a TensorRT engine is built there.
    """

    title: str
    formats: tuple[str, ...]
    packages: tuple[str, ...]
    engine: bool = False


DEVICE_KINDS: Mapping[str, DeviceKind] = {
    "jetson": DeviceKind(
        title="NVIDIA Jetson", formats=("onnx",), packages=("numpy", "opencv-python-headless"), engine=True
    ),
    "pi": DeviceKind(
        title="Raspberry Pi",
        formats=("ncnn", "onnx"),
        packages=("numpy", "opencv-python-headless", "ncnn", "onnxruntime"),
    ),
    "cpu": DeviceKind(
        title="x86 and other CPUs",
        formats=("openvino", "onnx", "ncnn"),
        packages=("numpy", "opencv-python-headless", "openvino", "onnxruntime", "ncnn"),
    ),
}
"""Targets by name."""


def add_runner(folder: Path, bundle: Bundle) -> None:
    """Add the runner, its licence, the README and the list of packages to the folder of a bundle."""
    shutil.copyfile(_TEMPLATES / "run.py", folder / "run.py")
    package = Path(yolo_prune.__file__).parent
    shutil.copytree(
        package / "device", folder / "yolo_prune" / "device", ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    for name in _CARRIED:
        shutil.copyfile(package / name, folder / "yolo_prune" / name)
    (folder / "LICENSE").write_text(_license(), encoding="utf-8")
    target = DEVICE_KINDS[bundle.target]
    packages = "".join(f"{name}\n" for name in target.packages)
    (folder / requirements_file(bundle.target)).write_text(packages, encoding="utf-8")
    (folder / "README.md").write_text(_readme(bundle, target), encoding="utf-8")


def tidy(artefacts: Path) -> None:
    """Make what the host exported fit for a device: no Python of PyTorch's, and no YAML, which needs a reader.

    `metadata.yaml` becomes JSON, which is YAML too: stock Ultralytics reads it as before.
    """
    for script in artefacts.rglob("*.py"):
        script.unlink()
    for file in artefacts.rglob("metadata.yaml"):
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def write_manifest(folder: Path, bundle: Bundle) -> None:
    """Write the manifest, with the checksum of every file that stands in the folder: the last step."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    checksums = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    write_json(folder / MANIFEST, {**bundle.to_json(), "files": checksums})


def _readme(bundle: Bundle, target: DeviceKind) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("README.md").render(
        network=bundle.network,
        artefacts=bundle.artefacts,
        engine=bundle.engine,
        images=len(bundle.reference.images),
        title=target.title,
        target=bundle.target,
        version=yolo_prune.__version__,
    )


def _license() -> str:
    """Return the licence's text, which stands beside the package in a checkout and in its metadata once installed."""
    beside = Path(yolo_prune.__file__).parents[1] / "LICENSE"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    for file in metadata.files("yolo-prune") or ():
        if file.name == "LICENSE":
            return file.read_text()
    raise ConfigError(
        "the licence of yolo_prune is not in this installation",
        expected="LICENSE beside the package or in its metadata: a copy of the runner has to carry it",
        remedy="install yolo-prune again",
    )
