"""The file of an engine: stock Ultralytics reads its metadata, and damage is told."""

from __future__ import annotations

import dataclasses
import json

import pytest
from exported_onnx import IMGSZ_PX, exported
from ultralytics.nn.backends.base import BaseBackend

from yolo_prune.device.onnx_facts import PROVENANCE, OnnxFacts
from yolo_prune.device.runtimes.engine_file import EngineFile
from yolo_prune.device.tensorrt_build import engine_metadata
from yolo_prune.device.tensorrt_recipe import BatchRange, EngineOptions
from yolo_prune.errors import ConfigError, OutputError
from yolo_prune.export.metadata import read_metadata, write_metadata

PLAN = b"ptrt" + bytes(range(256))


class HostBackend(BaseBackend):
    """The host's reader of metadata, without a runtime."""

    def __init__(self) -> None:
        self.dynamic = False

    def load_model(self, weight):
        raise NotImplementedError

    def forward(self, im):
        raise NotImplementedError


def test_round_trip(tmp_path):
    file = EngineFile(plan=PLAN, metadata={"names": {"0": "röd"}, "imgsz": [64, 64]})
    file.write(tmp_path / "å b.engine")
    assert EngineFile.read(tmp_path / "å b.engine") == file


def test_a_plan_alone(tmp_path):
    (tmp_path / "trtexec.engine").write_bytes(PLAN)
    assert EngineFile.read(tmp_path / "trtexec.engine") == EngineFile(plan=PLAN)


def test_the_host_reads_it(tmp_path):
    facts = OnnxFacts.read(exported("yolov8n"))
    options = EngineOptions(precision="fp16", batch=BatchRange(1, 2, 4), dla_core=1)
    path = tmp_path / "a.engine"
    EngineFile(plan=PLAN, metadata=engine_metadata(facts, options)).write(path)
    offset, metadata = BaseBackend.engine_header(path)
    assert path.read_bytes()[offset:] == PLAN
    host = HostBackend()
    host.apply_metadata(metadata)
    assert (host.task, host.stride, host.batch, host.imgsz, host.end2end) == ("detect", 32, 4, [IMGSZ_PX] * 2, False)
    assert list(host.names) == [0, 1, 2, 3]
    assert (host.args["quantize"], host.dla) == (16, 1)


def test_what_was_proved_of_the_onnx_file_is_not_told_of_the_engine():
    facts = OnnxFacts.read(exported("yolov8n"))
    told = {"precision": "fp32", "parity": {"passed": True}, "accuracy": {"passed": True}, "macs": 5}
    proved = dataclasses.replace(facts, metadata={**facts.metadata, PROVENANCE: json.dumps(told)})
    found = engine_metadata(proved, EngineOptions(precision="int8"))
    assert json.loads(found[PROVENANCE]) == {"precision": "int8", "parity": None, "accuracy": None, "macs": 5}
    assert PROVENANCE not in engine_metadata(facts, EngineOptions())


class TestDamaged:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "no plan"),
            ((6).to_bytes(4, "little") + b"{'a':1}" + PLAN, "damaged"),  # cut: not JSON
            ((999).to_bytes(4, "little") + b'{"a": 1}', "no plan"),  # the length overruns the file
            ((8).to_bytes(4, "little") + b'{"a": 1}', "no plan"),
            ((8).to_bytes(4, "little") + b'{"\xff": 1' + PLAN, "damaged"),
        ],
    )
    def test_is_told(self, tmp_path, content, reason):
        path = tmp_path / "broken.engine"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=reason) as error:
            EngineFile.read(path)
        assert "broken.engine" in str(error.value)

    def test_absent(self, tmp_path):
        with pytest.raises(ConfigError, match="absent"):
            EngineFile.read(tmp_path / "absent.engine")

    def test_nothing_is_overwritten(self, tmp_path):
        path = tmp_path / "mine.engine"
        path.write_text("mine")
        with pytest.raises(OutputError):
            EngineFile(plan=PLAN).write(path)
        assert path.read_text() == "mine"


def test_provenance_is_added_before_the_plan(tmp_path):
    path = tmp_path / "slim.engine"
    EngineFile(b"\x00plan", {"stride": 32}).write(path)
    write_metadata(path, {"yolo_prune": {"macs": 7}})
    write_metadata(path, {"yolo_prune": {"macs": 8}})
    assert read_metadata(path) == {"stride": 32, "yolo_prune": '{"macs": 8}'}
    assert EngineFile.read(path).plan == b"\x00plan"
    assert list(tmp_path.iterdir()) == [path]
