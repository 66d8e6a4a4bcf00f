"""What a device makes of raw outputs, for every task, is what the host's own prediction makes of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoint_files import TRAIN_ARGS, save_as_host
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import lively
from ultralytics import YOLO
from ultralytics.utils.metrics import batch_probiou
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import xywhr2xyxyxyxy

from yolo_prune.device.bundle import Network
from yolo_prune.device.detections import letterbox
from yolo_prune.device.drawing import draw
from yolo_prune.device.findings import Finding, find
from yolo_prune.device.images import synthetic_images
from yolo_prune.device.masks import outline
from yolo_prune.device.rotated import corners, rotated_detections, similarity
from yolo_prune.export.pytorch_runtime import PyTorchRuntime
from yolo_prune.hosts.ultralytics.checkpoints import task_of
from yolo_prune.hosts.ultralytics.inference import task_rows

IMGSZ_PX = 96
CONFIDENCE = 0.01


class Predicted:
    """A network of a task: what the host predicts for an image, and what we find in the same raw outputs."""

    def __init__(self, name, folder, height=110, width=150):
        model = lively(name)
        model.task = task_of(model)
        file = save_as_host(
            model, folder / f"{name}.pt", dtype=torch.float32, train_args={**TRAIN_ARGS, "task": model.task}
        )
        self.image = np.ascontiguousarray(synthetic_images(1, width, seed=3)[0][:height])
        options = {"imgsz": IMGSZ_PX, "conf": CONFIDENCE, "rect": False, "verbose": False}
        self.expected = YOLO(file).predict(self.image, **options)[0]
        tensor, placement = letterbox(self.image, IMGSZ_PX)
        with PyTorchRuntime().load(file, imgsz_px=IMGSZ_PX, threads=1) as session:
            raw = session(tensor)
        network = Network(
            name=name, task=model.task, imgsz_px=IMGSZ_PX, classes=tuple(model.names.values()), end_to_end=False,
            extras=task_rows(model),
        )  # fmt: skip
        self.found = find(raw, placement, network, confidence=CONFIDENCE, iou=0.7)


@pytest.fixture(scope="module", params=["yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-obb"])
def predicted(request, tmp_path_factory):
    return Predicted(request.param, tmp_path_factory.mktemp("predicted"))


def test_as_the_host_predicts(predicted):
    found, expected = predicted.found, predicted.expected
    boxes = expected.obb if expected.obb is not None else expected.boxes
    assert len(found) == len(boxes) > 0
    assert [one.class_id for one in found] == boxes.cls.int().tolist()
    np.testing.assert_allclose([one.score for one in found], boxes.conf.numpy(), atol=1e-4)
    if expected.obb is None:
        np.testing.assert_allclose([one.box for one in found], boxes.xyxy.numpy(), atol=0.05)
    else:
        np.testing.assert_allclose(
            np.sort([one.corners for one in found], axis=1), np.sort(boxes.xyxyxyxy.numpy(), axis=1), atol=0.05
        )
    if expected.keypoints is not None:
        np.testing.assert_allclose([one.key_points for one in found], expected.keypoints.data.numpy(), atol=0.05)


@pytest.mark.parametrize(("height", "width", "alike"), [(IMGSZ_PX, IMGSZ_PX, 0.999), (110, 150, 0.95)])
def test_masks_as_the_host_predicts(tmp_path, height, width, alike):
    """The host's are of the input's size, ours of the image's: where these differ, pixels along a border may."""
    predicted = Predicted("yolov8n-seg", tmp_path, height, width)
    inner_height = round(height * IMGSZ_PX / width)
    top = (IMGSZ_PX - inner_height) // 2
    rows = ((np.arange(height) + 0.5) * inner_height / height).astype(int) + top
    columns = ((np.arange(width) + 0.5) * IMGSZ_PX / width).astype(int)
    expected = predicted.expected.masks.data.numpy().astype(bool)[:, rows][..., columns]
    assert len(expected) > 0
    for one, other in zip(predicted.found, expected, strict=True):
        assert one.mask.shape == (height, width)
        assert (one.mask == other).mean() >= alike


def test_plain_values(predicted):
    for one in predicted.found:
        value = json.loads(json.dumps(one.to_json()))
        assert set(value) - {"corners", "key_points", "outline"} == {"class", "name", "score", "box"}
        assert ("outline" in value) == (one.mask is not None)
        np.testing.assert_allclose(value["box"], one.box, atol=0.006)


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_nothing_found(task):
    extras = {"segment": {"mask_coefficients": [0, 1]}, "pose": {"key_points": [0, 1], "visibility": [2]}}
    extras |= {"obb": {"angles": [0]}}
    network = Network(
        name="n", task=task, imgsz_px=IMGSZ_PX, classes=("a",), end_to_end=False, extras=extras.get(task, {})
    )
    rows = 5 + sum(map(len, network.extras.values()))
    outputs = [np.zeros((1, rows, 7), np.float32), np.zeros((1, 2, 24, 24), np.float32)]
    _, placement = letterbox(np.zeros((20, 30, 3), np.uint8), IMGSZ_PX)
    assert find(outputs, placement, network, confidence=0.25, iou=0.7) == []


