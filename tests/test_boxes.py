"""Detections of two networks matched one to one: shares by hand, and laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_prune.device.boxes import (
    ANSWER,
    CONFIDENCE,
    BoxAgreement,
    compare_boxes,
    rotated_overlaps,
    upright_overlaps,
)


def rows(*found: tuple[float, float, float, float, float, float]) -> np.ndarray:
    return np.array(found, np.float32).reshape(-1, 6)


CAT = (0, 0, 10, 10, 0.9, 1)
DOG = (50, 50, 70, 90, 0.6, 2)


def drawn(seed: int, count: int) -> np.ndarray:
    """Return detections that overlap at most a little, best first."""
    random = np.random.default_rng(seed)
    corners = np.stack([np.arange(count) * 20, random.uniform(0, 50, count)], axis=1)
    scores = np.sort(random.uniform(CONFIDENCE + 0.01, 1, count))[::-1]
    sizes = random.uniform(5, 18, (count, 2))
    classes = random.integers(0, 3, count)
    return np.column_stack([corners, corners + sizes, scores, classes]).astype(np.float32)


class TestByHand:
    def test_the_same_object_twice(self):
        """The cat is found, shifted by one of ten pixels (IoU 9 / 11); of the dog a half (IoU 0.5)."""
        found = rows((1, 0, 11, 10, 0.5, 1), (50, 50, 70, 70, 0.5, 2))
        strict = compare_boxes([rows(CAT, DOG)], [found], iou=0.8)
        assert strict == BoxAgreement(iou=0.8, expected=2, found=1, answered=2, backed=1)
        assert strict.share == 0.5
        assert compare_boxes([rows(CAT, DOG)], [found], iou=0.9).found == 0
        assert compare_boxes([rows(CAT, DOG)], [found], iou=0.5).share == 1

    def test_another_class_is_another_object(self):
        assert compare_boxes([rows(CAT)], [rows((*CAT[:5], 2))], iou=0.5).found == 0

    def test_one_detection_cannot_answer_for_two(self):
        twice = compare_boxes([rows(CAT, CAT)], [rows(CAT)], iou=0.5)
        assert (twice.expected, twice.found, twice.answered, twice.backed) == (2, 1, 1, 1)

    def test_images_are_not_mixed(self):
        assert compare_boxes([rows(CAT), rows()], [rows(), rows(CAT)], iou=0.5).share == 0

    def test_a_lower_score_still_finds_the_object_and_need_not_be_found(self):
        faint = (*CAT[:4], (CONFIDENCE + ANSWER) / 2, 1)
        assert compare_boxes([rows(CAT)], [rows(faint)], iou=0.5) == BoxAgreement(
            iou=0.5, expected=1, found=1, answered=0, backed=0
        )
        assert compare_boxes([rows()], [rows(faint)], iou=0.5).share == 1

    def test_nothing_to_find(self):
        assert compare_boxes([rows()], [rows()], iou=0.5).share == 1
        assert compare_boxes([rows()], [rows(CAT)], iou=0.5).share == 0
        assert compare_boxes([rows(CAT)], [rows()], iou=0.5).share == 0

    def test_boxes_without_an_area(self):
        assert compare_boxes([rows((5, 5, 5, 5, 0.9, 1))], [rows((5, 5, 5, 5, 0.9, 1))], iou=0.5).found == 0


class TestLaws:
    @given(seed=st.integers(0, 999), count=st.integers(1, 30))
    @settings(max_examples=50, deadline=None)
    def test_a_network_agrees_with_itself_in_any_order(self, seed, count):
        one = drawn(seed, count)
        shuffled = np.random.default_rng(seed).permutation(one)
        assert compare_boxes([one], [shuffled], iou=0.99).share == 1

    @given(seed=st.integers(0, 999), count=st.integers(2, 30), lost=st.integers(1, 29))
    @settings(max_examples=50, deadline=None)
    def test_the_share_is_what_is_left_whoever_lost_it(self, seed, count, lost):
        lost = min(lost, count)
        one, less = drawn(seed, count), drawn(seed, count)[lost:]
        for sides in (([one], [less]), ([less], [one])):
            assert compare_boxes(*sides, iou=0.9).share == pytest.approx((count - lost) / count)

    @given(seed=st.integers(0, 999), count=st.integers(1, 20), shift=st.floats(0, 10))
    @settings(max_examples=50, deadline=None)
    def test_asking_for_more_overlap_never_finds_more(self, seed, count, shift):
        one, other = drawn(seed, count), drawn(seed, count)
        other[:, [0, 2]] += np.float32(shift)
        found = [compare_boxes([one], [other], iou=iou).found for iou in (0.3, 0.5, 0.7, 0.9)]
        assert found == sorted(found, reverse=True)


class TestRotated:
    """Rows x, y, width, height, score, class, angle in radians."""

    def rows(self, *boxes: tuple[float, float, float, float, float]) -> np.ndarray:
        return np.array([[*box[:4], 0.9, 1, box[4]] for box in boxes], np.float32).reshape(-1, 7)

    def test_by_hand(self):
        """A square turned by 45 degrees shares an octagon of 8 (sqrt 2 - 1) with itself; half a side away, a third."""
        turned, aside = (0, 0, 2, 2, np.pi / 4), (1, 0, 2, 2, 0)
        found = rotated_overlaps(self.rows((0, 0, 2, 2, 0)), self.rows(turned, aside, (9, 9, 2, 2, 1)))
        octagon = 8 * (2**0.5 - 1)
        np.testing.assert_allclose(found, [[octagon / (8 - octagon), 1 / 3, 0]], atol=1e-5)

    def test_a_quarter_turn_with_swapped_sides_is_the_same_box(self):
        one, other = self.rows((5, 7, 4, 2, 0.3)), self.rows((5, 7, 2, 4, 0.3 - np.pi / 2))
        np.testing.assert_allclose(rotated_overlaps(one, other), [[1]], atol=1e-5)
        assert compare_boxes([one], [other], iou=0.99, overlaps=rotated_overlaps).share == 1

    def test_one_without_area_overlaps_nothing(self):
        assert rotated_overlaps(self.rows((0, 0, 0, 2, 0)), self.rows((0, 0, 0, 2, 0))).tolist() == [[0]]
        assert rotated_overlaps(self.rows(), self.rows((0, 0, 1, 1, 0))).shape == (0, 1)

    @given(st.integers(0, 1000))
    @settings(max_examples=30, deadline=None)
    def test_those_that_are_not_turned_overlap_as_upright_ones(self, seed):
        upright = drawn(seed, 6)
        centre, size = (upright[:, :2] + upright[:, 2:4]) / 2, upright[:, 2:4] - upright[:, :2]
        turned = np.column_stack([centre, size, upright[:, 4:6], np.zeros(len(upright))]).astype(np.float32)
        np.testing.assert_allclose(
            rotated_overlaps(turned[:3], turned), upright_overlaps(upright[:3], upright), atol=1e-4
        )
