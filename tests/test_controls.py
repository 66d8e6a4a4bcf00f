"""Controls of a run: what honesty asks a slim model to be compared with."""

from __future__ import annotations

import json

import pytest
from checkpoint_files import globals_named_in
from test_run import TRAINING, write_settings
from test_training import epochs_in

from yolo_prune.hosts.slim import widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.pipeline.controls import smaller_keys
from yolo_prune.pipeline.run_config import RunConfig, direct_settings


@pytest.mark.slow
def test_controls_that_honesty_asks_for(command, tiny_data, dense_checkpoint, tmp_path):
    """Pruned once to as many MACs, and a smaller scale trained as long as both models together; both are timed."""
    settings = write_settings(
        tmp_path / "settings.yaml",
        tiny_data,
        **{"model": str(dense_checkpoint), "train": {"epochs": 0}, "finetune": TRAINING, "formats": []},
        **{"direct": {"allocation": "uniform"}, "smaller": "yolov8n.yaml"},
    )
    assert command("run", settings).code == 0
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    costs = summary["costs"]
    assert [*costs] == ["dense", "slim", "direct", "smaller"] == [*summary["evaluations"]]
    assert 0.4 * costs["dense"]["macs"] < costs["direct"]["macs"] <= costs["slim"]["macs"]
    assert costs["smaller"]["params"] == costs["dense"]["params"]  # the same scale here
    assert set(summary["latency_ms"]) == {f"{name}_pytorch" for name in costs}
    assert {*summary["control_speed_up"]} == {"direct", "smaller"}
    plans = [json.loads((folder / "stages" / f"{name}.json").read_text())["plan"] for name in ("prune", "direct_prune")]
    assert [plan["choice"]["allocation"] for plan in plans] == ["global", "uniform"]
    assert plans[0]["source_sha256"] == plans[1]["source_sha256"]
    assert epochs_in(folder / "direct") == epochs_in(folder / "smaller") == epochs_in(folder / "slim") == [1]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "pruned once, without the method" in page
    assert "the next smaller scale" in page


def test_a_smaller_scale_is_trained_as_long_as_both_models_together():
    config = RunConfig(model="m.yaml", data="-", out="-", train={"epochs": 30, "lr0": 0.1}, finetune={"epochs": 20})
    assert smaller_keys(config) == {"epochs": 50, "lr0": 0.1}
    given = RunConfig(model="m.pt", data="-", out="-", finetune={"epochs": 20, "lr0": 0.2, "distill": "dense"})
    assert smaller_keys(given) == {"epochs": 20, "lr0": 0.2}


def test_the_direct_control_aims_at_what_the_slim_model_has():
    config = RunConfig(model="m.pt", data="-", out="-", prune={"criterion": "taylor"}, direct={})
    assert direct_settings(config, 0.42).prune == {"target_macs": 0.42}
    given = RunConfig(model="m.pt", data="-", out="-", direct={"target_params": 0.3})
    assert direct_settings(given, 0.42).prune == {"target_params": 0.3}


@pytest.mark.exhaustive
def test_a_trained_checkpoint_and_a_control(command, tiny_data, dense_checkpoint, tmp_path):
    """No dense training; the control has the slim widths, but neither the weights nor their history."""
    settings = write_settings(
        tmp_path / "settings.yaml",
        tiny_data,
        **{"model": str(dense_checkpoint), "train": {"epochs": 0}, "finetune": TRAINING},
        **{"control": True, "splits": ["val", "test"], "formats": [], "seed": 7},
    )
    assert command("run", settings).code == 0
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["evaluations"]) == ["dense", "slim", "control"]
    assert all(list(figures) == ["val", "test"] for figures in summary["evaluations"].values())
    assert summary["costs"]["control"] == summary["costs"]["slim"]
    control, slim = (read_checkpoint(folder / name / "weights" / "last.pt").model for name in ("control", "slim"))
    assert widths(control) == widths(slim)
    first = "model.0.conv.weight"
    pruned, start = (read_checkpoint(folder / name).model.state_dict()[first] for name in ("pruned.pt", "control.pt"))
    assert abs(float((pruned * start).sum() / pruned.norm() / start.norm())) < 0.5
    assert not [name for name in globals_named_in(folder / "control.pt") if name.startswith("yolo_prune")]
