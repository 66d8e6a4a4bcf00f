"""What an artefact may lose of mAP: by hand."""

from __future__ import annotations

import pytest

from yolo_prune.export.accuracy import LOSS_LIMITS, compare_accuracy
from yolo_prune.hosts.ultralytics.evaluation import Evaluation, Scores


def evaluation(score: float, **more: Scores) -> Evaluation:
    figures = {"map50": 0.9, "map50_95": score, "precision": 0.5, "recall": 0.5}
    return Evaluation(split="val", images=8, imgsz_px=64, **figures, **more)


def scores(score: float) -> Scores:
    return Scores(map50=0.9, map50_95=score, precision=0.5, recall=0.5)


@pytest.mark.parametrize(("precision", "limit"), LOSS_LIMITS.items())
def test_a_loss_counts_and_a_gain_does_not(precision, limit):
    reference = evaluation(0.5)
    for score, passed in ((0.5 - 0.99 * limit, True), (0.5 - 1.01 * limit, False), (0.9, True)):
        found = compare_accuracy(reference, evaluation(score), precision=precision)
        assert found.passed == found.to_json()["passed"] == passed
        assert found.losses == {"box": pytest.approx(0.5 - score)}


def test_every_kind_of_prediction_is_judged():
    reference = evaluation(0.5, mask=scores(0.4))
    found = compare_accuracy(reference, evaluation(0.5, mask=scores(0.3)), precision="fp32")
    assert found.losses == {"box": 0, "mask": pytest.approx(0.1)}
    assert not found.passed
