"""The peers' recipes: what they leave alone, and the table by hand."""

from __future__ import annotations

from typing import Any

import pytest
from bench_peers import PeersConfig, bench
from peer_figures import PeerFigures
from peers import slimming, user_lines

from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.surgery import trace_model

CELL = {
    "model": "yolov8n", "data": "bccd", "imgsz_px": 320, "batch": 16, "dense_epochs": 30, "epochs": 30, "budget": 0.5,
}  # fmt: skip


def line(peer: str, seed: int, **figures: Any) -> dict[str, Any]:
    known = {"macs_kept": 0.5, "params": 2_000_000, "val": 0.5, "test": 0.4, "user_lines": 40}
    return {"cell": {**CELL, "seed": seed, "peer": peer}, "figures": {**known, **figures}}


def race(seed: int, **ratios: float) -> dict[str, Any]:
    found = {peer: {"ratio": ratio, "p25": ratio, "p75": ratio} for peer, ratio in ratios.items()}
    return {"cell": {**CELL, "seed": seed, "backend": "ncnn", "peers": [], "threads": 2}, "speed_ups": found}


def test_the_table_by_hand():
    figures = PeerFigures(
        records=[
            line("torch_pruning", 0),
            line("yolo_prune", 0, test=0.6, tool_s=1.0),
            line("yolo_prune", 1, test=0.5),
        ],
        races=[race(0, yolo_prune=1.6, torch_pruning=1.2), race(1, yolo_prune=1.4)],
    )
    ours, theirs = figures.table().splitlines()[2:4]
    for word in ("yolo_prune", "0 1", "0.550 (0.500..0.600)", "1.50x", "1.0", "2M"):
        assert word in ours
    for word in ("torch_pruning", "0.400", "1.20x", "-", "40"):
        assert word in theirs


def test_slimming_leaves_detect_and_shortcuts_alone(dense_checkpoint, tmp_path):
    dense = read_checkpoint(dense_checkpoint).model
    slim = read_checkpoint(slimming(dense_checkpoint, 0.8, 64, tmp_path / "slim.pt")).model
    rows, left = ({name: len(one) for name, one in model.state_dict().items() if one.dim()} for model in (dense, slim))
    cut = {name for name in rows if name.endswith("conv.weight") and left[name] < rows[name]}
    assert "model.0.conv.weight" in cut
    assert not [name for name in cut if name.startswith("model.22.")]
    assert "model.2.m.0.cv2.conv.weight" not in cut  # added to the second half of model.2.cv1
    before, after = (trace_model(model) for model in (dense, slim))
    kept = after.cost.macs(after.widths(), imgsz_px=64) / before.cost.macs(before.widths(), imgsz_px=64)
    assert 0.78 <= kept <= 0.8


def test_users_write_functions_not_docstrings():
    assert 10 < user_lines("slimming") < 60


@pytest.mark.exhaustive
def test_every_peer_prunes_trains_and_is_timed(dense_checkpoint, tiny_data, tmp_path):
    pytest.importorskip("torch_pruning", reason="the peer is not installed: pip install -e '.[bench]'")
    config = PeersConfig(
        data=str(tiny_data), model=str(dense_checkpoint), out=str(tmp_path / "cells"), budgets=[0.7], epochs=2,
        dense_epochs=0, imgsz=64, batch=4, workers=0, backends=["onnxruntime"], threads=1, runs=3,
        record=str(tmp_path / "peers.jsonl"),
    )  # fmt: skip
    found = bench(config)
    assert {record["cell"]["peer"] for record in found.records} == {"yolo_prune", "torch_pruning", "slimming"}
    for record in found.records:
        assert 0.6 < record["figures"]["macs_kept"] <= 0.71
        assert record["figures"]["tool_s"] > 0
    assert found.races[0]["speed_ups"].keys() == {"yolo_prune", "torch_pruning", "slimming"}
    assert bench(config) == found
