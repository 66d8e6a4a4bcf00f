"""`run.py detect`: what is in images, a folder, a video or before a camera, a line of JSON for each image."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_prune.device.bundle import Bundle
from yolo_prune.device.detections import letterbox
from yolo_prune.device.drawing import draw
from yolo_prune.device.findings import Finding, find
from yolo_prune.device.options import option
from yolo_prune.device.runner_artefacts import choose
from yolo_prune.device.runtimes import runtime_for
from yolo_prune.device.runtimes.base import Session
from yolo_prune.device.sources import Frame, frames_of, write_image
from yolo_prune.errors import ConfigError, OutputError

_QUIT = (27, ord("q"))  # Escape too


@dataclass
class DetectOptions:
    """Settings of `detect`."""

    source: str = option("", help="image, folder of images, video, or camera:0", required=True)
    backend: str = option("auto", help="onnxruntime, ncnn, openvino or tensorrt; auto: the first that is installed")
    artefact: str = option("", help="name of one, where a backend has several, such as slim_int8.engine")
    conf: float = option(0.25, help="lowest score that counts")
    iou: float = option(0.7, help="overlap above which the lower one of two boxes goes")
    save: str = option("", help="folder for images with what was found drawn in; must not exist")
    show: bool = option(False, help="show each image in a window, a still one until a key is pressed; q ends it")
    frames: int = option(0, help="stop after so many images; 0: all of them")
    threads: int = option(2, help="CPU threads of the runtime")
    out: str = option("", help="folder with engines that `build` made; default: 'built' in the bundle")


def detect(bundle: Bundle, options: DetectOptions) -> None:
    """Print a line of JSON for every image of the source.

    Raises:
        ConfigError: The source or the backend is not there, a number is out of range, or a window cannot be opened.
        DataError: The source cannot be read.
        MissingDependencyError: No runtime is installed.
        OutputError: `save` exists or cannot be written.
    """
    _require_sensible(options)
    here = choose(bundle, options.backend, options.out, options.artefact)
    frames: Iterable[Frame] = frames_of(options.source)
    if options.frames:
        frames = itertools.islice(frames, options.frames)
    with runtime_for(here.path).load(here.path, imgsz_px=bundle.network.imgsz_px, threads=options.threads) as session:
        for frame in frames:
            line, found = _look(bundle, session, frame, options)
            print(json.dumps({**line, "artefact": here.name}), flush=True)
            if not _shown(frame, found, options):
                break


def _look(bundle: Bundle, session: Session, frame: Frame, options: DetectOptions) -> Any:
    """Return the line for one image, and what was found in it."""
    start = time.perf_counter()
    tensor, placement = letterbox(frame.image, bundle.network.imgsz_px)
    prepared = time.perf_counter()
    outputs = session(tensor)
    answered = time.perf_counter()
    found = find(outputs, placement, bundle.network, confidence=options.conf, iou=options.iou)
    done = time.perf_counter()
    height, width = frame.image.shape[:2]
    marks = [("letterbox", start, prepared), ("forward", prepared, answered), ("boxes", answered, done)]
    line: dict[str, Any] = {"source": frame.source, "width": width, "height": height}
    if frame.index is not None:
        line["frame"] = frame.index
    line["ms"] = {name: round(1e3 * (after - before), 2) for name, before, after in marks}
    line["detections"] = [one.to_json() for one in found]
    return line, found


def _shown(frame: Frame, found: list[Finding], options: DetectOptions) -> bool:
    """Save and show an image as far as asked for; return whether to go on."""
    if not (options.save or options.show):
        return True
    picture = draw(frame.image, found)
    if options.save:
        write_image(Path(options.save) / frame.file_name(), picture)
    return not options.show or _in_window(picture, still=frame.index is None)


def _in_window(picture: NDArray[np.uint8], *, still: bool) -> bool:
    """Show a picture, a still one until a key is pressed; return false if the user has had enough."""
    try:
        cv2.imshow("yolo_prune", picture)
        return cv2.waitKey(0 if still else 1) & 0xFF not in _QUIT
    except cv2.error as error:
        raise ConfigError(
            "show=true, and OpenCV cannot open a window",
            expected="a desktop, and a build of OpenCV with windows",
            remedy="leave show out and use save=DIR, or install opencv-python in place of opencv-python-headless",
        ) from error


def _require_sensible(options: DetectOptions) -> None:
    """Refuse settings that no image is needed to refuse."""
    for name, value in (("conf", options.conf), ("iou", options.iou)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value}", expected="between 0 and 1")
    for name, number, least in (("frames", options.frames, 0), ("threads", options.threads, 1)):
        if number < least:
            raise ConfigError(f"{name}={number}", expected=f"{least} or more")
    if options.save and Path(options.save).exists():
        raise OutputError(
            f"folder '{options.save}' already exists",
            expected="a folder that is not there yet: files are never overwritten",
            remedy="choose another name for save=",
        )
