"""Detections that are found again: matched by class and overlap, each once."""

from __future__ import annotations

import pytest

from yolo_prune.device.findings import Finding
from yolo_prune.device.reference import count_found_again, overlap


class TestFoundAgain:
    BOX = (0.0, 0.0, 10.0, 10.0)

    def reference(self, score=0.9, box=BOX):
        return [{"class": 0, "score": score, "box": list(box)}]

    def found(self, box=BOX, class_id=0):
        return [Finding(class_id=class_id, name="a", score=0.5, box=box).to_json()]

    @pytest.mark.parametrize(
        ("reference", "found", "expected"),
        [
            ({}, {}, (1, 1)),
            ({}, {"box": (0.0, 0.0, 10.0, 6.0)}, (1, 1)),
            ({}, {"box": (0.0, 0.0, 10.0, 4.0)}, (1, 0)),
            ({}, {"class_id": 1}, (1, 0)),
            ({"score": 0.3}, {}, (0, 0)),  # too near the threshold to be asked for
        ],
    )
    def test_by_hand(self, reference, found, expected):
        assert count_found_again(self.reference(**reference), self.found(**found), 0.25) == expected

    def test_each_only_once(self):
        assert count_found_again(self.reference() * 2, self.found(), 0.25) == (2, 1)

    def test_overlap(self):
        assert overlap((0, 0, 4, 4), (2, 0, 6, 4)) == pytest.approx(1 / 3)
        assert overlap((0, 0, 1, 1), (1, 1, 2, 2)) == overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0
