"""`run` exports several precisions, goes on after an artefact that disagreed, and refuses what cannot be made."""

from __future__ import annotations

import dataclasses
import json

import pytest
from test_run import TRAINING, records, write_settings

from yolo_prune.export.provenance import read_provenance
from yolo_prune.files import sha256
from yolo_prune.pipeline import artefacts


@pytest.mark.slow
def test_several_precisions_and_one_that_disagreed_at_first(
    command, tiny_data, dense_checkpoint, tmp_path, monkeypatch
):
    """What was kept aside makes room when the same command runs again, and no stage is repeated."""
    more = {"model": str(dense_checkpoint), "train": {}, "finetune": TRAINING, "precisions": ["fp32", "fp16"]}
    settings, folder = write_settings(tmp_path / "settings.yaml", tiny_data, **more), tmp_path / "run"
    whole = artefacts.check_parity
    with monkeypatch.context() as patch:
        patch.setattr(
            artefacts,
            "check_parity",
            lambda *a, **k: dataclasses.replace(whole(*a, **k), tolerance=0.0 if "slim_fp16" in str(a[1]) else 0.05),
        )
        failed = command("run", settings)
    assert failed.code == 1
    assert "artefact 'slim_fp16.onnx' (onnxruntime) differs from PyTorch" in failed.err
    assert (folder / "exports" / "slim_fp16.onnx.failed.json").is_file()
    before = records(folder)
    assert "export_slim_onnx" in before
    assert "export_slim_onnx_fp16" not in before

    done = command("run", settings)
    assert done.code == 0
    assert {name: records(folder)[name] for name in before} == before
    names = {"dense.onnx", "dense_fp16.onnx", "slim.onnx", "slim_fp16.onnx"}
    assert {path.name for path in (folder / "exports").iterdir() if path.suffix != ".pt"} == names
    summary = json.loads((folder / "summary.json").read_text())
    variants = {f"{model}_{variant}" for model in ("dense", "slim") for variant in ("onnx", "onnx_fp16")}
    assert set(summary["parity"]) == variants
    assert set(summary["accuracy"]) == {name for name in variants if "fp16" in name}
    assert set(summary["speed_up"]) == {"pytorch", "onnx", "onnx_fp16"}
    assert "onnx_fp16 ms" in done.out
    assert "slim_onnx_fp16: mAP50-95 " in (folder / "summary.md").read_text()
    told = read_provenance(folder / "exports" / "slim_fp16.onnx")
    assert told.checkpoint_sha256 == sha256(folder / "slim" / "weights" / "best.pt")
    assert told.verified


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"precisions": ["fp8"]}, "unknown precision 'fp8'"),
        ({"formats": ["tflite"]}, "unknown format 'tflite'"),
        ({"formats": ["engine"]}, "yolo-prune bundle"),
        ({"formats": ["onnx"], "precisions": ["int8"], "calibration": 0}, "calibration=0"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_first_training(command, tiny_data, tmp_path, more, said):
    outcome = command("run", write_settings(tmp_path / "settings.yaml", tiny_data, **more))
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "run").exists()
