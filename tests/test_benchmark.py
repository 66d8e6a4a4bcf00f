"""The benchmark's arithmetic, its order of turns, and one run with real artefacts."""

from __future__ import annotations

import json
from collections import Counter
from itertools import count, pairwise

import numpy as np
import pytest
import torch

from yolo_prune.device.benchmark import (
    BenchmarkEntry,
    BenchmarkReport,
    LatencySummary,
    SpeedUp,
    benchmark,
    time_in_turns,
    turn_order,
)
from yolo_prune.device.machine import Machine, describe_machine
from yolo_prune.errors import ConfigError
from yolo_prune.export.runtimes import runtime_for
from yolo_prune.hosts.ultralytics.export import export_model
from yolo_prune.pipeline.deploy import BenchmarkTable

IMGSZ_PX = 64


def entry(name: str, latencies_ms: list[float], backend: str = "ncnn") -> BenchmarkEntry:
    return BenchmarkEntry(name=name, backend=backend, latencies_ms=tuple(latencies_ms))


def report_of(*entries: BenchmarkEntry) -> BenchmarkReport:
    machine = Machine(cpu="c", cores=2, system="Linux x86_64", python="3.11", runtimes={"ncnn": "1.0"})
    return BenchmarkReport(imgsz_px=64, threads=1, runs=5, warmup=0, machine=machine, entries=entries)


class TestArithmetic:
    def test_summary(self):
        summary = LatencySummary.of([float(value) for value in range(101)])
        assert summary == LatencySummary(median_ms=50, p5_ms=5, p25_ms=25, p75_ms=75, p95_ms=95, min_ms=0)

    def test_ratio_is_paired(self):
        # Every round is slower than the one before; within a round the entry always takes half as long.
        dense, slim = entry("dense", [10, 20, 30, 40, 50]), entry("slim", [5, 10, 15, 20, 25])
        result = report_of(dense, slim).speed_up("slim", "dense")
        assert (result.ratio, result.p25, result.p75) == (2, 2, 2)
        assert not result.faster  # the intervals [20, 40] and [10, 20] touch

    def test_faster_needs_separate_intervals(self):
        dense = entry("dense", [10, 11, 12, 13, 14])
        assert SpeedUp.between(entry("slim", [5, 6, 7, 8, 9]), dense).faster
        overlapping = SpeedUp.between(entry("slim", [8, 9, 10, 11.5, 12]), dense)
        assert overlapping.ratio > 1
        assert not overlapping.faster

    @pytest.mark.parametrize("seed", range(5))
    def test_laws(self, seed):
        random = np.random.default_rng(seed)
        a, b = (entry(name, list(random.uniform(1, 9, 15))) for name in "ab")
        there, back = SpeedUp.between(a, b), SpeedUp.between(b, a)
        assert there.ratio == pytest.approx(1 / back.ratio)  # odd number of rounds: the median is a round
        assert there.p25 <= there.ratio <= there.p75
        assert not (there.faster and back.faster)
        itself = SpeedUp.between(a, a)
        assert itself.ratio == 1
        assert not itself.faster

    def test_only_within_a_backend(self):
        report = report_of(entry("a", [1]), entry("b", [1], backend="onnxruntime"))
        with pytest.raises(ConfigError, match="onnxruntime"):
            report.speed_up("a", "b")
        with pytest.raises(ConfigError, match="'c'"):
            report.speed_up("c", "a")

    def test_json_round_trip(self):
        report = report_of(entry("a", [1.5, 2, 3]), entry("b", [1, 1, 1]))
        assert BenchmarkReport.from_json(json.loads(json.dumps(report.to_json()))) == report


