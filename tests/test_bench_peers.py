"""The peers' recipes: how they meet a budget, what they leave alone, and the table by hand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_peers import MOMENTUM, PeersConfig, bench
from peer_figures import PeerFigures
from peers import CLOSE, PeerError, ratio_for, slimming, strength_for, user_lines
from torch import nn

from yolo_prune.errors import MissingDependencyError
from yolo_prune.files import read_lines
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.surgery import trace_model

TOOLS = Path(__file__).resolve().parents[1] / "tools"

CELL = {
    "model": "yolov8n", "data": "bccd", "imgsz_px": 320, "batch": 16, "dense_epochs": 30, "epochs": 30, "budget": 0.5,
}  # fmt: skip


def line(peer: str, seed: int, **figures: Any) -> dict[str, Any]:
    known = {"macs_kept": 0.5, "params": 2_000_000, "val": 0.5, "test": 0.4, "user_lines": 40}
    return {"cell": {**CELL, "seed": seed, "peer": peer}, "figures": {**known, **figures}}


def race(seed: int, **ratios: float) -> dict[str, Any]:
    found = {peer: {"ratio": ratio, "p25": ratio, "p75": ratio} for peer, ratio in ratios.items()}
    return {"cell": {**CELL, "seed": seed, "backend": "ncnn", "peers": [], "threads": 2}, "speed_ups": found}


class TestTable:
    def test_by_hand(self):
        figures = PeerFigures(
            records=[
                line("torch_pruning", 0),
                line("yolo_prune", 0, test=0.6, tool_s=1.0, user_lines=1),
                line("yolo_prune", 1, test=0.5, user_lines=1),
            ],
            races=[race(0, yolo_prune=1.6, torch_pruning=1.2), race(1, yolo_prune=1.4)],
        )
        ours, theirs = figures.table().splitlines()[2:4]
        for word in ("yolo_prune", "0 1", "0.550 (0.500..0.600)", "1.50x", "1.0", "2M", "1 command"):
            assert word in ours
        for word in ("torch_pruning", "0.400", "1.20x", "-", "40 lines"):
            assert word in theirs

    def test_what_cannot_be_is_a_line_and_no_row(self):
        failed = {"cell": line("torch_pruning", 0)["cell"], "failed": "fails: IndexError"}
        text = PeerFigures(records=[failed, line("yolo_prune", 0)], races=[]).table()
        assert [one for one in text.splitlines() if "torch_pruning" in one] == [text.splitlines()[-1]]
        assert text.endswith("peer=torch_pruning: fails: IndexError\n")

    def test_users_write_functions_not_docstrings(self):
        assert 10 < user_lines("slimming") < 60
        assert (user_lines("dense"), user_lines("yolo_prune"), user_lines("yolo_prune_direct")) == (0, 1, 2)


class TestRatio:
    def test_is_the_smallest_that_meets_the_budget(self):
        """By hand: in steps of a hundredth, (1 - ratio)^2 is .5041 at .29 and .49 at .3."""

        def macs_kept(ratio: float) -> float:
            return (1 - math.floor(100 * ratio + 1e-9) / 100) ** 2

        assert ratio_for(macs_kept, 0.495) == pytest.approx(0.3, abs=1e-3)
        assert macs_kept(ratio_for(macs_kept, 0.495)) <= 0.495

    @pytest.mark.parametrize(
        ("macs_kept", "found"),
        [(lambda _: 0.6, "60.0% of the MACs are left"), (lambda ratio: float(ratio < 0.4), "0.0% of the MACs are")],
    )
    def test_that_does_not_exist(self, macs_kept, found):
        with pytest.raises(PeerError) as error:
            ratio_for(macs_kept, 0.5)
        assert error.value.found.startswith(found)

    def test_may_miss_by_little(self):
        assert ratio_for(lambda ratio: 1.0 if ratio < 0.4 else 0.5 * (1 - CLOSE), 0.5) == pytest.approx(0.4, abs=1e-3)


def test_the_strength_carries_the_median_scale_to_zero(dense_checkpoint):
    """By SGD itself: the penalty's gradient alone, momentum, a cosine schedule."""
    scales = [
        one.weight for one in read_checkpoint(dense_checkpoint).model.modules() if isinstance(one, nn.BatchNorm2d)
    ]
    median = float(torch.cat([one.detach().abs() for one in scales]).median())
    lr0, steps = 0.01, 400
    strength = strength_for(dense_checkpoint, lr0=lr0, momentum=MOMENTUM, steps=steps)
    scale = nn.Parameter(torch.tensor(median, dtype=torch.float64))
    optimizer = torch.optim.SGD([scale], lr=lr0, momentum=MOMENTUM)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr0 * (1 + math.cos(math.pi * step / steps)) / 2
        scale.grad = torch.tensor(strength, dtype=torch.float64)
        optimizer.step()
    assert abs(float(scale.detach())) < 0.1 * median  # the momentum takes some steps to build up


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


