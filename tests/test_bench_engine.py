"""The benchmark of the engine: its arithmetic, its turns, its limits, and that no failure is hidden."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import bench_engine
import pytest
from bench_engine import BenchConfig, bench, due
from engine_figures import AS_IT_IS, OURS, SPLIT, EngineFigures, failure, in_words, median, ratios
from measured_job import Job, outcome_of

from yolo_prune.errors import YoloPruneError

TOOLS = Path(bench_engine.__file__).parent
FAILED = {"failure": "fails: IndexError", "detail": "index 384 is out of bounds"}


def outcome(seconds: float, above_mb: float = 10.0, params: float = 2e6) -> dict[str, float]:
    steps = dict.fromkeys(("trace_s", "plan_s", "apply_s", "verify_s", "first_use_s"), 0.1)
    return {**steps, "seconds": seconds, "above_mb": above_mb, "peak_mb": 800, "macs_kept": 0.5, "params": params}


def cells(figures: EngineFigures, start: str) -> list[str]:
    """The cells of the last row that starts so."""
    row = [line for line in figures.table(markdown=True).splitlines() if line.startswith(f"| {start} ")][-1]
    return [cell.strip() for cell in row.strip("|").split("|")]


def figures_of(models: dict) -> EngineFigures:
    return EngineFigures(machine={"cpu": "c", "runtimes": {"torch": "2"}}, threads=1, models=models)


class TestArithmetic:
    def test_ratios_are_paired(self):
        # Every turn is slower than the one before; within a turn ours always takes half as long.
        ours, theirs = [outcome(seconds) for seconds in (1, 2, 4)], [outcome(seconds) for seconds in (2, 4, 8)]
        assert ratios(ours, theirs, "seconds") == [0.5, 0.5, 0.5]

    def test_ratios_in_words(self):
        assert in_words([0.5, 0.25, 2.0]) == "0.500 (0.250..2.000)"
        assert in_words([]) == "-"

    def test_no_memory_at_all_gives_no_ratio(self):
        assert ratios([outcome(1, above_mb=3)], [outcome(1, above_mb=0)], "above_mb") == []

    def test_medians_and_time_for_a_million_parameters(self):
        figures = figures_of({"yolov8n": {OURS: [outcome(3), outcome(1), outcome(2)]}})
        row = cells(figures, "yolov8n")
        assert (row[1], row[5], row[8]) == ("2.0", "2.00", "1000")

    def test_growth_of_a_family(self):
        small, large = [outcome(1)], [outcome(3, params=4e7)]
        table = figures_of({"yolov8n": {OURS: small}, "yolov8x": {OURS: large}, "yolo11n": {OURS: small}}).table()
        assert "yolov8n to yolov8x: 20.0 times the parameters, 3.0 times the time." in table
        assert table.count("times the time") == 1

    def test_first_use_of_both_is_said(self):
        alone = figures_of({"yolov8n": {OURS: [outcome(1)]}})
        both = figures_of({"yolov8n": {OURS: [outcome(1)], AS_IT_IS: [FAILED], SPLIT: [outcome(1)]}})
        assert "First use" not in alone.table()
        assert "ours 0.10 s, theirs 0.10 s" in both.table()


class TestRecord:
    """What README promises of the engine, held against what was measured last."""

    @pytest.fixture(scope="class")
    def models(self) -> dict[str, dict[str, list[dict[str, float]]]]:
        return json.loads((TOOLS / "records" / "engine.json").read_text())["models"]

    @pytest.mark.parametrize(("key", "bound"), [("seconds", 0.5), ("above_mb", 1.0), ("peak_mb", 1.0)])
    def test_at_most_half_the_time_and_no_more_memory_than_the_peer(self, models, key, bound):
        found = {
            f"{name}, {side}": statistics.median(ratios(sides[OURS], sides[side], key))
            for name, sides in models.items()
            for side in sides
            if side != OURS and not failure(sides[side])
        }
        assert len(found) == len(models)
        assert {name: ratio for name, ratio in found.items() if ratio > bound} == {}

    @pytest.mark.parametrize("family", ["yolov5", "yolov8"])
    def test_time_grows_no_faster_than_parameters(self, models, family):
        small, large = (models[f"{family}{scale}"][OURS] for scale in "nx")
        size, time = (median(large, key) / median(small, key) for key in ("params", "seconds"))
        assert time <= size


class TestFailures:
    def test_are_rows_and_are_said_in_full(self):
        sides = {OURS: [outcome(1), outcome(3)], AS_IT_IS: [FAILED], SPLIT: [outcome(4), outcome(4)]}
        figures = figures_of({"yolov8n": sides})
        assert cells(figures, f"yolov8n, {AS_IT_IS}")[1:4] == ["2.00", "fails: IndexError", "-"]
        assert cells(figures, f"yolov8n, {SPLIT}")[1:4] == ["2.00", "4.00", "0.500 (0.250..0.750)"]
        assert "yolov8n, as it is: fails: IndexError (index 384 is out of bounds)." in figures.table()

    def test_ours_are_shown_alike(self):
        figures = figures_of({"yolov8n": {OURS: [FAILED], AS_IT_IS: [outcome(2)]}})
        assert FAILED["failure"] in cells(figures, f"yolov8n, {AS_IT_IS}")
        assert "yolov8n, yolo_prune: fails" in figures.table()

    def test_are_not_repeated_and_call_for_the_split(self):
        sides: dict = {}
        turns = [[], [], []]
        for turn in turns:
            for side in due(sides, peer=True):
                turn.append(side)
                sides.setdefault(side, []).append(FAILED if side == AS_IT_IS else outcome(1))
        assert turns == [[OURS, AS_IT_IS, SPLIT], [OURS, SPLIT], [OURS, SPLIT]]

    def test_nothing_is_split_without_need(self):
        assert list(due({AS_IT_IS: [outcome(1)]}, peer=True)) == [OURS, AS_IT_IS]
        assert list(due({}, peer=False)) == [OURS]

    def test_without_the_peer_the_way_to_it_is_told(self, monkeypatch):
        monkeypatch.setattr(bench_engine.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(YoloPruneError, match=r"yolo-prune\[bench\]"):
            bench(BenchConfig())


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        pytest.param("while True: pass", "not finished in 0.5 s", marks=pytest.mark.exhaustive),
        ("raise IndexError('far')", "fails: IndexError"),
        pytest.param("bytearray(10**11)", "more than 40 GB", marks=pytest.mark.exhaustive),
        pytest.param("import os; os._exit(3)", "fails: exit code 3", marks=pytest.mark.exhaustive),
        ("held = bytearray(10**8)", None),
    ],
)
def test_a_job_stays_within_its_limits(tmp_path, monkeypatch, work, expected):
    monkeypatch.setenv("PYTHONPATH", str(TOOLS))
    script = tmp_path / "script.py"
    script.write_text(
        "from measured_job import Job, Meter, answer\n"
        "def measure(job):\n"
        "    with Meter(job) as meter:\n"
        f"        {work}\n"
        "    return meter.figures\n"
        "answer(measure, Job)\n"
    )
    limit_s = 0.5 if "while" in work else 60.0
    found = outcome_of(script, Job(model="none", threads=1, limit_s=limit_s, limit_gb=40))
    assert found.get("failure") == expected
    if expected is None:
        assert 95 < found["above_mb"] < 120
