"""Pruning in steps while training goes on: the optimizer, the average and the files follow."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoint_files import save_as_host
from hypothesis import given
from hypothesis import strategies as st
from models import lively
from random_plans import random_keep
from test_slimming import network
from test_training import KILLED, WORDS, epochs_in
from torch import nn
from torch.nn import functional

from yolo_prune.channels import trace
from yolo_prune.cli import main
from yolo_prune.errors import ConfigError, VerificationError
from yolo_prune.hosts.slim import MARKER, widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.gradual import GradualOptions, GradualPruning
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.hosts.ultralytics.trainer import train
from yolo_prune.methods.gradual import PruningSchedule, carry_optimizer, silence_softly
from yolo_prune.surgery import apply, silence
from yolo_prune.surgery.apply import selected


class TestSchedule:
    @given(st.integers(1, 20), st.integers(1, 10), st.floats(0.05, 0.95))
    def test_steps_come_in_order_and_end_at_the_target(self, every, steps, target):
        schedule = PruningSchedule(every=every, steps=steps, target=target)
        due = [schedule.steps_due(epochs) for epochs in range(every * (steps + 2))]
        assert due == sorted(due)
        assert set(due) == set(range(steps + 1))
        assert due.index(1) == every
        kept = [schedule.kept_after(step) for step in range(steps + 1)]
        assert kept[0] == 1.0
        assert kept[-1] == pytest.approx(target)
        assert np.allclose(np.diff(kept), (target - 1.0) / steps)

    def test_by_hand(self):
        schedule = PruningSchedule(every=3, steps=2, target=0.4)
        assert [schedule.steps_due(epoch) for epoch in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
        assert [schedule.kept_after(step) for step in (1, 2)] == [0.7, 0.4]

    def test_no_epoch_after_the_last_step_is_refused(self):
        schedule = PruningSchedule(every=3, steps=2, target=0.4)
        schedule.require_room(7)
        with pytest.raises(ConfigError, match="comes after epoch 6 of 6"):
            schedule.require_room(6)

    @pytest.mark.parametrize("wrong", [{"every": 0}, {"steps": 0}, {"target": 1.0}, {"target": 0.0}])
    def test_values_out_of_range(self, wrong):
        with pytest.raises(ConfigError):
            PruningSchedule(**{"every": 1, "steps": 1, "target": 0.5, **wrong})


def with_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


class TestOptimizer:
    """The law: to cut after a step is to step after the cut, on everything that is kept."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
            lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.01),
            lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.5),
        ],
    )
    @pytest.mark.parametrize("seed", range(3))
    def test_goes_on_as_if_the_channels_had_never_been(self, make, seed):
        graph = trace(network().eval(), torch.zeros(1, 3, 8, 8))
        keep = random_keep(graph, seed)
        (dense, stepped), (cut, carried) = (self.trained(make) for _ in range(2))
        with_gradients(dense, 99)
        gradients = {name: parameter.grad for name, parameter in dense.named_parameters()}
        stepped.step()
        slim = apply(cut, graph, keep)
        carry_optimizer(carried, dict(cut.named_parameters()), dict(slim.named_parameters()), graph, keep)
        for name, parameter in slim.named_parameters():
            parameter.grad = selected(graph, keep, name, gradients[name])
        carried.step()
        for name, parameter in slim.named_parameters():
            expected = selected(graph, keep, name, dense.get_parameter(name).detach())
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-7)

    def trained(self, make: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the toy after three steps, and the optimizer that took them, of two parameter groups."""
        model = network()
        parameters = list(model.parameters())
        optimizer = make([{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.05}])
        for step in range(3):
            with_gradients(model, step)
            optimizer.step()
        return model, optimizer

    def test_a_scheduler_and_hooks_notice_nothing(self):
        dense = network()
        graph = trace(dense.eval(), torch.zeros(1, 3, 8, 8))
        keep, calls = random_keep(graph, 0), []
        optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: calls.append(1))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        slim = apply(dense, graph, keep)
        carry_optimizer(optimizer, dict(dense.named_parameters()), dict(slim.named_parameters()), graph, keep)
        with_gradients(slim, 0)
        before = slim.stem.weight.detach().clone()
        optimizer.step()
        scheduler.step()
        assert calls == [1]
        assert optimizer.param_groups[0]["lr"] == 0.05
        assert not torch.equal(before, slim.stem.weight)


class TestSoftly:
    def test_channels_are_as_silent_as_removed_ones_and_may_come_back(self):
        model, loud = network(functional.silu), network(functional.silu)
        graph = trace(model.eval(), torch.zeros(1, 3, 8, 8))
        keep = random_keep(graph, 1)
        image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        silence(loud.eval(), graph, keep)
        silence_softly(model, graph, keep)
        torch.testing.assert_close(model(image), loud(image))
        model.train()(image).square().sum().backward()
        removed = torch.from_numpy(~keep[graph.axes["inner_bn.weight", 0].channels])
        assert removed.any()
        assert not model.inner_bn.weight[removed].any()
        assert (model.inner_bn.weight.grad[removed] != 0).all()
        assert model.inner.weight[removed].any()

    def test_filters_without_a_norm_are_zeroed_themselves(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
        graph = trace(model, torch.zeros(1, 3, 8, 8))
        keep = random_keep(graph, 0)
        silence_softly(model, graph, keep)
        removed = torch.from_numpy(~keep[graph.axes["0.weight", 0].channels])
        assert removed.any()
        assert not model[0].weight[removed].any()
        assert not model[0].bias[removed].any()
        assert model[0].weight[~removed].all()


def macs_in(path: Path) -> float:
    graph = trace_model(read_checkpoint(path).model)
    return float(graph.cost.macs(graph.widths(), imgsz_px=64))


def words_for(model: Path, data: Path, folder: Path, **more: Any) -> list[str]:
    settings = {"epochs": 5, "prune_every": 1, "prune_steps": 3, "target_macs": 0.4, "min_channels": 4, "round_to": 4}
    settings |= {"project": folder, "name": "a", "optimizer": "SGD", "lr0": 0.01, **more}
    return ["train", f"model={model}", f"data={data}", *(f"{key}={value}" for key, value in settings.items()), *WORDS]


STOCK = {key: yaml.safe_load(value) for key, value in (word.split("=") for word in WORDS)}


class ShareOfTheFirstHead:
    """Notes, after each epoch, how much of YOLO26's loss is that of its one-to-many head."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.callbacks = {"on_train_epoch_end": lambda trainer: self.shares.append(trainer.model.criterion.o2m)}


@pytest.mark.slow
class TestInTraining:
    def test_steps_reach_the_target_and_the_best_is_slim(self, dense_checkpoint, whole):
        folder, dense = whole, macs_in(dense_checkpoint)
        assert epochs_in(folder) == [1, 2, 3, 4, 5]
        record = json.loads((folder / "pruning.json").read_text())
        assert [(step["step"], step["epoch"]) for step in record["steps"]] == [(1, 1), (2, 2), (3, 3)]
        for step, kept in zip(record["steps"], (0.8, 0.6, 0.4), strict=True):
            assert kept - 0.06 < step["after"]["macs"] / dense <= kept + 1e-9
        for name in ("best.pt", "last.pt"):
            model = read_checkpoint(folder / "weights" / name).model
            assert macs_in(folder / "weights" / name) == record["steps"][-1]["after"]["macs"]
            assert getattr(model, MARKER)["widths"] == widths(model)
            assert getattr(model, MARKER)["step"] == 3

    def test_it_learns_while_it_shrinks(self, command, dense_checkpoint, tiny_data, tmp_path):
        """After a cut, the optimizer trains the network that is saved, not the one that was cut."""
        words = words_for(dense_checkpoint, tiny_data, tmp_path, prune_steps=1, epochs=3, save_period=1)
        assert command(*words).code == 0
        weights = tmp_path / "a" / "weights"
        before, after = (read_checkpoint(weights / f"epoch{epoch}.pt").model.state_dict() for epoch in (1, 2))
        floating = [name for name, value in before.items() if value.is_floating_point() and "dfl" not in name]
        moved = [name for name in floating if not torch.equal(before[name], after[name])]
        assert len(moved) > 0.8 * len(floating)

    def test_softly_nothing_is_removed_before_the_last_step(self, command, dense_checkpoint, tiny_data, tmp_path):
        words = words_for(dense_checkpoint, tiny_data, tmp_path, prune_soft="true", save_period=1)
        assert command(*words).code == 0
        weights, dense = tmp_path / "a" / "weights", macs_in(dense_checkpoint)
        found = [macs_in(weights / f"epoch{epoch}.pt") / dense for epoch in range(5)]
        assert found[:3] == [1.0, 1.0, 1.0]
        assert found[3] == found[4] <= 0.4

    @pytest.mark.parametrize("soft", [pytest.param("false", marks=pytest.mark.exhaustive), "true"])
    def test_by_what_training_images_tell(self, command, dense_checkpoint, tiny_data, tmp_path, soft):
        """A criterion that needs data looks at the same images before each step, and chooses others than L2 does."""
        common = {"prune_steps": 1, "epochs": 2, "prune_soft": soft, "single_cls": soft}
        for name, more in {"a": {"criterion": "taylor", "prune_batches": 2}, "b": {"criterion": "l2"}}.items():
            assert command(*words_for(dense_checkpoint, tiny_data, tmp_path, name=name, **common, **more)).code == 0
        plans = [json.loads((tmp_path / name / "pruning_step1.json").read_text()) for name in ("a", "b")]
        assert plans[0]["choice"]["criterion"] == "taylor"
        assert plans[0]["after"]["macs"] < 0.42 * plans[0]["before"]["macs"]
        assert plans[0]["groups"] != plans[1]["groups"]

    def test_with_sparsity_the_penalty_follows_the_cut(self, command, dense_checkpoint, tiny_data, tmp_path):
        words = words_for(dense_checkpoint, tiny_data, tmp_path, prune_steps=1, epochs=3, sparsity=2.0)
        assert command(*words).code == 0
        rows = (tmp_path / "a" / "sparsity.csv").read_text().splitlines()
        width = {
            epoch: sum(int(row.split(",")[2]) for row in rows[1:] if row.startswith(f"{epoch},")) for epoch in (1, 3)
        }
        assert width[3] < 0.8 * width[1]

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory, dense_checkpoint, tiny_data):
        """A run that nobody killed."""
        folder = tmp_path_factory.mktemp("whole")
        assert main(words_for(dense_checkpoint, tiny_data, folder)) == 0
        return folder / "a"

    @pytest.mark.parametrize("batches", [*(pytest.param(n, marks=pytest.mark.exhaustive) for n in (3, 8)), 5])
    def test_killed_and_resumed_it_ends_with_the_same_widths(
        self, command, dense_checkpoint, tiny_data, tmp_path, whole, batches
    ):
        """Two batches an epoch: killed before, between and after the steps."""
        done = subprocess.run(
            [
                sys.executable,
                KILLED,
                "on_train_batch_end",
                str(batches),
                *words_for(dense_checkpoint, tiny_data, tmp_path),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        folder = tmp_path / "a"
        assert command("train", f"model={folder / 'weights' / 'last.pt'}", "resume=true").code == 0
        assert epochs_in(folder) == epochs_in(whole)
        found, expected = (read_checkpoint(run / "weights" / "last.pt").model for run in (folder, whole))
        assert widths(found) == widths(expected)

    @pytest.mark.exhaustive
    def test_twin_heads_keep_their_loss(self, tiny_data, tmp_path):
        """YOLO26's loss moves from one head to the other with the epochs; a cut must not start it anew."""
        source = save_as_host(lively("yolo26n"), tmp_path / "dense.pt")
        schedule = PruningSchedule(every=2, steps=1, target=0.5)
        cut, plain = ShareOfTheFirstHead(), ShareOfTheFirstHead()
        runs = {"cut": [GradualPruning(GradualOptions(schedule=schedule)).callbacks(), cut.callbacks]}
        runs["plain"] = [plain.callbacks]
        for name, callbacks in runs.items():
            train(source, data=str(tiny_data), epochs=4, project=str(tmp_path), name=name, callbacks=callbacks, **STOCK)
        assert cut.shares == plain.shares
        assert len(set(cut.shares)) > 1
        weights = [tmp_path / name / "weights" / "last.pt" for name in ("cut", "plain")]
        assert macs_in(weights[0]) < 0.6 * macs_in(weights[1])

    def test_nan_in_the_epoch_of_the_cut_is_said_in_words(self, tiny_data, dense_checkpoint, tmp_path):
        """The host would go back to a checkpoint of another width, which ends in a size mismatch."""

        def spoil(trainer: Any) -> None:
            if trainer.epoch == 1:
                trainer.loss = trainer.loss * float("nan")

        schedule = PruningSchedule(every=1, steps=1, target=0.5)
        callbacks = [GradualPruning(GradualOptions(schedule=schedule)).callbacks(), {"on_train_epoch_end": spoil}]
        place = {"data": str(tiny_data), "project": str(tmp_path), "name": "a"}
        with pytest.raises(VerificationError, match="NaN in epoch 2"):
            train(dense_checkpoint, epochs=3, callbacks=callbacks, **place, **STOCK)

    def test_what_an_earlier_run_left_in_the_folder_is_not_taken_over(
        self, command, dense_checkpoint, tiny_data, tmp_path
    ):
        (tmp_path / "a").mkdir()
        for name in ("sparsity.json", "pruning.json", "pruning_step1.json"):
            (tmp_path / "a" / name).write_text("{}")
        words = ["train", f"model={dense_checkpoint}", f"data={tiny_data}", "epochs=1", f"project={tmp_path}", "name=a"]
        assert command(*words, "exist_ok=true", *WORDS).code == 0
        assert not list((tmp_path / "a").glob("*.json"))


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["prune_every=2"], "'target_macs=' is required"),
            (["target_macs=0.5"], "'prune_every=' is required"),
            (["prune_every=0", "target_macs=0.5"], "prune_every=0"),
            (["prune_every=1", "target_macs=1.5"], "target_macs=1.5"),
            (["prune_every=1", "target_macs=0.5", "criterion=taste"], "criterion=taste"),
            (["prune_every=1", "target_macs=0.5", "allocation=taste"], "allocation=taste"),
            (["prune_every=1", "target_macs=0.5", "prune_batches=0"], "prune_batches=0"),
        ],
    )
    def test_settings(self, command, dense_checkpoint, tiny_data, words, said):
        outcome = command("train", f"model={dense_checkpoint}", f"data={tiny_data}", *words)
        assert outcome.code == 2
        assert said in outcome.err

    def test_a_schedule_that_is_too_long(self, command, dense_checkpoint, tiny_data, tmp_path):
        outcome = command(*words_for(dense_checkpoint, tiny_data, tmp_path, epochs=3))
        assert outcome.code == 2
        assert "comes after epoch 3 of 3" in outcome.err

    def test_a_target_below_what_floors_allow(self, command, dense_checkpoint, tiny_data, tmp_path):
        """Said before the first epoch, not at the last step."""
        outcome = command(*words_for(dense_checkpoint, tiny_data, tmp_path, target_macs=0.01))
        assert outcome.code == 2
        assert "target_macs=0.01 cannot be reached" in outcome.err
        assert not (tmp_path / "a" / "results.csv").exists()

    @pytest.mark.parametrize("word", ["prune_soft=true", "criterion=l1", "sparsity_mode=subgradient"])
    def test_a_flag_that_would_do_nothing(self, command, dense_checkpoint, tiny_data, word):
        outcome = command("train", f"model={dense_checkpoint}", f"data={tiny_data}", word)
        assert outcome.code == 2
        assert "without " in outcome.err

    @pytest.mark.parametrize("word", ["compile=true", "time=0.1"])
    def test_trainings_that_cannot_lose_channels_on_their_way(
        self, command, dense_checkpoint, tiny_data, tmp_path, word
    ):
        key, _, value = word.partition("=")
        outcome = command(*words_for(dense_checkpoint, tiny_data, tmp_path, **{key: value}))
        assert outcome.code == 2
        assert f"prune_every= with {key}=" in outcome.err
