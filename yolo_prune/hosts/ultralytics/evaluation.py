"""mAP of a checkpoint, as the host measures it, and checks of data descriptions before long work begins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from yolo_prune.errors import DataError
from yolo_prune.hosts.refusals import host_errors_as
from yolo_prune.hosts.ultralytics.checkpoints import require_deployable


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How well one kind of prediction fits.

    Attributes:
        map50: Mean average precision at 0.5, of IoU (boxes, masks) or of object key-point similarity (poses).
        map50_95: Mean average precision over 0.5 to 0.95 of the same.
        precision: At the confidence of the best F1.
        recall: At the confidence of the best F1.
    """

    map50: float
    map50_95: float
    precision: float
    recall: float

    @classmethod
    def of(cls, metric: Any) -> Scores:
        """Read the host's metric of one kind of prediction."""
        return cls(
            map50=float(metric.map50),
            map50_95=float(metric.map),
            precision=float(metric.mp),
            recall=float(metric.mr),
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the host's validator measured.

    Attributes:
        split: Split of the data.
        images: Number of images.
        map50: Of the boxes, as the three that follow: see `Scores`. Rotated ones for task obb.
        map50_95: See `map50`.
        precision: See `map50`.
        recall: See `map50`.
        imgsz_px: Side of the input.
        mask: Of the masks; task segment only.
        pose: Of the key points; task pose only.
    """

    split: str
    images: int
    map50: float
    map50_95: float
    precision: float
    recall: float
    imgsz_px: int
    mask: Scores | None = None
    pose: Scores | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values, without the kinds of prediction that the task does not have."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def evaluate(
    model: Path, *, data: Path, split: str, imgsz_px: int, batch: int = 16, workers: int = 2, square: bool = False
) -> Evaluation:
    """Measure mAP with the host's validator.

    Args:
        model: Checkpoint, dense or slim.
        data: Data yaml.
        split: `train`, `val` or `test`.
        imgsz_px: Side of the input.
        batch: Images per batch.
        workers: Loader processes.
        square: Letterbox every image to a square, as artefacts of a fixed size need it; the host itself pads less.

    Raises:
        DataError: The yaml or the split is missing, it has other key points, or the host cannot evaluate on it.
        CheckpointError: A task that is pruned only.
    """
    from ultralytics import YOLO

    require_split(data, split)
    with _validating(model, data, split):
        yolo = YOLO(str(model))
        require_deployable(yolo.model, str(model))
        require_kpt_shape(yolo.model, read_data(data), str(data))
        return _validate(yolo, data, split, imgsz_px, batch=batch, workers=workers, rect=not square)


def evaluate_artefact(artefact: Path, *, task: str, data: Path, split: str, imgsz_px: int) -> Evaluation:
    """Measure mAP of an exported artefact with the host's validator, on the CPU.

    Args:
        artefact: ONNX file, or NCNN or OpenVINO folder, under a name with the host's ending.
        task: Of the model that was exported.
        data: Data yaml.
        split: `train`, `val` or `test`.
        imgsz_px: Side of the input that it was exported for.

    Raises:
        DataError: The yaml or the split is missing, or the host cannot evaluate on it.
    """
    from ultralytics import YOLO

    require_split(data, split)
    with _validating(artefact, data, split):
        yolo = YOLO(str(artefact), task=task)
        return _validate(yolo, data, split, imgsz_px, batch=1, workers=2, rect=False, device="cpu")


def _validating(model: Path, data: Path, split: str) -> AbstractContextManager[None]:
    """Turn what the host's validator raises into one error."""
    return host_errors_as(
        DataError,
        f"Ultralytics cannot evaluate '{model}' on split '{split}' of '{data}'",
        expected="images with labels of the model's classes",
        remedy="correct the data; --debug shows where it stopped",
    )


def _validate(yolo: Any, data: Path, split: str, imgsz_px: int, **options: Any) -> Evaluation:
    """Run the host's validator."""
    with tempfile.TemporaryDirectory() as scratch:  # it insists on a folder for its pictures
        fixed = {"imgsz": imgsz_px, "plots": False, "verbose": False, "project": scratch, "name": "val"}
        metrics = yolo.val(data=str(data), split=split, **fixed, **options)
    return Evaluation(split=split, images=len(image_files(data, split)), imgsz_px=imgsz_px, **_scores(metrics))


def _scores(metrics: Any) -> dict[str, Any]:
    """Return the fields of `Evaluation` that the host's metrics of a task fill."""
    kinds = {"mask": getattr(metrics, "seg", None), "pose": getattr(metrics, "pose", None)}
    return asdict(Scores.of(metrics.box)) | {
        kind: Scores.of(metric) for kind, metric in kinds.items() if metric is not None
    }


def require_kpt_shape(model: Any, description: Mapping[str, Any], name: str) -> None:
    """Refuse data whose key points are others than a pose model's; models of other tasks take any data.

    Args:
        model: A model of the host.
        description: Content of the data yaml.
        name: What the user calls the yaml.

    Raises:
        DataError: `kpt_shape` is missing or another one.
    """
    expected, found = getattr(model.model[-1], "kpt_shape", None), description.get("kpt_shape")
    if expected is None or (isinstance(found, (list, tuple)) and list(found) == list(expected)):
        return
    raise DataError(
        f"'{name}' has {'no kpt_shape' if found is None else f'kpt_shape: {found}'}",
        expected=f"kpt_shape: {list(expected)}, as the model has [number of key points, values of each]",
        remedy="correct the data, or train the dense model on it before it is pruned",
    )


def require_split(data: Path, split: str) -> list[Path]:
    """Return the places of a split's images.

    Raises:
        DataError: No such yaml, not a data description, or the split is not in it, not on disk or empty.
    """
    description = read_data(data)
    entry = description.get(split)
    if not entry:
        found = ", ".join(key for key in ("train", "val", "test") if description.get(key)) or "none"
        raise DataError(
            f"'{data}' has no split '{split}' (it has: {found})",
            expected=f"a line `{split}: path/to/images`",
            remedy="add the split to the yaml, or name another one",
        )
    root = data.parent / str(description["path"]) if description.get("path") else data.parent
    places = [root / str(place) for place in (entry if isinstance(entry, list) else [entry])]
    for place in places:
        if next(_images_at(place), None) is None:
            problem = "has no image" if place.exists() else "does not exist"
            raise DataError(
                f"split '{split}' of '{data}' points to '{place}', which {problem}",
                expected="a folder of images, or a text file that lists them",
                remedy="correct the path in the yaml; it is relative to `path`, or else to the yaml itself",
            )
    return places


def image_files(data: Path, split: str) -> list[Path]:
    """Return the image files of a split, sorted."""
    return sorted(file for place in require_split(data, split) for file in _images_at(place))


def drawn_files(data: Path, split: str, count: int, *, seed: int = 0) -> list[Path]:
    """Return image files of a split drawn by lot, `count` at most, sorted: the same ones for every artefact."""
    files = image_files(data, split)
    return [files[at] for at in sorted(np.random.default_rng(seed).permutation(len(files))[:count])]


def _images_at(place: Path) -> Iterator[Path]:
    """Yield the images in a folder, or those that a text file lists."""
    from ultralytics.data.utils import IMG_FORMATS

    if place.is_dir():
        yield from (file for file in place.rglob("*") if file.suffix[1:].lower() in IMG_FORMATS)
    elif place.is_file():
        try:
            lines = place.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read '{place}': {error}", expected="a text file that lists images") from error
        yield from (place.parent / line.strip() for line in lines if line.strip())


def read_data(data: Path) -> dict[str, Any]:
    """Read a data yaml.

    Raises:
        DataError: No such file, or not a mapping with class names.
    """
    try:
        description = yaml.safe_load(data.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read data yaml '{data}': {error}", expected="a YAML file with train, val and names"
        ) from error
    if not isinstance(description, dict) or not (description.get("names") or description.get("nc")):
        raise DataError(f"'{data}' is not a data description", expected="a YAML mapping with train, val and names")
    return description
