"""Speed-ups of slim artefacts: what makes a cell another one, the table by hand, and a line that can be read back."""

from __future__ import annotations

import dataclasses
import shutil

import bench_speedups
import pytest
from bench_speedups import DENSE, Cell, SpeedupFigures, SpeedupsConfig, bench

from yolo_prune.device import timings
from yolo_prune.device.benchmark_record import BenchmarkReport
from yolo_prune.errors import ConfigError
from yolo_prune.files import read_lines, sha256

CELL = Cell(
    model="slim", model_sha256="0" * 12, backend="onnxruntime", target_macs=0.5, allocations=("uniform",),
    multiples=(8,), imgsz_px=64, threads=1, runs=3,
)  # fmt: skip


def line(cell: Cell, ratio: float = 1.5):
    found = {"macs": 0.5, "ratio": ratio, "p25": ratio - 0.1, "p75": ratio + 0.1}
    return {"cell": dataclasses.asdict(cell), "slim": {"uniform, 8": found}}


def test_the_table_by_hand():
    """Half of the MACs are worth two at most; a backend that was not timed has no figure."""
    other = dataclasses.replace(CELL, model="other", backend="ncnn")
    text = SpeedupFigures(records=[line(CELL), line(other, 1.7)]).table(markdown=True)
    first, second = text.splitlines()[2:]
    for cell in ("slim, 64 px, 1 threads", "uniform, 8", "50.0%", "2.00x", "1.50x (1.40..1.60)"):
        assert cell in first
    assert "1.70x (1.60..1.80)" in second
    assert first.rstrip(" |").endswith("-") != second.rstrip(" |").endswith("-")


class TestCells:
    @pytest.fixture
    def run(self, dense, desk, monkeypatch):
        """Run the tool, a formula in place of the clock; return how many cells were timed."""
        calls: list[Cell] = []
        monkeypatch.setattr(bench_speedups, "timed", lambda cell, _: calls.append(cell) or line(cell))

        def run(**change) -> int:
            settings = {"models": [str(dense)], "backends": ["onnxruntime"], "record": str(desk / "r.jsonl"), **change}
            calls.clear()
            bench(SpeedupsConfig(**settings))
            return len(calls)

        assert run() == 1
        assert calls[0].model_sha256 == sha256(dense)[:12]
        return run

    @pytest.mark.parametrize(
        "change",
        [
            {"allocations": ["uniform"]},
            {"multiples": [8]},
            {"runs": 50},
            {"target_macs": 0.4},
            {"imgsz": 320},
            {"threads": 1},
            {"backends": ["ncnn"]},
        ],
    )
    def test_another_setting_is_another_cell(self, run, change):
        assert run() == 0
        assert run(**change) == 1
        assert run(**change) == 0

    def test_another_network_of_the_same_name_is_another_cell(self, run, dense, slim):
        shutil.copy(slim, dense)
        assert run() == 1

    def test_an_unknown_name(self, run):
        with pytest.raises(ConfigError, match="globl"):
            run(allocations=["globl"])


def test_a_line_holds_every_timing(dense, desk, monkeypatch):
    """What the table says can be worked out from it again, with other statistics too."""
    monkeypatch.setattr(timings, "PAUSE_S", 0)
    found = bench(
        SpeedupsConfig(
            models=[str(dense)], backends=["onnxruntime"], allocations=["uniform"], multiples=[8, 16], imgsz=64,
            threads=1, runs=3, record=str(desk / "r.jsonl"),
        )
    )  # fmt: skip
    (stored,) = read_lines(desk / "r.jsonl")
    assert found.records == [stored]
    report = BenchmarkReport.from_json(stored["report"])
    assert [entry.name for entry in report.entries] == [DENSE, "uniform, 8", "uniform, 16"]
    assert all(len(entry.latencies_ms) == report.runs == 3 for entry in report.entries)
    for name, told in stored["slim"].items():
        again = report.speed_up(name, DENSE)
        assert (told["ratio"], told["p25"], told["p75"]) == (again.ratio, again.p25, again.p75)
        assert 0.4 < told["macs"] <= 0.5
