"""A device finds what the host's own prediction finds: letterbox, scores, suppression, back into the image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import lively
from ultralytics import YOLO
from ultralytics.data.augment import LetterBox
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes

from yolo_prune.device.detections import detections, letterbox
from yolo_prune.device.images import synthetic_images

IMGSZ_PX = 96


def drawn(height, width, seed=0):
    side = max(height, width)
    return np.ascontiguousarray(synthetic_images(1, side, seed=seed)[0][:height, :width])


class TestLetterbox:
    @given(height=st.integers(1, 300), width=st.integers(1, 300))
    @settings(max_examples=60, deadline=None)
    def test_as_the_host(self, height, width):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        found, _ = letterbox(image, IMGSZ_PX)
        expected = LetterBox(new_shape=(IMGSZ_PX, IMGSZ_PX), auto=False)(image=image)
        expected = expected[..., ::-1].transpose(2, 0, 1)[None] / np.float32(255)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert np.array_equal(found, expected.astype(np.float32))

    @given(height=st.integers(8, 300), width=st.integers(8, 300), seed=st.integers(0, 99))
    @settings(max_examples=60, deadline=None)
    def test_undone_as_the_host(self, height, width, seed):
        _, placement = letterbox(np.zeros((height, width, 3), np.uint8), IMGSZ_PX)
        boxes = np.random.default_rng(seed).uniform(-10, IMGSZ_PX + 10, (5, 4))
        expected = scale_boxes((IMGSZ_PX, IMGSZ_PX), boxes.copy(), (height, width))
        assert np.allclose(placement.undo(boxes), expected, atol=1e-9)


class TestDetections:
    # Six anchors the host takes for the six columns of an end-to-end head.
    ANCHORS = st.integers(0, 80).filter(lambda count: count != 6)

    @given(seed=st.integers(0, 9999), anchors=ANCHORS, classes=st.integers(1, 4), extras=st.integers(0, 2))
    @settings(max_examples=100, deadline=None)
    def test_as_the_host(self, seed, anchors, classes, extras):
        """Boxes on a coarse grid overlap a lot; scores are all different, so that the order is settled."""
        random = np.random.default_rng(seed)
        boxes = random.integers(1, 8, (4, anchors)) * 8.0 + random.uniform(0, 2, (4, anchors))
        scores = random.permutation(classes * anchors).reshape(classes, anchors) / (classes * anchors + 1)
        raw = np.concatenate([boxes, scores, random.normal(size=(extras, anchors))])[None].astype(np.float32)
        _, placement = letterbox(np.zeros((IMGSZ_PX, IMGSZ_PX, 3), np.uint8), IMGSZ_PX)
        found = detections(raw, placement, classes=classes, iou=0.45)
        expected = non_max_suppression(torch.from_numpy(raw), 0.25, 0.45, nc=classes)[0].numpy()
        expected[:, :4] = expected[:, :4].clip(0, IMGSZ_PX)
        assert found.shape == expected.shape
        assert np.allclose(found, expected, atol=1e-4)

    def test_end_to_end(self):
        raw = np.array([[[1, 2, 30, 40, 0.9, 1], [5, 5, 9, 9, 0.3, 0], [5, 5, 9, 9, 0.1, 0]]], np.float32)
        _, placement = letterbox(np.zeros((IMGSZ_PX, IMGSZ_PX, 3), np.uint8), IMGSZ_PX)
        assert np.array_equal(detections(raw, placement, classes=2, end_to_end=True), raw[0, :2])

    def test_nothing_found(self):
        _, placement = letterbox(np.zeros((20, 30, 3), np.uint8), IMGSZ_PX)
        assert detections(np.zeros((1, 6, 10), np.float32), placement, classes=2).shape == (0, 6)

    @pytest.mark.parametrize(("height", "width"), [(96, 96), (70, 96), (200, 90)])
    def test_a_whole_prediction(self, height, width, tmp_path):
        """The same boxes as `YOLO.predict`, on a network whose scores are spread out."""
        file = tmp_path / "räksmörgås model.pt"
        model = lively("yolov8n")
        torch.save({"model": model, "train_args": {}}, file)
        image = drawn(height, width)
        yolo = YOLO(file)
        expected = yolo.predict(image, imgsz=IMGSZ_PX, conf=0.01, rect=False, verbose=False)[0].boxes.data.numpy()
        tensor, placement = letterbox(image, IMGSZ_PX)
        with torch.no_grad():
            raw = yolo.model(torch.from_numpy(tensor))[0].numpy()
        found = detections(raw, placement, classes=4, confidence=0.01)
        assert len(found) == len(expected) > 0
        assert np.allclose(found, expected, atol=1e-2)
