"""What criteria are worth before a fine-tune: the table by hand, and cells from cut to line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import bench_criteria
import pytest
from bench_criteria import CriteriaConfig, CriteriaFigures, bench

from yolo_prune.hosts.slim import MARKER
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.collection import collect_evidence

PLAIN = {
    "model": "0a", "name": "yolov8n", "criterion": "l2", "allocation": "uniform", "budget": 0.5, "seed": 0,
    "data": "d", "imgsz_px": 64, "batch": 4, "batches": 2,
}  # fmt: skip


def line(score: float, **values: Any) -> dict[str, Any]:
    return {"cell": {**PLAIN, **values}, "recalibrated": score, "as pruned": 0.0}


def rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of the table, the heading first."""
    lines = CriteriaFigures(records=records).table(markdown=True).strip().splitlines()
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in lines if row.startswith("|")]
    return [found[0], *found[2:]]


class TestFigures:
    def test_seeds_share_a_row_and_other_conditions_do_not(self):
        records = [line(0.2), line(0.4, seed=1, model="0b"), line(0.9, batches=13)]
        records += [line(0.35, criterion="taylor"), line(0.1, criterion="taylor", budget=0.3)]
        head, *body = rows(records)
        assert head[-4:] == ["50% recalibrated", "50% as pruned", "30% recalibrated", "30% as pruned"]
        assert [row[1:] for row in body] == [
            ["yolov8n", "l2", "uniform", "0", "0.900", "0.000", "-", "-"],
            ["yolov8n", "taylor", "uniform", "0", "0.350", "0.000", "0.100", "0.000"],
            ["yolov8n", "l2", "uniform", "0 1", "0.300 (0.200..0.400)", "0.000 (0.000..0.000)", "-", "-"],
        ]

    def test_names_and_checkpoints_do_not_share_a_row(self):
        """Seeds of one name are averaged; a second checkpoint of one seed is something else that nobody named."""
        other = {"name": "yolo11n", "model": "1a"}
        _, *body = rows([line(0.2), line(0.4, seed=1, model="0b"), line(0.6, **other)])
        assert [(row[1], row[4], row[5]) for row in body] == [
            ("yolo11n", "0", "0.600"),
            ("yolov8n", "0 1", "0.300 (0.200..0.400)"),
        ]
        _, *body = rows([line(0.2), line(0.4, seed=1, model="0b"), line(0.6, model="0c"), line(0.1, **other)])
        assert [(row[1], row[4], row[5]) for row in body] == [
            ("yolov8n 0c", "0", "0.600"),
            ("yolov8n 0b", "1", "0.400"),
            ("yolov8n 0a", "0", "0.200"),
            ("yolo11n", "0", "0.100"),
        ]

    def test_a_mean_of_fewer_seeds_says_so(self):
        records = [line(0.1 * seed, seed=seed, model=f"0{seed}") for seed in (1, 2, 3)]
        records += [line(0.05, seed=1, model="01", budget=0.3)]
        _, row = rows(records)
        assert row[4] == "1 2 3"
        assert row[5] == "0.200 (0.100..0.300)"
        assert row[7] == "0.050, 1 of 3 seeds"

    def test_what_cannot_be_is_shown_and_says_why(self):
        failed = {"cell": {**PLAIN, "budget": 0.01}, "failed": "target_macs=0.01 cannot be reached"}
        _, row = rows([line(0.2), failed])
        assert row[5:] == ["0.200", "0.000", "cannot be", "cannot be"]
        assert CriteriaFigures(records=[failed]).table().endswith("batches=2: target_macs=0.01 cannot be reached\n")


@pytest.fixture
def config(tmp_path, dense_checkpoint, tiny_data) -> CriteriaConfig:
    return CriteriaConfig(
        model=str(dense_checkpoint), data=str(tiny_data), criteria=["taylor"], budgets=[0.5], imgsz=64, batch=4,
        batches=2, record=str(tmp_path / "criteria.jsonl"),
    )  # fmt: skip


class TestCells:
    def test_one_looks_at_the_data_once_and_is_measured_with_and_without(self, config, monkeypatch):
        """Both are of the same widths, and each score is of the network that it is called after."""
        looked, seen = [], []
        evaluate = bench_criteria.evaluate
        monkeypatch.setattr(
            "yolo_prune.pipeline.prune.collect_evidence",
            lambda *args, **more: looked.append(1) or collect_evidence(*args, **more),
        )

        def evaluated(model: Path, **more: Any) -> Any:
            found = evaluate(model, **more)
            marker = getattr(read_checkpoint(model).model, MARKER)
            seen.append((marker["recalibrated"], marker["plan"]["choice"]["criterion"], marker["widths"]))
            return dataclasses.replace(found, map50_95=0.01 * len(seen))  # random weights find nothing: all were equal

        monkeypatch.setattr(bench_criteria, "evaluate", evaluated)
        (found,) = bench(config).records
        assert len(looked) == 1
        assert sorted(one[:2] for one in seen) == [(0, "taylor"), (2, "taylor")]
        assert seen[0][2] == seen[1][2]
        scores = {seen[number][0]: 0.01 * (number + 1) for number in range(2)}
        assert (found["as pruned"], found["recalibrated"]) == (scores[0], scores[2])
        assert found["cell"]["name"] == "yolov8n"

    def test_chance_draws_anew_for_every_seed(self, config, monkeypatch):
        plans = {}
        prune = bench_criteria.prune
        monkeypatch.setattr(bench_criteria, "prune", lambda asked: _kept(prune(asked), plans))
        config.criteria = ["random"]
        for config.seed in (0, 1):
            bench(config)
        assert {seed: len(found) for seed, found in plans.items()} == {0: 2, 1: 2}
        assert plans[0][0] == plans[0][1]  # with and without recalibration
        assert plans[0][0] != plans[1][0]

    def test_one_that_cannot_be_is_a_line_and_the_others_are_measured_once(self, config):
        config.criteria, config.budgets = ["l2"], [0.01, 0.5]
        config.name = "retrained"
        failed, found = bench(config).records
        assert found["cell"]["name"] == "retrained"
        assert "target_macs=0.01 cannot be reached" in failed["failed"]
        assert {"recalibrated", "as pruned", "seconds"} <= set(found)
        before = Path(config.record).read_bytes()
        assert bench(config).records == [failed, found]
        assert Path(config.record).read_bytes() == before
        assert json.loads(before.splitlines()[1]) == found


def _kept(result: Any, plans: dict[int, list[Any]]) -> Any:
    plans.setdefault(result.plan.choice["seed"], []).append(result.plan.groups)
    return result
