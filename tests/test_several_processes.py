"""Training on several GPUs without a GPU: what the host sends to its processes, and hooks under two of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gloo_process import train
from test_gradual import words_for
from ultralytics.utils.dist import generate_ddp_file

from yolo_prune.hosts.slim import widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.gradual import GradualOptions, GradualPruning
from yolo_prune.hosts.ultralytics.networks import network_of
from yolo_prune.hosts.ultralytics.sparsity import SparsityOptions, SparsityTraining
from yolo_prune.hosts.ultralytics.trainer import SlimDetectionTrainer
from yolo_prune.methods.gradual import PruningSchedule
from yolo_prune.report.scales import draw_scales

GLOO, DDP = (Path(__file__).with_name(f"{name}_process.py") for name in ("gloo", "ddp"))

WORKER = """
import sys, torch
from torch import nn
from ultralytics.utils.patches import torch_load
state = torch_load(sys.argv[1], map_location="cpu")
callbacks = [callback for several in state["callbacks"].values() for callback in several]
owners = {type(o).__name__: o for callback in callbacks if (o := getattr(callback, "__self__", None)) is not None}
layers = [(name, layer) for name, layer in state["model"].named_modules() if isinstance(layer, nn.Conv2d)]
seen = {
    "trainer": f"{state['trainer'].__module__}.{state['trainer'].__name__}",
    "owners": len({id(callback.__self__) for callback in callbacks if hasattr(callback, "__self__")}),
    "widths": {name: list(layer.weight.shape[:2]) for name, layer in layers},
    "marker": state["model"].yolo_prune["widths"],
    "options": [str(owners[name].options) for name in ("GradualPruning", "SparsityTraining")],
    "foreign": sorted(set(state["args"]) & {"sparsity", "prune_every", "target_macs"}),
}
torch.save(seen, sys.argv[2])
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["proximal", pytest.param("subgradient", marks=pytest.mark.exhaustive)])
def test_two_processes_train_as_one(mode, tmp_path):
    """Each process shrinks once, by the same amount: the scales stay in step, and are those of one process."""
    port = str(free_port())
    running = [
        subprocess.Popen([sys.executable, GLOO, str(rank), "2", port, tmp_path / f"{rank}.pth", mode])
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    alone = train(0, 1, mode).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_hosts_launch_carries_trainer_callbacks_and_slim_module(slim_checkpoint, tiny_data, tmp_path):
    model = read_checkpoint(slim_checkpoint).model
    trainer = SlimDetectionTrainer(
        overrides={"model": str(slim_checkpoint), "data": str(tiny_data), "project": str(tmp_path), "device": "cpu"}
    )
    trainer.model = trainer.get_model(weights=model)
    schedule = PruningSchedule(every=1, steps=1, target=0.5)
    gradual, sparsity = GradualOptions(schedule=schedule), SparsityOptions(strength=0.5)
    for callbacks in (GradualPruning(gradual).callbacks(), SparsityTraining(sparsity, draw=draw_scales).callbacks()):
        for event, callback in callbacks.items():
            trainer.add_callback(event, callback)
    script = Path(generate_ddp_file(trainer))
    done = subprocess.run(
        [sys.executable, "-c", WORKER, script.with_suffix(".pt"), tmp_path / "seen.pth"],
        capture_output=True,
        text=True,
        check=False,
    )
    for file in (script, script.with_suffix(".pt")):
        file.unlink()
    assert done.returncode == 0, done.stderr
    seen = torch.load(tmp_path / "seen.pth")
    assert seen["trainer"].endswith("trainer.SlimDetectionTrainer")
    assert seen["widths"] == widths(trainer.model) == seen["marker"]
    assert seen["owners"] == 2  # one object each, whatever events call it
    assert seen["options"] == [str(gradual), str(sparsity)]
    assert seen["foreign"] == []


BY_LOSS = {"criterion": "taylor", "prune_batches": 1, "round_to": 1, "val": "false"}
"""A batch of the sixteen images, and no validation, in which alone the host makes all processes' statistics the same:
processes that chose on their own would choose other channels."""


@pytest.mark.slow
def test_the_hosts_own_training_in_two_processes(dense_checkpoint, tiny_data, tmp_path):
    """Sparsity, cuts and a teacher at once: both processes choose the same channels and stay in step; one writes."""
    words = [word for word in words_for(dense_checkpoint, tiny_data, tmp_path, sparsity=2.0, **BY_LOSS) if "=" in word]
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, DDP, tmp_path / f"{rank}.pth", *words, f"distill_model={dense_checkpoint}"],
            env={**os.environ, **here, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in second.items()}
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # each process has its own, as the host wants
    assert all(torch.equal(first[name], second[name]) for name in first if not name.endswith(statistics))
    folder = tmp_path / "a"
    assert [step["step"] for step in json.loads((folder / "pruning.json").read_text())["steps"]] == [1, 2, 3]
    assert [row["epoch"] for row in json.loads((folder / "sparsity.json").read_text())["epochs"]] == list(range(6))
    saved = network_of(torch.load(folder / "weights" / "last.pt", weights_only=False)["ema"]).state_dict()
    assert {name: value.shape for name, value in saved.items()} == {name: value.shape for name, value in first.items()}
    assert "pruning step 3" in said[0]
    assert "pruning step" not in said[1]