class TestRotated:
    @given(seed=st.integers(0, 9999), count=st.integers(1, 20))
    @settings(max_examples=60, deadline=None)
    def test_overlap_as_the_host(self, seed, count):
        random = np.random.default_rng(seed)
        boxes = np.concatenate([random.uniform(1, 60, (count, 4)), random.uniform(-2, 2, (count, 1))], axis=1)
        expected = batch_probiou(torch.from_numpy(boxes), torch.from_numpy(boxes)).numpy()
        np.testing.assert_allclose(similarity(boxes), expected, atol=1e-6)

    @given(seed=st.integers(0, 9999), anchors=st.integers(0, 60), classes=st.integers(1, 3))
    @settings(max_examples=60, deadline=None)
    def test_chosen_as_the_host(self, seed, anchors, classes):
        assume(anchors != 6)  # the host takes six columns for the rows of an end-to-end head
        random = np.random.default_rng(seed)
        boxes = random.integers(1, 8, (4, anchors)) * 8.0 + random.uniform(0, 2, (4, anchors))
        scores = random.permutation(classes * anchors).reshape(classes, anchors) / (classes * anchors + 1)
        raw = np.concatenate([boxes, scores, random.uniform(-1, 2, (1, anchors))])[None].astype(np.float32)
        _, placement = letterbox(np.zeros((IMGSZ_PX, IMGSZ_PX, 3), np.uint8), IMGSZ_PX)
        found = rotated_detections(raw, placement, classes=classes, iou=0.45)
        expected = non_max_suppression(torch.from_numpy(raw), 0.25, 0.45, nc=classes, rotated=True)[0].numpy()
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-4)

    @given(seed=st.integers(0, 9999))
    @settings(max_examples=30, deadline=None)
    def test_corners_as_the_host(self, seed):
        boxes = np.random.default_rng(seed).uniform(-3, 50, (6, 5)).astype(np.float32)
        expected = xywhr2xyxyxyxy(torch.from_numpy(boxes)).numpy()
        np.testing.assert_allclose(corners(boxes), expected, atol=1e-3)

    def test_end_to_end_rows_are_final(self):
        raw = np.array([[[30, 20, 10, 4, 0.9, 1, 0.3], [30, 20, 10, 4, 0.2, 1, 0.3]]], np.float32)
        _, placement = letterbox(np.zeros((96, 48, 3), np.uint8), IMGSZ_PX)
        found = rotated_detections(raw, placement, classes=2, end_to_end=True)
        np.testing.assert_allclose(found, [[6, 20, 10, 4, 0.9, 1, 0.3]], atol=1e-6)  # padding of 24 px on the left


class TestOutline:
    def test_of_a_square(self):
        mask = np.zeros((20, 30), bool)
        mask[5:10, 7:13] = True
        mask[0, 0] = True  # smaller
        points = outline(mask)
        assert (points.min(axis=0).tolist(), points.max(axis=0).tolist()) == ([7, 5], [12, 9])

    def test_of_nothing(self):
        assert outline(np.zeros((4, 4), bool)).shape == (0, 2)


class TestDrawn:
    IMAGE = np.zeros((80, 120, 3), np.uint8)

    def drawn(self, **more):
        one = Finding(**{"class_id": 1, "name": "a", "score": 0.5, "box": (30.0, 40.0, 60.0, 70.0), **more})
        return draw(self.IMAGE, [one]).any(axis=2)

    def test_box_around_and_not_inside(self):
        found = self.drawn()
        assert found[70, 30:60].all()
        assert found[40:70, 60].all()
        assert not found[45:65, 35:55].any()
        assert not self.IMAGE.any()

    def test_rotated_box_in_place_of_the_upright_one(self):
        found = self.drawn(corners=np.float32([[45, 40], [60, 55], [45, 70], [30, 55]]))
        assert found[70, 45]
        assert found[55, 60]
        assert not found[68:, 32].any()

    def test_mask(self):
        mask = np.zeros((80, 120), bool)
        mask[45:65, 35:55] = True
        assert self.drawn(mask=mask)[45:65, 35:55].all()

    def test_key_points_that_are_visible(self):
        found = self.drawn(key_points=np.float32([[45, 50, 0.9], [45, 62, 0.1]]))
        assert found[50, 45]
        assert not found[62, 45]

    @pytest.mark.parametrize("name", ["person", "Müll", "人"])
    def test_any_name_and_boxes_over_the_edge(self, name):
        assert self.drawn(name=name, box=(-5.0, 0.0, 400.0, 3.0)).any()
