"""What an artefact tells about itself: true of its checkpoint, read by us, passed over by the host."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from ultralytics import YOLO

from yolo_prune.device.runtimes import runtime_for
from yolo_prune.errors import ConfigError
from yolo_prune.export.metadata import read_metadata
from yolo_prune.export.provenance import provenance_of, read_provenance, write_provenance
from yolo_prune.files import sha256
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.pipeline.artefacts import SUFFIXES, Variant, export_proved
from yolo_prune.surgery.verify import counted_macs

FORMATS = ("onnx", "ncnn", "openvino")


@pytest.fixture(scope="module")
def exported(slim_checkpoint, tmp_path_factory):
    """Artefacts of the slim checkpoint by format."""
    folder = tmp_path_factory.mktemp("räksmörgås exports")
    source = read_checkpoint(slim_checkpoint)
    return {name: export_proved(source, folder, Variant(format=name, imgsz_px=64), images=None) for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
class TestProvenance:
    def test_is_true_of_the_checkpoint(self, name, exported, slim_checkpoint, dense_checkpoint):
        told = read_provenance(exported[name].path)
        model = read_checkpoint(slim_checkpoint).model
        assert told.checkpoint_sha256 == sha256(slim_checkpoint)
        assert told.lineage == (sha256(dense_checkpoint),)
        assert told.params == sum(parameter.numel() for parameter in model.parameters())
        assert told.macs == counted_macs(model, torch.zeros(1, 3, 64, 64))
        assert told.choice["target_macs"] == 0.5
        assert len(told.plan_sha256) == 64
        assert (told.imgsz_px, told.precision, told.calibration_images) == (64, "fp32", 0)
        assert told.parity == exported[name].parity.to_json()
        assert told.accuracy is None
        assert told.verified

    def test_the_host_and_the_runtimes_still_read_the_artefact(self, name, exported):
        path = exported[name].path
        host = YOLO(path, task="detect")
        host.predict(torch.zeros(1, 3, 64, 64), imgsz=64, verbose=False, device="cpu")
        assert host.predictor.model.stride == 32
        assert len(host.names) == 4
        with runtime_for(path).load(path, imgsz_px=64, threads=1) as session:
            assert (session.precision, session.batch, session.end_to_end) == ("fp32", 1, False)

    def test_may_be_renewed(self, name, exported, tmp_path):
        path = exported[name].path
        copy = tmp_path / path.name
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
        told = dataclasses.replace(read_provenance(copy), parity={"passed": False})
        write_provenance(copy, told)
        assert read_provenance(copy) == told
        assert not told.verified
        assert not dataclasses.replace(told, parity=None).verified

    def test_of_others_artefacts_is_refused(self, name, exported, tmp_path):
        """An artefact of the stock exporter, one that is damaged, one that is not there."""
        path = exported[name].path
        copy = tmp_path / f"copy{SUFFIXES[name]}"
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
        damaged = copy / "metadata.yaml" if copy.is_dir() else copy
        damaged.write_bytes(b"\x00\xff[")
        for artefact in (copy, tmp_path / f"absent{SUFFIXES[name]}"):
            with pytest.raises(ConfigError, match=artefact.name):
                read_provenance(artefact)
        if name != "onnx":
            damaged.write_text("task: detect\n")
            assert read_metadata(copy) == {"task": "detect"}
            with pytest.raises(ConfigError, match="says nothing about where it comes from"):
                read_provenance(copy)
            damaged.write_text("yolo_prune: '{}'\n")
            with pytest.raises(ConfigError, match="cannot be read"):
                read_provenance(copy)


def test_a_dense_checkpoint_has_no_plan(dense_checkpoint):
    told = provenance_of(read_checkpoint(dense_checkpoint), imgsz_px=64, precision="int8", calibration_images=7)
    assert (told.plan_sha256, told.choice, told.lineage) == (None, {}, ())
    assert (told.precision, told.calibration_images) == ("int8", 7)
    assert not told.verified
