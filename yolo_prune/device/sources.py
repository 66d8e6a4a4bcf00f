"""Where images come from and go to: files of any name, folders, videos and cameras."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_prune.errors import ConfigError, DataError, OutputError
from yolo_prune.files import new_file

_IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
_CAMERA = "camera:"


@dataclass(frozen=True)
class Frame:
    """One image of a source.

    Attributes:
        source: The file, or `camera:N`.
        index: Number of the frame in a video or of a camera, from 0; None for an image file.
        image: (H, W, 3), 8 bit, BGR.
    """

    source: str
    index: int | None
    image: NDArray[np.uint8]

    def file_name(self) -> str:
        """Return how a picture of it is called: as the image file, or with the number of the frame."""
        if self.index is not None:
            return f"{Path(self.source.replace(':', '_')).stem}_{self.index:06d}.jpg"
        file = Path(self.source)
        return file.name if file.suffix.lower() in _IMAGES else f"{file.name}.png"


def frames_of(source: str) -> Iterator[Frame]:
    """Yield the images of a file, of a folder (in order of their names), of a video, or of `camera:N`.

    An unreadable file of a folder is skipped with a warning.

    Raises:
        ConfigError: The source does not exist, or the camera does not answer.
        DataError: The image, every image of the folder, or the video cannot be read, or the camera stopped answering.
    """
    if source.startswith(_CAMERA):
        yield from _camera(source)
        return
    path = Path(source)
    if path.is_dir():
        yield from _folder(path)
    elif path.is_file():
        yield from _video(path) if path.suffix.lower() in _VIDEOS else iter([_frame(path)])
    else:
        raise ConfigError(
            f"no source '{source}'",
            expected="an image, a folder of images, a video, or camera:0",
            remedy="check the path",
        )


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image file as uint8 of shape (H, W, 3), BGR, turned as its EXIF orientation says.

    OpenCV's own `imread` cannot open every name on every system, so the bytes are read here.

    Raises:
        DataError: It cannot be read.
    """
    try:
        content = np.fromfile(path, dtype=np.uint8)
        image: Any = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    except (OSError, cv2.error) as error:
        raise DataError(f"cannot read image '{path}': {error}", expected="an image file") from error
    if image is None:
        raise DataError(
            f"image '{path}' is {'damaged, or of a kind that OpenCV does not know' if content.size else 'empty'}",
            expected="a JPEG, PNG, BMP, TIFF or WebP file",
            remedy="copy the file again, or convert it",
        )
    return np.asarray(image, dtype=np.uint8)


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an image, uint8 of shape (H, W, 3), BGR, to a file; what it is follows from the name's ending.

    Raises:
        OutputError: The file exists, or cannot be written.
    """
    done, content = cv2.imencode(path.suffix, image)
    if not done:
        raise OutputError(f"OpenCV cannot write '{path}'", expected="an ending such as .jpg or .png")
    with new_file(path) as temporary:
        content.tofile(str(temporary))


def _frame(path: Path) -> Frame:
    """Read one image file."""
    return Frame(source=str(path), index=None, image=read_image(path))


def _folder(folder: Path) -> Iterator[Frame]:
    """Yield every readable image of a folder."""
    files: list[Path] = sorted(file for file in folder.iterdir() if file.suffix.lower() in _IMAGES)
    readable = 0
    for file in files:
        try:
            frame = _frame(file)
        except DataError as error:
            print(f"warning: skipped: {error.found}", file=sys.stderr)
            continue
        readable += 1
        yield frame
    if not readable:
        found = f"none of {len(files)} images in '{folder}' can be read" if files else f"no image in '{folder}'"
        raise DataError(found, expected=f"files that end in {', '.join(_IMAGES)}")


def _camera(source: str) -> Iterator[Frame]:
    """Yield frames of a camera; it never ends by itself, so one that stops answering is a failure."""
    number = source[len(_CAMERA) :]
    if not number.isdigit():
        raise ConfigError(f"source '{source}'", expected="a camera's number, such as camera:0")
    missing = ConfigError(
        f"camera {number} does not answer",
        expected="a camera that OpenCV can open, /dev/video" + number,
        remedy="plug it in, close other programs that use it, or try another number",
    )
    count = 0
    for frame in _captured(source, int(number), missing):
        yield frame
        count += 1
    raise DataError(
        f"camera {number} stopped answering after {count} frames",
        expected="frames until frames= of them came, or q ends it",
        remedy="check its cable and power",
    )


def _video(path: Path) -> Iterator[Frame]:
    """Yield the frames of a video file."""
    unreadable = DataError(
        f"video '{path}' cannot be read",
        expected="a video that this build of OpenCV decodes",
        remedy="copy the file again, or convert it to MP4 with H.264",
    )
    yield from _captured(str(path), str(path), unreadable)


def _captured(source: str, device: Any, failure: Exception) -> Iterator[Frame]:
    """Yield what OpenCV captures; not a single frame is a failure."""
    with contextlib.closing(_Capture(device)) as capture:
        index = 0
        while True:
            image = capture.read()
            if image is None:
                break
            yield Frame(source=source, index=index, image=image)
            index += 1
    if not index:
        raise failure


class _Capture:
    """OpenCV's capture, closed when it is done with."""

    def __init__(self, device: Any) -> None:
        try:
            self._capture: Any = cv2.VideoCapture(device)
        except cv2.error:  # some builds raise where others only fail to open
            self._capture = None

    def read(self) -> NDArray[np.uint8] | None:
        """Return the next frame, or None at the end."""
        if self._capture is None or not self._capture.isOpened():
            return None
        there, image = self._capture.read()
        return np.asarray(image, dtype=np.uint8) if there else None

    def close(self) -> None:
        """Free the camera."""
        if self._capture is not None:
            self._capture.release()
