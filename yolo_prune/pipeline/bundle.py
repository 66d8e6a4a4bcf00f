"""`bundle`: a folder that is carried to a device, with everything that runs there and everything to prove it by."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_prune.configuration import json_setting, require_choice, require_least, setting
from yolo_prune.device.bundle import Artefact, Bundle, Network, Reference
from yolo_prune.device.detections import letterbox
from yolo_prune.device.findings import find
from yolo_prune.device.images import synthetic_images
from yolo_prune.device.reference import compare_with_reference, stacked
from yolo_prune.device.runtimes import Array
from yolo_prune.device.sources import read_image, write_image
from yolo_prune.device.tensorrt_library import Version
from yolo_prune.device.tensorrt_recipe import EngineOptions
from yolo_prune.errors import ConfigError, DataError, ParityError
from yolo_prune.export.bundling import DEVICE_KINDS, add_runner, tidy, write_manifest
from yolo_prune.export.onnx_contract import require_contract
from yolo_prune.export.parity import TOLERANCES, ParityReport, check_parity
from yolo_prune.export.provenance import Provenance, provenance_of, write_provenance
from yolo_prune.export.pytorch_runtime import PyTorchRuntime
from yolo_prune.export.tensorrt_onnx import export_typed_onnx
from yolo_prune.files import new_folder, refuse_existing
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.hosts.ultralytics.checkpoints import read_deployable, task_of
from yolo_prune.hosts.ultralytics.evaluation import drawn_files, image_files
from yolo_prune.hosts.ultralytics.export import ExportFormat, export_model, require_packages
from yolo_prune.hosts.ultralytics.inference import task_rows
from yolo_prune.pipeline.artefacts import SUFFIXES, precision_of
from yolo_prune.report import render

Image = NDArray[np.uint8]

_CONFIDENCE, _IOU = 0.25, 0.7  # the host's own for predictions
_JETPACKS = (Version(8, 5), Version(8, 6), Version(10, 3))  # TensorRT of JetPack 5.1 and 6
_OF_ARTEFACTS = ("precision", "calibration_images", "parity", "accuracy")  # each says these of itself


@dataclass(kw_only=True)
class BundleConfig:
    """Settings of `bundle`."""

    model: str = setting(help="checkpoint (.pt), dense or slim")
    target: str = setting(help=f"kind of device: {', '.join(DEVICE_KINDS)}")
    out: str = setting(help="new folder, to be copied to the device")
    imgsz: int = setting(640, help="image side", unit="px")
    half: bool = setting(False, help="16-bit weights; on a jetson, of the engine that is built there")
    int8: bool = setting(False, help="8-bit engine, calibrated on training images of data=; jetson only")
    data: str | None = setting(None, help="data yaml whose images become the reference; default: drawn images")
    split: str = setting("val", help="split of data= for the reference")
    images: int = setting(4, help="number of reference images", unit="images")
    calibration: int = setting(64, help="number of images that an int8 engine is calibrated on", unit="images")
    json: str | None = json_setting("what the bundle's manifest says")


@dataclass(frozen=True, kw_only=True)
class BundleResult:
    """A bundle, and how far its artefacts agree with PyTorch."""

    out: Path
    bundle: Bundle
    parity: tuple[ParityReport, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the manifest without the files, and the parity figures."""
        manifest = {key: value for key, value in self.bundle.to_json().items() if key not in ("files", "reference")}
        return {"out": str(self.out), **manifest, "parity": [one.to_json() for one in self.parity]}

    def table(self) -> str:
        """Return one row per artefact, and what to do next."""
        rows = [
            [artefact.path, artefact.backend, artefact.precision, f"{artefact.max_rel:.1e}"]
            for artefact in self.bundle.artefacts
        ]
        found = sum(map(len, self.bundle.reference.detections))
        return (
            render(["artefact", "runtime", "precision", "max relative error"], rows)
            + f"{len(self.bundle.reference.images)} reference images with {found} detections\n"
            + f"copy '{self.out}' to the device; its README.md tells what to install, then: python3 run.py check\n"
        )


