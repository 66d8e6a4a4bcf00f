"""The benchmark: its record, its table, what it refuses, and one run with real artefacts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_onnx import SIDE_PX, tiny_onnx

from yolo_prune.device import timings
from yolo_prune.device.benchmark import benchmark, size_on_disk
from yolo_prune.device.benchmark_record import BenchmarkEntry, BenchmarkReport
from yolo_prune.device.conditions import Conditions, Look
from yolo_prune.device.image_to_boxes import ImageToBoxes, drawn_image
from yolo_prune.device.machine import Machine, describe_machine
from yolo_prune.device.memory import PeakMemory
from yolo_prune.errors import ConfigError
from yolo_prune.export.runtimes import runtime_for
from yolo_prune.hosts.ultralytics.export import export_model
from yolo_prune.pipeline.benchmark import BenchmarkTable

IMGSZ_PX = 64

WHOLE = ImageToBoxes(pre_ms=(1.0, 2.0, 1.0), forward_ms=(5.0, 6.0, 7.0), post_ms=(0.5, 0.25, 0.5))
IDLE = Look(cpu_mhz=2000.0, gpu_mhz=None, temperature_c=40.0, throttled=None)
OLD_RECORD = {
    "imgsz_px": 640, "threads": 2, "runs": 2, "warmup": 1,
    "machine": {"cpu": "c", "cores": 2, "system": "Linux x86_64", "python": "3.11", "runtimes": {"ncnn": "1.0"}},
    "entries": [{"name": "dense", "backend": "ncnn", "latencies_ms": [2.0, 4.0], "summary": {"median_ms": 3.0}}],
}  # fmt: skip
"""As version 0.1 wrote it."""


def entry(name: str, latencies_ms: list[float], backend: str = "ncnn") -> BenchmarkEntry:
    return BenchmarkEntry(name=name, backend=backend, latencies_ms=tuple(latencies_ms))


def report_of(*entries: BenchmarkEntry) -> BenchmarkReport:
    machine = Machine(cpu="c", cores=2, system="Linux x86_64", python="3.11", runtimes={"ncnn": "1.0"})
    return BenchmarkReport(imgsz_px=64, threads=1, runs=5, warmup=0, machine=machine, entries=entries)


def full_report() -> BenchmarkReport:
    known = {"size_bytes": 3_000_000, "memory": PeakMemory(1_000_000, 9_000_000), "image_to_boxes": WHOLE}
    entries = [replace(entry(name, [1.5, 2, 3]), **known) for name in ("dense", "slim")]
    conditions = Conditions(before=IDLE, after=IDLE, cpu_mhz=(1000.0, 2000.0), others_busy_cores=0.5)
    return replace(report_of(*entries), batch=4, conditions=conditions)


class TestRecord:
    @pytest.mark.parametrize("report", [report_of(entry("a", [1.5, 2, 3]), entry("b", [1, 1, 1])), full_report()])
    def test_round_trip(self, report):
        assert BenchmarkReport.from_json(json.loads(json.dumps(report.to_json()))) == report

    def test_older_record(self):
        report = BenchmarkReport.from_json(OLD_RECORD)
        assert report.entry("dense").summary.median_ms == 3
        assert (report.batch, report.conditions, report.entry("dense").image_to_boxes) == (1, None, None)
        assert BenchmarkTable(report=report).table()

    @pytest.mark.parametrize(
        "record",
        [
            {},
            [],
            {**OLD_RECORD, "entries": [{}]},
            {**OLD_RECORD, "energy_j": 5},
            {**OLD_RECORD, "machine": {"board": "x"}},
            {**OLD_RECORD, "conditions": {"before": {}}},
        ],
    )
    def test_what_cannot_be_read(self, record):
        with pytest.raises(ConfigError, match="cannot read the record of a benchmark"):
            BenchmarkReport.from_json(record)

    def test_for_readers(self):
        found = full_report().to_json()
        assert found["entries"][0]["summary"]["median_ms"] == 2
        assert found["entries"][0]["image_to_boxes"]["summary"]["total"]["median_ms"] == 8.25
        assert found["warnings"] == [
            "the CPU's clock moved between 1000 and 2000 MHz", "other processes kept 0.5 cores busy",
        ]  # fmt: skip

    def test_only_within_a_backend(self):
        report = report_of(entry("a", [1]), entry("b", [1], backend="ncnn@vulkan"))
        with pytest.raises(ConfigError, match="ncnn@vulkan"):
            report.speed_up("a", "b")
        with pytest.raises(ConfigError, match="'c'"):
            report.speed_up("c", "a")
        with pytest.raises(ConfigError, match="not timed from image to boxes"):
            report.speed_up("a", "a", to_boxes=True)


class TestTable:
    @pytest.mark.parametrize(
        ("latencies_ms", "words"),
        [([5, 6, 7], "faster"), ([9, 10, 11], "not separable"), ([20, 22, 24], "not faster")],
    )
    def test_what_it_says(self, latencies_ms, words):
        table = BenchmarkTable(
            report=report_of(entry("dense", [10, 11, 12] * 34), entry("slim", latencies_ms * 34))
        ).table()
        assert f"), {words} " in table.splitlines()[-1]

    def test_everything(self):
        """Two images of four in 2 ms are 2000 a second; memory is the peak over the idle runtime."""
        text = BenchmarkTable(report=full_report()).table()
        assert "64 px, batch 4, 1 threads" in text
        assert "warning: other processes kept 0.5 cores busy" in text
        forward, whole = text.split("image to boxes")
        assert [word in forward for word in ("2.00", "2000.0", "3.0", "8.0")] == [True] * 4
        assert [word in whole for word in ("8.25", "1.00", "6.00", "0.50")] == [True] * 4


def test_machine_names_neither_host_nor_path():
    import platform

    text = json.dumps(asdict(describe_machine({"ncnn": "1"})))
    assert platform.node() not in text
    assert "/" not in text


class TestTinyArtefacts:
    @pytest.fixture(autouse=True)
    def no_pause(self, monkeypatch):
        monkeypatch.setattr(timings, "PAUSE_S", 0)

    def test_everything_at_once(self, tmp_path):
        artefacts = {"fixed": tiny_onnx(tmp_path / "a.onnx", batch=2), "any": tiny_onnx(tmp_path / "b.onnx", batch="n")}
        report = benchmark(
            artefacts, imgsz_px=SIDE_PX, threads=1, runs=3, warmup=0, batch=2, image=drawn_image(), memory=True
        )
        assert report.batch == 2
        assert report.conditions is not None
        for found in report.entries:
            assert found.size_bytes == artefacts[found.name].stat().st_size
            assert found.memory is None or found.memory.artefact_bytes > 0
            assert found.image_to_boxes is not None
            assert len(found.latencies_ms) == len(found.image_to_boxes.latencies_ms) == 3
        assert BenchmarkReport.from_json(json.loads(json.dumps(report.to_json()))) == report

    def test_another_batch_is_refused(self, tmp_path):
        path = tiny_onnx(tmp_path / "a.onnx", batch=4)
        with pytest.raises(ConfigError, match="takes batches of 4, asked to run with 2") as caught:
            benchmark({"a": path}, imgsz_px=SIDE_PX, threads=1, batch=2)
        assert "pass batch=4" in str(caught.value)

    def test_unknown_artefact(self, tmp_path):
        with pytest.raises(ConfigError, match="does not exist"):
            benchmark({"a": tmp_path / "absent.onnx"}, imgsz_px=IMGSZ_PX, threads=1)

    @pytest.mark.parametrize("change", [{"runs": 0}, {"threads": 0}, {"warmup": -1}, {"batch": 0}, {"artefacts": {}}])
    def test_numbers_that_measure_nothing(self, tmp_path, change):
        artefacts = {"a": tiny_onnx(tmp_path / "a.onnx")}
        arguments = {"artefacts": artefacts, "imgsz_px": SIDE_PX, "threads": 1, "runs": 1, "warmup": 0}
        with pytest.raises(ConfigError):
            benchmark(**{**arguments, **change})

    def test_size_of_a_folder(self, tmp_path):
        (tmp_path / "model" / "more").mkdir(parents=True)
        (tmp_path / "model" / "a.bin").write_bytes(b"1234")
        (tmp_path / "model" / "more" / "b.bin").write_bytes(b"123")
        assert size_on_disk(tmp_path / "model") == 7


class TestVerb:
    def test_a_variant_that_cannot_run(self, refused, desk):
        tiny_onnx(desk / "räk smörgås.onnx")
        words = ("imgsz=32", "runs=1")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            assert "provider 'cuda' cannot be used" in refused("benchmark", "models=[räk smörgås.onnx@cuda]", *words)
        assert "variant 'vulkan' of onnxruntime" in refused("benchmark", "models=[räk smörgås.onnx@vulkan]", *words)

    def test_images(self, refused, desk, command):
        tiny_onnx(desk / "a.onnx")
        Path("not an image.jpg").write_text("text")
        words = ("models=[a.onnx]", "imgsz=32", "threads=1", "runs=2", "warmup=0", "memory=false")
        for name in ("not an image.jpg", "absent.jpg"):
            assert f"image '{name}'" in refused("benchmark", *words, f"image={name}")
        assert "image= together with boxes=false" in refused("benchmark", *words, "image=absent.jpg", "boxes=false")
        outcome = command("benchmark", *words, "boxes=false")
        assert outcome.code == 0
        assert "image to boxes" not in outcome.out


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
        image = np.full((48, 64, 3), 90, np.uint8)
        report = benchmark(
            artefacts, imgsz_px=IMGSZ_PX, threads=before + 1, runs=3, warmup=1, image=image, runtime_for=runtime_for
        )
        assert torch.get_num_threads() == before
        assert [found.backend for found in report.entries] == ["pytorch", "onnxruntime", "ncnn"]
        assert set(report.machine.runtimes) == {"pytorch", "onnxruntime", "ncnn"}
        assert all(len(found.latencies_ms) == 3 and min(found.latencies_ms) > 0 for found in report.entries)
        assert all(found.image_to_boxes is not None for found in report.entries)
        assert BenchmarkReport.from_json(json.loads(json.dumps(report.to_json()))) == report

    def test_ncnn_takes_one_image_in_a_call(self, artefacts):
        with pytest.raises(ConfigError, match="takes batches of 1"):
            benchmark({"a": artefacts["ncnn"]}, imgsz_px=IMGSZ_PX, threads=1, batch=2)
