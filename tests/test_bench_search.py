"""Candidates' scores beside what they are worth: Spearman by hand, and one candidate from draw to line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bench_search import SearchBenchConfig, bench, counted, priced
from models import lively
from search_figures import SearchFigures

from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.surgery import trace_model

CELL = {
    "model": "m", "data": "d", "criterion": "l1", "target_macs": 0.5, "largest": 0.7, "epochs": 10, "batches": 100,
    "seed": 0, "imgsz_px": 320, "batch": 16,
}  # fmt: skip


def line(number: int, recalibrated: float, as_pruned: float, fine_tuned: float, **cell: Any) -> dict[str, Any]:
    scores = {"recalibrated": recalibrated, "as_pruned": as_pruned, "fine_tuned": fine_tuned}
    return {"cell": {**CELL, "number": number, **cell}, **scores}


class TestFigures:
    def test_by_hand(self):
        """One score in the order of the fine-tuned mAP, the other one in the reverse."""
        lines = [line(0, 0.1, 0.03, 0.4), line(1, 0.2, 0.02, 0.5), line(2, 0.3, 0.01, 0.6)]
        row = SearchFigures(lines=lines).table().splitlines()[2]
        assert "+1.00" in row
        assert "-1.00" in row
        assert "0.400..0.600" in row

    def test_other_settings_are_another_row_and_two_are_none(self):
        lines = [line(number, 0.1 * number, 0.2, 0.3, criterion=name) for name in ("l1", "taylor") for number in (1, 2)]
        assert SearchFigures(lines=lines).table().count("d, 320 px") == 0
        lines += [line(3, 0.1, 0.1, 0.2, criterion="taylor")]
        assert SearchFigures(lines=lines).table().count("d, 320 px") == 1

    def test_pictures_are_the_same_bytes(self, tmp_path):
        figures = SearchFigures(lines=[line(n, 0.1 * n, 0.2, 0.3) for n in range(3)])
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            figures.draw(tmp_path / name / "search.svg")
        assert (tmp_path / "a" / "search.svg").read_bytes() == (tmp_path / "b" / "search.svg").read_bytes()
        SearchFigures(lines=[]).draw(tmp_path / "none.svg")
        assert not (tmp_path / "none.svg").exists()


def test_the_closed_form_is_what_a_forward_pass_counts(dense_checkpoint):
    source = read_checkpoint(dense_checkpoint)
    config = SearchBenchConfig(model="-", data="-", counted=10, imgsz=64)
    assert counted(source, trace_model(source.model), config) == {"candidates": 10, "equal": 10}


def test_pricing_is_measured():
    assert priced(trace_model(lively("yolov8n")), 320)["a_second"] > 0


@pytest.mark.slow
def test_a_candidate_is_scored_and_fine_tuned_once(dense_checkpoint, tiny_data, tmp_path):
    config = SearchBenchConfig(
        model=str(dense_checkpoint), data=str(tiny_data), out=str(tmp_path / "out"), candidates=1, epochs=1, batches=2,
        imgsz=64, batch=4, workers=0, record=str(tmp_path / "search.jsonl"),
    )  # fmt: skip
    (found,) = bench(config).lines
    assert {"recalibrated", "as_pruned", "fine_tuned", "cell"} <= set(found)
    before = (tmp_path / "search.jsonl").read_bytes()
    assert bench(config).lines == [json.loads(before)]
    assert (tmp_path / "search.jsonl").read_bytes() == before