def bundle(config: BundleConfig) -> BundleResult:
    """Make a bundle; it appears under its name complete and checked, or not at all.

    Raises:
        YoloPruneError: Bad input, a failed export, or an artefact that disagrees with PyTorch.
    """
    _check(config)
    source = read_deployable(Path(config.model), imgsz_px=config.imgsz)
    images = _reference_images(config)
    calibration = _calibration_images(config) if config.int8 else []
    out = Path(config.out)
    with new_folder(out) as folder:
        told = provenance_of(source, imgsz_px=config.imgsz, precision="fp32", calibration_images=0)
        parity = _export_all(config, images, folder, told)
        network = _network(source, config)
        made = Bundle(
            folder=folder,
            target=config.target,
            network=network,
            artefacts=tuple(_artefact(folder, path, report) for path, report in parity.items()),
            engine=_engine_precision(config),
            calibration=_write_images(calibration, folder, "calibration"),
            tolerances={str(name): limit for name, limit in TOLERANCES.items() if limit is not None},
            reference=_reference(config, network, images, folder),
            provenance={key: value for key, value in asdict(told).items() if key not in _OF_ARTEFACTS},
            files={},
        )
        tidy(folder / "artefacts")
        add_runner(folder, made)
        write_manifest(folder, made)
        made = Bundle.read(folder)
        _require_as_carried(made)
    return BundleResult(out=out, bundle=replace(made, folder=out), parity=tuple(parity.values()))


def _check(config: BundleConfig) -> None:
    """Check everything that can be checked before the checkpoint is read.

    Raises:
        ConfigError: An unknown name, or settings that exclude each other.
        MissingDependencyError: A package that an export needs is not installed.
        OutputError: The folder exists.
    """
    require_choice("target", config.target, DEVICE_KINDS)
    require_least(config, images=1, calibration=1)
    refuse_existing(Path(config.out))
    precision_of(half=config.half, int8=config.int8)
    if config.int8 and not (DEVICE_KINDS[config.target].engine and config.data):
        raise ConfigError(
            f"int8=true with target={config.target} and data={config.data or 'not set'}",
            expected="target=jetson and data=, whose training images the engine is calibrated on",
            remedy="use half=true, or leave int8 out",
        )
    for name in DEVICE_KINDS[config.target].formats:
        require_packages(cast(ExportFormat, name))


def _engine_precision(config: BundleConfig) -> str | None:
    if not DEVICE_KINDS[config.target].engine:
        return None
    return precision_of(half=config.half, int8=config.int8)


def _reference_images(config: BundleConfig) -> list[Image]:
    """Return the images of the reference, made to fit the input: no device has to resize them, each in its own way."""
    if config.data is None:
        return synthetic_images(config.images, config.imgsz)
    return _fitting(image_files(Path(config.data), config.split)[: config.images], config, config.split)


def _calibration_images(config: BundleConfig) -> list[Image]:
    """Return images of the training split, chosen by lot, made to fit the input."""
    return _fitting(drawn_files(Path(str(config.data)), "train", config.calibration), config, "train")


def _fitting(files: Sequence[Path], config: BundleConfig, split: str) -> list[Image]:
    """Return the readable ones among image files, their longer side as long as the input's."""
    found, unreadable = [], list[str]()
    for file in files:
        try:
            found.append(fitted(read_image(file), config.imgsz))
        except DataError as error:
            unreadable.append(error.found)
    if not found:
        raise DataError(
            f"none of the {len(files)} images that were chosen from split '{split}' of '{config.data}' can be read: "
            + "; ".join(unreadable[:3]),
            expected="image files",
        )
    for reason in unreadable:
        print(f"warning: skipped: {reason}", file=sys.stderr)
    return found