class Bench:
    """`bench_peers.py` in a process of its own, as users start it: it loads foreign classes."""

    def __init__(self, folder: Path, checkpoint: Path, data: Path) -> None:
        self.record, self.json = folder / "peers.jsonl", folder / "cells.json"
        self.words = [f"model={checkpoint}", f"data={data}", f"out={folder / 'cells'}", f"record={self.record}"]

    def run(self, *words: str) -> dict[str, dict[str, Any]]:
        """Run it and return the lines of the cells by peer."""
        shared = ["dense_epochs=0", "imgsz=64", "batch=4", "workers=0", "threads=1", "runs=3"]
        command = [sys.executable, str(TOOLS / "bench_peers.py"), *self.words, *shared, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment())
        assert done.returncode == 0, done.stderr
        self.said = done.stdout
        return {one["cell"]["peer"]: one for one in read_lines(self.record)}

    def races(self) -> list[dict[str, Any]]:
        return read_lines(self.record.with_name("peers_latency.jsonl"))

    @staticmethod
    def _environment() -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
def peers_bench(tmp_path, known_detector):
    return Bench(tmp_path, *known_detector)


def test_ours_without_training(peers_bench):
    """What is left right after the cut, of the dense model all of it; a second run has nothing to do."""
    words = ("peers=[dense,yolo_prune,yolo_prune_direct]", "budgets=[0.7]", "epochs=0", "backends=[onnxruntime]")
    found = peers_bench.run(*words)
    assert found["dense"]["figures"]["macs_kept"] == 1
    assert found["dense"]["cell"]["budget"] == 1
    for peer in ("yolo_prune", "yolo_prune_direct"):
        figures = found[peer]["figures"]
        assert 0.67 < figures["macs_kept"] <= 0.7
        assert figures["tool_s"] > 0 < figures["tool_mb"]
        assert 0 <= figures["val"] <= 1 >= figures["recalibrated"] >= 0
    (timed,) = peers_bench.races()
    assert timed["speed_ups"].keys() == {"yolo_prune", "yolo_prune_direct"}
    before = peers_bench.record.read_text()
    peers_bench.run(*words)
    assert peers_bench.record.read_text() == before


@pytest.mark.exhaustive
@pytest.mark.parametrize("epochs", [0, 5])
def test_every_peer_prunes_trains_and_is_timed(peers_bench, epochs):
    pytest.importorskip("torch_pruning", reason="the peer is not installed: pip install -e '.[bench]'")
    found = peers_bench.run("budgets=[0.5]", f"epochs={epochs}", "backends=[onnxruntime]")
    pruned = {"yolo_prune", "yolo_prune_direct", "torch_pruning", "slimming"}
    assert found.keys() == {"dense", *pruned}
    for peer in pruned:
        assert 0.48 < found[peer]["figures"]["macs_kept"] <= 0.505  # the last half: of what is trained, not predicted
        assert found[peer]["figures"]["tool_s"] > 0
    assert peers_bench.races()[0]["speed_ups"].keys() == pruned


@pytest.mark.exhaustive
def test_a_peer_that_fails_is_a_line_that_says_how(tmp_path, tiny_data):
    pytest.importorskip("torch_pruning", reason="the peer is not installed: pip install -e '.[bench]'")
    from checkpoint_files import save_as_host
    from models import lively

    ours = Bench(tmp_path, save_as_host(lively("yolo26n"), tmp_path / "dense.pt"), tiny_data)
    found = ours.run("peers=[yolo_prune_direct,torch_pruning]", "epochs=0", "backends=[]")
    assert json.loads(json.dumps(found["yolo_prune_direct"]["figures"]))["macs_kept"] <= 0.5
    assert "fails" in found["torch_pruning"]["failed"]
    assert found["torch_pruning"]["failed"] in ours.said


def test_a_peer_that_is_not_installed_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    config = PeersConfig(data="d", model="m", out=str(tmp_path / "out"))
    with pytest.raises(MissingDependencyError, match="torch-pruning"):
        bench(config)
    assert not (tmp_path / "out").exists()
