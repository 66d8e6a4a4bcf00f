"""Candidates' scores beside what they are worth: Spearman by hand, and one candidate from draw to line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import bench_search
import numpy as np
import pytest
from bench_search import SearchBenchConfig, bench, counted, priced
from models import lively
from scipy.stats import spearmanr
from search_figures import SearchFigures, difference
from threadpoolctl import threadpool_info, threadpool_limits

from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.surgery import trace_model

CELL = {
    "model": "m", "data": "d", "criterion": "l1", "target_macs": 0.5, "largest": 0.7, "epochs": 10, "batches": 100,
    "seed": 0, "imgsz_px": 320, "batch": 16,
}  # fmt: skip


def line(number: int, recalibrated: float, as_pruned: float, fine_tuned: float, **cell: Any) -> dict[str, Any]:
    scores = {"recalibrated": recalibrated, "as_pruned": as_pruned, "fine_tuned": fine_tuned}
    return {
        "cell": {**CELL, "number": number, **cell},
        **scores,
        "macs": 500 - number,
        "macs_kept": 0.5 - number / 1000,
    }


def cells_of(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The only row of the table, by its heading."""
    head, _, row = SearchFigures(lines=lines).table(markdown=True).splitlines()[:3]
    names, values = ([cell.strip() for cell in text.strip("|").split("|")] for text in (head, row))
    return dict(zip(names, values, strict=True))