def fitted(image: Image, imgsz_px: int) -> Image:
    """Scale an image (H, W, 3) as `letterbox` would, without the padding: `letterbox` of the result only pads."""
    height, width = image.shape[:2]
    scale = min(imgsz_px / height, imgsz_px / width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return image if size == (width, height) else np.asarray(cv2.resize(image, size), dtype=np.uint8)


def _export_all(
    config: BundleConfig, images: Sequence[Image], folder: Path, told: Provenance
) -> dict[Path, ParityReport]:
    """Export every format of the target, prove each before the next, and write into it what was proved."""
    source, parity = Path(config.model), {}
    target = DEVICE_KINDS[config.target]
    for name in target.formats:
        artefact = folder / "artefacts" / f"{source.stem}{SUFFIXES[name]}"
        if target.engine:  # up to version 10, which JetPack has, TensorRT itself takes the file to 16 or 8 bit
            export_typed_onnx(source, imgsz_px=config.imgsz, out=artefact)
            for version in _JETPACKS:
                require_contract(artefact, version, EngineOptions())
        else:
            export_model(
                source,
                format=cast(ExportFormat, name),
                imgsz_px=config.imgsz,
                out=artefact,
                half=config.half,
            )
        found = check_parity(source, artefact, imgsz_px=config.imgsz, images=images).require()
        write_provenance(artefact, replace(told, precision=found.precision, parity=found.to_json()))
        parity[artefact] = found
    return parity


def _artefact(folder: Path, path: Path, report: ParityReport) -> Artefact:
    return Artefact(
        path=path.relative_to(folder).as_posix(),
        backend=report.backend,
        precision=report.precision,
        max_rel=report.max_rel,
    )


def _network(source: Checkpoint, config: BundleConfig) -> Network:
    model: Any = source.model
    return Network(
        name=Path(config.model).stem,
        task=task_of(model),
        imgsz_px=config.imgsz,
        classes=tuple(str(name) for _, name in sorted(model.names.items())),
        end_to_end=False,  # the exporter's default for twin heads, and all that every runtime can do
        extras=task_rows(model),
    )


def _reference(config: BundleConfig, network: Network, images: Sequence[Image], folder: Path) -> Reference:
    """Run PyTorch on the reference images, and write images and raw outputs."""
    inputs = [letterbox(image, config.imgsz) for image in images]
    with PyTorchRuntime(end_to_end=False).load(Path(config.model), imgsz_px=config.imgsz, threads=1) as session:
        outputs = stacked(session, [tensor for tensor, _ in inputs])
    detections = []
    for index, (_, placement) in enumerate(inputs):
        one: list[Array] = [output[index : index + 1] for output in outputs]
        found = find(one, placement, network, confidence=_CONFIDENCE, iou=_IOU)
        detections.append([item.to_json() for item in found])
    names = _write_images(images, folder, "reference")
    file = "reference/outputs.npz"
    arrays: dict[str, Any] = {f"output{index}": output for index, output in enumerate(outputs)}
    np.savez_compressed(folder / file, **arrays)
    return Reference(images=names, outputs=file, confidence=_CONFIDENCE, iou=_IOU, detections=tuple(detections))


def _write_images(images: Sequence[Image], folder: Path, name: str) -> tuple[str, ...]:
    """Write images without loss; return their paths relative to the folder."""
    names = tuple(f"{name}/{index:04d}.png" for index in range(len(images)))
    for path, image in zip(names, images, strict=True):
        write_image(folder / path, image)
    return names


def _require_as_carried(made: Bundle) -> None:
    """Hold the finished folder against its own manifest and reference, with the code that does so on the device."""
    made.require_intact()
    for artefact in made.artefacts:
        verdict = compare_with_reference(made, made.path(artefact), threads=1)
        if not verdict.passed:
            raise ParityError(
                f"artefact '{artefact.path}' differs from PyTorch: by {verdict.max_rel:.1e} of the outputs' scale, and "
                f"{verdict.found_again} of {verdict.expected} detections are found again, {verdict.backed} of "
                f"{verdict.answered} are the reference's",
                expected=f"at most {verdict.tolerance} of the scale, and the detections of the reference",
                remedy="do not deploy it; try other images or another format",
            )
