"""Pictures of detections: what the host finds, small enough for a page, and clear errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolo_prune.errors import DataError
from yolo_prune.hosts.ultralytics.evaluation import image_files
from yolo_prune.hosts.ultralytics.pictures import draw_detections
from yolo_prune.pipeline.shown import side_by_side


def test_a_picture_shows_what_the_host_finds(dense_checkpoint, tiny_data, tmp_path):
    from ultralytics import YOLO

    source, out = image_files(tiny_data, "val")[0], tmp_path / "ein Bild.jpg"
    for confidence in (0.0001, 1.0):
        found = draw_detections(dense_checkpoint, [source], [out], imgsz_px=64, confidence=confidence)
        expected = YOLO(str(dense_checkpoint)).predict(cv2.imread(str(source)), imgsz=64, conf=confidence)[0]
        assert found == [len(expected)]
        drawn = cv2.imread(str(out)).astype(float)
        plain = cv2.imread(str(source)).astype(float)
        assert drawn.shape == plain.shape
        changed = float(np.abs(drawn - plain).mean())
        assert (changed > 10.0) == (found[0] > 0)  # JPEG itself changes far less
    assert found == [0]


@pytest.mark.parametrize(
    ("shape", "expected"), [((900, 1300), (443, 640)), ((2000, 90), (640, 29)), ((50, 60), (50, 60))]
)
def test_a_large_one_is_scaled_down(dense_checkpoint, tmp_path, shape, expected):
    source, out = tmp_path / "large.png", tmp_path / "small.jpg"
    cv2.imwrite(str(source), np.zeros((*shape, 3), np.uint8))
    draw_detections(dense_checkpoint, [source], [out], imgsz_px=64, confidence=0.9)
    assert cv2.imread(str(out)).shape[:2] == expected


def test_an_image_that_cannot_be_read_is_named(dense_checkpoint, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(DataError, match=r"torn\.jpg"):
        draw_detections(dense_checkpoint, [tmp_path / "torn.jpg"], [tmp_path / "o.jpg"], imgsz_px=64, confidence=0.5)
    assert not (tmp_path / "o.jpg").exists()


def test_images_are_spread_over_the_split_and_the_same_for_all(dense_checkpoint, slim_checkpoint, tiny_data, tmp_path):
    models = {"dense": dense_checkpoint, "slim": slim_checkpoint}
    record = side_by_side(models, tmp_path, data=tiny_data, split="val", imgsz_px=64)
    names = [file.name for file in image_files(tiny_data, "val")]
    assert [image["image"] for image in record["images"]] == [names[index] for index in (0, 2, 5, 7)]
    for image in record["images"]:
        files = [Path(shown["file"]) for shown in image["models"].values()]
        assert len(set(files)) == 2
        assert all((tmp_path / file).is_file() for file in files)


def test_a_damaged_image_of_the_split_is_left_out(dense_checkpoint, tiny_data, tmp_path):
    """Hours of training lie behind this stage, and the host went past that image."""
    shutil.copytree(tiny_data.parent, tmp_path / "data")
    first = image_files(tmp_path / "data" / tiny_data.name, "val")[0]
    first.write_bytes(b"no image")
    record = side_by_side(
        {"dense": dense_checkpoint}, tmp_path, data=tmp_path / "data" / tiny_data.name, split="val", imgsz_px=64
    )
    assert len(record["images"]) == 3
    assert first.name not in [image["image"] for image in record["images"]]