class TestFigures:
    def test_by_hand(self):
        """One score in the order of the fine-tuned mAP, the other one in the reverse, as are the MACs."""
        row = cells_of([line(0, 0.1, 0.03, 0.4), line(1, 0.2, 0.02, 0.5), line(2, 0.3, 0.01, 0.6)])
        assert row["Spearman, recalibrated"] == "+1.00 (p 0.000), 3 distinct"
        assert row["Spearman, as pruned"] == "-1.00 (p 0.000), 3 distinct"
        assert row["Spearman, MACs"] == "-1.00 (p 0.000), 3 distinct"
        assert row["mAP50-95 val after them"] == "0.400..0.600"
        assert row["difference (95%)"] == "+2.00 (+2.00..+2.00, 11% of the draws undefined)"  # 3 of 27 are of one alone

    def test_of_scores_that_are_all_equal_nothing_is_known(self):
        lines = [line(number, 0.1 * number, 0.0, 0.3 + 0.1 * number) for number in range(4)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            row = cells_of(lines)
        assert row["Spearman, as pruned"] == "undefined: all scores equal, 1 distinct"
        assert row["Spearman, recalibrated"] == "+1.00 (p 0.000), 4 distinct"
        assert row["difference (95%)"] == "undefined"
        tuned = cells_of([{**one, "fine_tuned": 0.5} for one in lines])
        assert tuned["Spearman, recalibrated"] == "undefined: all mAPs equal, 4 distinct"

    def test_other_settings_are_another_row_and_two_are_none(self):
        lines = [line(number, 0.1 * number, 0.2, 0.3, criterion=name) for name in ("l1", "taylor") for number in (1, 2)]
        assert SearchFigures(lines=lines).table().count("d, 320 px") == 0
        lines += [line(3, 0.1, 0.1, 0.2, criterion="taylor")]
        assert SearchFigures(lines=lines).table().count("d, 320 px") == 1

    def test_what_was_priced_and_counted_is_told_and_is_no_candidate(self):
        priced = {
            "cell": {"kind": "pricing", "model": "m", "imgsz_px": 320},
            "a_second": 34567,
            "machine": {"cpu": "C"},
        }
        equal = {"cell": {"kind": "counting", "model": "m", "imgsz_px": 320, "candidates": 9, "seed": 0}, "equal": 8}
        figures = SearchFigures(lines=[priced, equal, *(line(n, 0.1 * n, 0.2 * n, 0.3) for n in range(3))])
        for markdown in (False, True):
            text = figures.table(markdown=markdown)
            assert text.count("d, 320 px") == 1
            assert "priced on one core (C), model m at 320 px: 34,567 candidates a second\n" in text
            assert "MACs counted by a forward pass = priced, model m at 320 px: 8 of 9\n" in text
        assert text.splitlines()[-3] == ""  # or they would be rows of the Markdown table
        assert figures.to_json() == {"lines": figures.lines}

    def test_pictures_are_the_same_bytes(self, tmp_path):
        figures = SearchFigures(lines=[line(n, 0.1 * n, 0.2, 0.3) for n in range(3)])
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            figures.draw(tmp_path / name / "search.svg")
        assert (tmp_path / "a" / "search.svg").read_bytes() == (tmp_path / "b" / "search.svg").read_bytes()
        SearchFigures(lines=[]).draw(tmp_path / "none.svg")
        assert not (tmp_path / "none.svg").exists()


class TestDifference:
    """The interval is that of resampled candidates, which both scores share."""

    def test_is_what_resampling_by_hand_gives(self):
        generator = np.random.default_rng(1)
        tuned = generator.random(16)
        scores = [tuned + 0.1 * generator.random(16), generator.random(16).round(1)]
        found = difference(*scores, tuned)
        ranks = [spearmanr(one, tuned).statistic for one in scores]
        assert found.value == pytest.approx(ranks[0] - ranks[1])
        hand = []
        for _ in range(2000):
            drawn = generator.integers(16, size=16)
            first, second = (spearmanr(one[drawn], tuned[drawn]).statistic for one in scores)
            hand.append(first - second)
        assert (found.low, found.high) == pytest.approx(tuple(np.percentile(hand, [2.5, 97.5])), abs=0.05)
        assert found == difference(*scores, tuned)
        assert found.undefined == 0.0

    def test_equal_scores_differ_by_nothing_and_draws_of_one_candidate_tell_nothing(self):
        """A third of the draws lack the only candidate that differs: (1 - 1/8)**8."""
        tuned = np.arange(8.0)
        assert difference(tuned, tuned, tuned).low == difference(tuned, tuned, tuned).high == 0.0
        found = difference(tuned, (tuned == 7.0).astype(float), tuned)
        assert found.undefined == pytest.approx((7 / 8) ** 8, abs=0.02)
        assert f"{found.undefined:.0%} of the draws" in found.in_words()
        assert np.isfinite([found.low, found.high]).all()


def test_the_closed_form_is_what_a_forward_pass_counts(dense_checkpoint):
    source = read_checkpoint(dense_checkpoint)
    config = SearchBenchConfig(model="-", data="-", counted=10, imgsz=64)
    assert counted(source, trace_model(source.model), config) == {"equal": 10}


def test_pricing_is_measured_on_one_core(monkeypatch):
    """A BLAS that computes with several threads would make the figure that of a machine."""
    graph, threads = trace_model(lively("yolov8n")), set()
    price = type(graph.cost).macs

    def watched(*args: Any, **kwargs: Any) -> Any:
        threads.update(pool["num_threads"] for pool in threadpool_info())
        return price(*args, **kwargs)

    monkeypatch.setattr(type(graph.cost), "macs", watched)
    with threadpool_limits(2):
        assert {pool["num_threads"] for pool in threadpool_info()} == {2}
        assert priced(graph, 320)["a_second"] > 0
    assert threads == {1}


@pytest.mark.slow
def test_a_candidate_is_scored_and_fine_tuned_once(dense_checkpoint, tiny_data, tmp_path, monkeypatch):
    config = SearchBenchConfig(
        model=str(dense_checkpoint), data=str(tiny_data), out=str(tmp_path / "out"), candidates=1, epochs=1, batches=2,
        imgsz=64, batch=4, workers=0, record=str(tmp_path / "search.jsonl"), counted=2,
    )  # fmt: skip
    pricing, counting, found = bench(config).lines
    assert pricing["a_second"] > 0
    assert pricing["machine"]["cores"] > 0
    assert counting["equal"] == counting["cell"]["candidates"] == 2
    assert {"recalibrated", "as_pruned", "fine_tuned", "cell"} <= set(found)
    assert found["cell"]["criterion"] == "taylor"
    graph = trace_model(read_checkpoint(next(Path(config.out).rglob("slim.pt"))).model)
    assert found["macs"] == graph.cost.macs(graph.widths(), imgsz_px=64)
    assert 0.49 < found["macs_kept"] <= 0.5

    def refuse(*_: Any) -> Any:
        raise AssertionError("it is in the record")

    before = (tmp_path / "search.jsonl").read_bytes()
    for name in ("priced", "counted", "Laboratory"):
        monkeypatch.setattr(bench_search, name, refuse)
    assert bench(config).lines == [pricing, counting, found]
    assert (tmp_path / "search.jsonl").read_bytes() == before
