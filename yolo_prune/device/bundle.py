"""What a bundle is: a folder for a device that says what it holds, and can tell when a file was damaged on the way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from yolo_prune.device.manifest import is_of, require_manifest
from yolo_prune.errors import ConfigError
from yolo_prune.files import sha256

MANIFEST = "bundle.json"
"""Its file, which lists every other one."""

FORMAT = 1
"""Changes with the manifest, so that a runner refuses what it cannot read."""


@dataclass(frozen=True)
class Network:
    """What the network of a bundle is, as far as its outputs have to be read.

    Attributes:
        name: What the checkpoint was called.
        task: One of detect, segment, pose, obb.
        imgsz_px: Side of the square input.
        classes: Names, by class.
        end_to_end: See `Session`.
        extras: See `agreement.Extras`.
    """

    name: str
    task: str
    imgsz_px: int
    classes: tuple[str, ...]
    end_to_end: bool
    extras: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Artefact:
    """An exported network.

    Attributes:
        path: Its file or folder, relative to the bundle, with slashes.
        backend: The runtime that runs it, a key of `RUNTIMES`; on a jetson the ONNX file is also what the engine is
            built from.
        precision: How it stores its weights.
        max_rel: What its parity check found where it was exported, as a fraction of the outputs' scale.
    """

    path: str
    backend: str
    precision: str
    max_rel: float


@dataclass(frozen=True)
class Reference:
    """What PyTorch says about a few images.

    Attributes:
        images: Image files relative to the bundle, fitted into the network's input, so that no device resizes them.
        outputs: `.npz` file with arrays `output0`, `output1`, ... over all images.
        confidence: Lowest score of the detections.
        iou: Overlap above which the lower one of two of them went.
        detections: Final detections of every image, as `Finding.to_json` gives them.
    """

    images: tuple[str, ...]
    outputs: str
    confidence: float
    iou: float
    detections: tuple[list[dict[str, Any]], ...]


@dataclass(frozen=True)
class Bundle:
    """A folder and what its manifest says.

    Attributes:
        folder: Where it is.
        target: One of jetson, pi, cpu.
        network: What it holds.
        artefacts: In the order in which they are preferred on the target.
        engine: Precision of the engine that a jetson builds; None elsewhere.
        calibration: Image files that an int8 engine is calibrated on; empty for other precisions.
        tolerances: Largest difference of raw outputs from PyTorch's, as a fraction of their scale, by precision; None
            or absent where they are not judged.
        reference: What the artefacts are held against.
        provenance: Where the network comes from, and what it costs.
        files: SHA-256 of every file but the manifest, by its path relative to the bundle.
    """

    folder: Path
    target: str
    network: Network
    artefacts: tuple[Artefact, ...]
    engine: str | None
    calibration: tuple[str, ...]
    tolerances: Mapping[str, float | None]
    reference: Reference
    provenance: Mapping[str, Any]
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return what the manifest holds."""
        value = asdict(self)
        del value["folder"]
        return {"format": FORMAT, **value}

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """Read the manifest of a folder.

        Raises:
            ConfigError: There is none, or it cannot be read.
        """
        file = folder / MANIFEST
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            return cls._from_json(folder, value)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"cannot read '{file}': {error}",
                expected="the manifest that `yolo-prune bundle` wrote",
                remedy="copy the bundle to the device again, or make it anew",
            ) from error

    @classmethod
    def _from_json(cls, folder: Path, value: Any) -> Bundle:
        if isinstance(value, dict) and value.get("format") != FORMAT:
            raise ValueError(f"format {value.get('format')}, not {FORMAT}")
        require_manifest(value)
        del value["format"]
        network, reference = value.pop("network"), value.pop("reference")
        calibration = tuple(value.pop("calibration"))
        return cls(
            folder=folder,
            network=Network(**{**network, "classes": tuple(network["classes"])}),
            artefacts=tuple(Artefact(**item) for item in value.pop("artefacts")),
            calibration=calibration,
            reference=Reference(
                **{**reference, "images": tuple(reference["images"]), "detections": tuple(reference["detections"])}
            ),
            **value,
        )

    def path(self, artefact: Artefact) -> Path:
        """Return where an artefact is."""
        return self.folder / artefact.path

    def require_intact(self, *parts: str) -> None:
        """Compare files with their checksums.

        Args:
            parts: Files or folders, relative to the bundle; none means all.

        Raises:
            ConfigError: One is missing or damaged; it is named.
        """
        chosen = {
            name: digest for name, digest in self.files.items() if not parts or any(is_of(name, part) for part in parts)
        }
        for part in parts:
            if not any(is_of(name, part) for name in chosen):
                raise _damaged(f"'{part}' has no checksum in {MANIFEST}")
        for name, digest in chosen.items():
            file = self.folder / name
            if not file.is_file():
                raise _damaged(f"'{name}' is missing from the bundle")
            found = sha256(file)
            if found != digest:
                raise _damaged(f"checksum of '{name}' is {found[:12]}..., recorded was {digest[:12]}...")


def _damaged(found: str) -> ConfigError:
    """Return the error for a file that did not arrive as it was sent."""
    return ConfigError(found, expected="the files that `yolo-prune bundle` wrote", remedy="copy the bundle again")