class TestTurns:
    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    def test_places_are_shared(self, size):
        names = "abcdefg"[:size]
        orders = [turn_order(names, turn) for turn in range(2 * size)]
        assert all(sorted(order) == sorted(names) for order in orders)
        places = Counter((name, place) for order in orders for place, name in enumerate(order))
        assert set(places.values()) == {2}
        followers = Counter(pair for order in orders for pair in pairwise(order))
        assert all(followers[a, b] == followers[b, a] for a, b in followers)

    def test_order_and_number_of_calls(self):
        calls: list[str] = []
        sessions = {name: (lambda _image, name=name: calls.append(name)) for name in "abc"}
        latencies_ms = time_in_turns(sessions, np.zeros((1, 3, 8, 8), np.float32), runs=4, warmup=2)
        rounds = [turn_order("abc", turn) for turn in range(-2, 4)]
        assert calls == [name for order in rounds for name in order for _ in range(2)]
        assert {name: len(values) for name, values in latencies_ms.items()} == {"a": 4, "b": 4, "c": 4}

    def test_only_the_second_run_of_a_turn_is_timed(self):
        now = count(step=2_000_000)  # each look at the clock is 2 ms after the one before
        latencies_ms = time_in_turns(
            {"a": lambda _: None, "b": lambda _: None},
            np.zeros((1, 3, 8, 8), np.float32),
            runs=3,
            warmup=1,
            clock_ns=lambda: next(now),
        )
        assert latencies_ms == {"a": [2, 2, 2], "b": [2, 2, 2]}


def test_machine_names_neither_host_nor_path():
    import platform

    text = json.dumps(describe_machine({"ncnn": "1"}).__dict__)
    assert platform.node() not in text
    assert "/" not in text


class TestRealArtefacts:
    @pytest.fixture(scope="class")
    def artefacts(self, tmp_path_factory):
        from ultralytics import YOLO

        folder = tmp_path_factory.mktemp("benchmark")
        YOLO("yolov8n.yaml").save(folder / "v8.pt")
        artefacts = {"pytorch": folder / "v8.pt", "onnx": folder / "v8.onnx", "ncnn": folder / "v8_ncnn"}
        for kind in ("onnx", "ncnn"):
            export_model(artefacts["pytorch"], format=kind, imgsz_px=IMGSZ_PX, out=artefacts[kind])
        return artefacts

    def test_report(self, artefacts):
        before = torch.get_num_threads()
        report = benchmark(artefacts, imgsz_px=IMGSZ_PX, threads=before + 1, runs=3, warmup=1, runtime_for=runtime_for)
        assert torch.get_num_threads() == before
        assert [entry.backend for entry in report.entries] == ["pytorch", "onnxruntime", "ncnn"]
        assert set(report.machine.runtimes) == {"pytorch", "onnxruntime", "ncnn"}
        assert all(len(entry.latencies_ms) == 3 and min(entry.latencies_ms) > 0 for entry in report.entries)
        assert BenchmarkReport.from_json(json.loads(json.dumps(report.to_json()))) == report

    @pytest.mark.parametrize("change", [{"runs": 0}, {"threads": 0}, {"warmup": -1}, {"artefacts": {}}])
    def test_numbers_that_measure_nothing(self, artefacts, change):
        arguments = {"artefacts": artefacts, "imgsz_px": IMGSZ_PX, "threads": 1, "runs": 1, "warmup": 0}
        with pytest.raises(ConfigError):
            benchmark(**{**arguments, **change})

    def test_unknown_artefact(self, tmp_path):
        with pytest.raises(ConfigError, match="does not exist"):
            benchmark({"a": tmp_path / "absent.onnx"}, imgsz_px=IMGSZ_PX, threads=1)


@pytest.mark.parametrize(
    ("latencies_ms", "words"),
    [([5, 6, 7], "faster"), ([9, 10, 11], "not separable"), ([20, 22, 24], "not faster")],
)
def test_what_the_table_says(latencies_ms, words):
    table = BenchmarkTable(report=report_of(entry("dense", [10, 11, 12]), entry("slim", latencies_ms))).table()
    assert table.splitlines()[-1].endswith(f"), {words}")
