"""Filter grafting: the laws of its formulas, trainings side by side that do not disturb each other, and kills."""

from __future__ import annotations

import copy
import csv
import json
import math
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import lively
from test_training import KILLED, QUICK, WORDS, assert_slim, epochs_in
from torch import nn
from ultralytics.utils.callbacks import default_callbacks

from yolo_prune.channels import trace
from yolo_prune.cli import main
from yolo_prune.errors import CheckpointError, ConfigError
from yolo_prune.hosts.ultralytics import grafting_nets
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.grafting import grafting_options_of
from yolo_prune.hosts.ultralytics.grafting_files import (
    epochs_done,
    forget_nets,
    forget_previous,
    go_back,
    keep_previous,
    note_epoch,
    read_record,
    state_of_nets,
    write_record,
)
from yolo_prune.hosts.ultralytics.grafting_nets import lr_factor, require_same_shapes
from yolo_prune.hosts.ultralytics.run_files import forget_run, interrupted
from yolo_prune.hosts.ultralytics.side_by_side import ProcessState, run_side_by_side
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.hosts.ultralytics.trainer import train
from yolo_prune.methods.grafting import (
    Grafting,
    Layer,
    blend,
    entropy,
    filter_layers,
    graft_cyclically,
    graft_internally,
    graft_noise,
    invalid_filters,
    layers_of,
    own_weight,
)

FINITE = st.floats(0.0, math.log(10))


class TestFormulas:
    @pytest.mark.parametrize(
        ("weights", "expected"),
        [
            ([0.0, 0.0, 0.0, 1.0], -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
            ([0.05 + 0.1 * index for index in range(10)], math.log(10)),
            ([0.0, 0.04, 0.06, 0.14, 0.55, 1.0], 0.5 * math.log(2) + 0.5 * math.log(6)),  # 3, 1, 1, 1: bins of a tenth
            ([3.0, 3.0, 3.0], 0.0),
        ],
    )
    def test_entropy_by_hand(self, weights, expected):
        assert entropy(torch.tensor(weights)) == pytest.approx(expected, abs=1e-12)

    def test_entropy_does_not_see_scale_and_place(self):
        weights = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0)).double()
        assert entropy(-3.0 * weights + 5.0) == pytest.approx(entropy(weights), abs=1e-9)

    @given(FINITE, st.floats(1e-3, 1e6), st.floats(0.01, 0.99))
    def test_equal_entropies_give_one_half(self, own, sharpness, amplitude):
        assert own_weight(own, own, amplitude=amplitude, sharpness=sharpness) == 0.5

    @given(FINITE, FINITE, st.floats(1e-3, 1e6), st.floats(0.01, 0.99))
    def test_weights_of_a_pair_add_up_to_one(self, own, other, sharpness, amplitude):
        mine = own_weight(own, other, amplitude=amplitude, sharpness=sharpness)
        theirs = own_weight(other, own, amplitude=amplitude, sharpness=sharpness)
        assert mine + theirs == pytest.approx(1.0, abs=1e-15)
        assert 0.5 - amplitude / 2 <= mine <= 0.5 + amplitude / 2
        assert mine >= theirs or own <= other

    def test_weight_by_hand(self):
        assert own_weight(2.002, 2.0, amplitude=0.4, sharpness=500) == pytest.approx(0.5 + 0.4 / math.pi * math.pi / 4)

    def test_learning_rates_by_hand(self):
        assert [lr_factor(index, 2) for index in (1, 2)] == pytest.approx([0.5, 1.0])
        assert [lr_factor(index, 3) for index in (1, 2, 3)] == pytest.approx([0.25, 0.75, 1.0])


class Small(nn.Module):
    """A convolution with a norm, one with a bias, one that is frozen, and a vector of no convolution."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.norm, self.out = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.fixed, self.scale = nn.Conv2d(4, 2, 1).requires_grad_(False), nn.Parameter(torch.randn(4))
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.norm.num_batches_tracked.fill_(seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fixed(self.out(nn.functional.silu(self.norm(self.a(x)))) * self.scale[:, None, None])


LAYERS = [Layer(conv="a", norm="norm"), Layer(conv="out", norm=None)]
PROBE = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(9)).double()


def states(*models: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [copy.deepcopy(model.state_dict()) for model in models]


class TestBlending:
    def test_layers_are_found_with_the_norm_behind_them(self):
        model = Small(0)
        assert layers_of(model, trace(model.eval(), torch.zeros(1, 3, 9, 9)).norms) == LAYERS

    def test_a_norm_follows_its_convolution(self):
        own, other = Small(1).double(), Small(2).double()
        (before, scions), weights = states(own, other), {"a": 0.25, "out": 0.7}
        blend(own, scions, LAYERS, weights)
        alphas = {"a.weight": 0.25, "out.weight": 0.7, "out.bias": 0.7}
        alphas |= {f"norm.{name}": 0.25 for name in ("weight", "bias", "running_mean", "running_var")}
        for name, value in own.state_dict().items():
            alpha = alphas.pop(name, None)
            expected = before[name] if alpha is None else alpha * before[name] + (1 - alpha) * scions[name]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-15)
        assert not alphas
        assert own.norm.num_batches_tracked == 1

    @given(st.floats(0.0, 1.0))
    def test_equal_networks_are_a_fixed_point_bit_by_bit(self, alpha):
        model = Small(1)
        before = copy.deepcopy(model.state_dict())
        blend(model, before, LAYERS, dict.fromkeys(("a", "out"), alpha))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_each_takes_from_the_one_before_as_all_were_before(self):
        nets = [[Small(seed).double(), Small(seed + 10).double()] for seed in range(3)]
        before = [states(*net) for net in nets]
        chosen = graft_cyclically(nets, LAYERS, Grafting())
        for index, (net, weights) in enumerate(zip(nets, chosen, strict=True)):
            for part, model in enumerate(net):  # the network and its average, by the same weights
                own, scions = before[index][part], before[index - 1][part]
                for path in ("a", "out"):
                    alpha = own_weight(
                        entropy(before[index][0][f"{path}.weight"]),
                        entropy(before[index - 1][0][f"{path}.weight"]),
                        amplitude=0.4,
                        sharpness=500,
                    )
                    assert weights[path] == alpha
                    assert 0.3 <= alpha <= 0.7
                    expected = alpha * own[f"{path}.weight"] + (1 - alpha) * scions[f"{path}.weight"]
                    torch.testing.assert_close(model.state_dict()[f"{path}.weight"], expected, rtol=0, atol=1e-15)

    def test_a_pair_is_one_network_afterwards(self):
        """What alpha_i + alpha_j = 1 means for two networks; from then on, data and learning rates part them."""
        first, second = [Small(1).double()], [Small(2).double()]
        graft_cyclically([first, second], LAYERS, Grafting())
        for name in (name for layer in LAYERS for name in layer.tensors(first[0].state_dict())):
            torch.testing.assert_close(first[0].state_dict()[name], second[0].state_dict()[name], rtol=0, atol=1e-15)

    def test_one_that_is_not_finite_neither_gives_nor_takes(self):
        nets = [[Small(seed)] for seed in range(3)]
        nets[1][0].norm.running_var[0] = math.nan
        before = states(*(net[0] for net in nets))
        weights = graft_cyclically(nets, LAYERS, Grafting())
        assert [chosen is None for chosen in weights] == [False, True, True]
        for index in (1, 2):
            found = nets[index][0].state_dict()
            for name, value in before[index].items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(nets[0][0].a.weight, before[0]["a.weight"])

    @pytest.mark.parametrize("name", ["yolov8n", "yolov9t", "yolo12n", "yolo26n", "yolov8n-seg"])
    def test_real_networks(self, name):
        """Every norm has its convolution, every value is the blend, and the constant layer stays."""
        own, other = lively(name, seed=1).double(), lively(name, seed=2).double()
        for path, parameter in own.named_parameters():
            parameter.requires_grad = ".dfl" not in path
        layers = layers_of(own, trace_model(own).norms)
        modules = dict(own.named_modules())
        assert {layer.norm for layer in layers if layer.norm} == {
            path for path, module in modules.items() if isinstance(module, nn.BatchNorm2d)
        }
        before, scions = states(own, other)
        (weights, _) = graft_cyclically([[own], [other]], layers, Grafting())
        touched = {name: layer.conv for layer in layers for name in layer.tensors(before)}
        for path, value in own.state_dict().items():
            expected = before[path]
            if path in touched:
                alpha = weights[touched[path]]
                expected = alpha * expected + (1 - alpha) * scions[path]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
        left = {path.rpartition(".")[2] for path in before if path not in touched}
        assert left <= {"num_batches_tracked", "weight", "bias", "gamma", "anchors"}
        assert not [path for path in touched if ".dfl" in path]


class TestWithinOneNetwork:
    def weak(self, seed: int = 0) -> Small:
        """Return a network three of whose eight filters are small; the smallest is the third."""
        model = Small(seed).double()
        with torch.no_grad():
            for index, factor in ((1, 0.02), (2, 0.01), (5, 0.03)):
                model.a.weight[index] *= factor
        return model

    def test_invalid_filters_by_hand(self):
        weight = torch.tensor([4.0, 0.1, 5.0, 0.2, 3.0])[:, None]  # mean 2.46
        small, large = invalid_filters(weight, 0.5)
        assert (small.tolist(), large.tolist()) == ([1, 3], [2, 0])
        assert invalid_filters(weight, 0.06)[0].tolist() == [1]
        assert invalid_filters(torch.ones(6, 2), 0.99)[0].tolist() == []
        small, large = invalid_filters(torch.tensor([0.0, 0.0, 0.0, 9.0])[:, None], 0.5)
        assert len(small) == 2
        assert not {*small.tolist()} & {*large.tolist()}

    def test_outputs_and_grouped_convolutions_are_left_alone(self):
        model = Small(0)
        assert filter_layers(model, LAYERS) == LAYERS[:1]
        model.a = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        assert filter_layers(model, LAYERS) == []

    def test_a_strong_filter_is_added_to_a_weak_one(self):
        model, average = self.weak(), self.weak(3)
        (before, of_average) = states(model, average)
        small, large = invalid_filters(before["a.weight"], 0.5)
        assert small.tolist() == [2, 1, 5]
        assert graft_internally([model, average], LAYERS[:1], 0.5) == 3
        for found, old in ((model, before), (average, of_average)):
            kept = [index for index in range(8) if index not in small]
            for name in ("a.weight", "norm.running_mean", "norm.running_var"):
                now = found.state_dict()[name]
                torch.testing.assert_close(now[small], old[name][small] + old[name][large], rtol=0, atol=1e-15)
                assert torch.equal(now[kept], old[name][kept])
            assert torch.equal(found.norm.weight, old["norm.weight"])

    def test_the_running_mean_behind_a_revived_filter_is_right(self):
        model = self.weak()
        outputs = model.a(PROBE)
        model.norm.running_mean.copy_(outputs.mean((0, 2, 3)).detach())
        graft_internally([model], LAYERS[:1], 0.5)
        torch.testing.assert_close(model.norm.running_mean, model.a(PROBE).mean((0, 2, 3)), rtol=0, atol=1e-14)

    def test_noise_goes_onto_invalid_filters_alone_and_is_the_same_for_the_average(self):
        model, average = self.weak(), self.weak(3)
        before = states(model, average)
        state = torch.get_rng_state()
        assert graft_noise([model, average], LAYERS[:1], 0.5, deviation=0.25, seed=7) == 3
        assert torch.equal(torch.get_rng_state(), state)
        added = [found.a.weight - old["a.weight"] for found, old in zip((model, average), before, strict=True)]
        torch.testing.assert_close(added[0], added[1], rtol=0, atol=1e-15)
        assert added[0].abs().flatten(1).sum(1).nonzero()[:, 0].tolist() == [1, 2, 5]
        again = self.weak()
        graft_noise([again], LAYERS[:1], 0.5, deviation=0.25, seed=7)
        assert torch.equal(again.a.weight, model.a.weight)

    def test_noise_has_the_deviation_that_was_asked_for(self):
        model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.BatchNorm2d(64))
        with torch.no_grad():
            model[0].weight[:32] = 0.0
        graft_noise([model], [Layer(conv="0", norm="1")], 0.5, deviation=0.125, seed=0)
        values = model[0].weight[:32].detach()
        assert values.std().item() == pytest.approx(0.125, rel=0.02)
        assert abs(values.mean().item()) < 0.125 * 5 / math.sqrt(values.numel())


def drawing(points: int, seed: int, log: list[Any], name: str = "") -> Any:
    """Return a work that seeds everything, draws at every point and hands over."""

    def work(turn: Any) -> list[float]:
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        torch.use_deterministic_algorithms(seed % 2 == 1, warn_only=True)
        drawn = []
        for point in range(points):
            log.append((name, point))
            turn.pause(point)
            assert torch.are_deterministic_algorithms_enabled() == (seed % 2 == 1)
            drawn += [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return drawn

    return work


class TestSideBySide:
    def test_each_draws_what_it_would_draw_alone(self):
        before, log = ProcessState.capture(), []
        together = run_side_by_side([drawing(3, seed, log) for seed in (1, 2, 3)], lambda _: None)
        alone = [run_side_by_side([drawing(3, seed, log)], lambda _: None)[0] for seed in (1, 2, 3)]
        assert together == alone
        assert len({value for drawn in alone for value in drawn}) == 27
        assert torch.equal(torch.get_rng_state(), before.torch_rng)
        assert not torch.are_deterministic_algorithms_enabled()

    def test_all_meet_before_any_goes_on(self):
        log: list[Any] = []
        run_side_by_side([drawing(2, 1, log, name) for name in "ab"], log.append)
        assert log == [("a", 0), ("b", 0), 0, ("a", 1), ("b", 1), 1]

    def test_one_that_does_a_point_again_is_sent_on(self):
        """As the host does an epoch again after NaN."""
        log: list[Any] = []

        def again(turn: Any) -> str:
            for point in (0, 1, 1, 1, 2):
                turn.pause(point)
            return "done"

        results = run_side_by_side([again, drawing(3, 1, [])], log.append)
        assert results[0] == "done"
        assert log == [0, 1, 2]

    @pytest.mark.parametrize("error", [ConfigError("no"), KeyboardInterrupt(), RuntimeError("boom")])
    def test_what_one_raises_ends_all(self, error):
        ended = []

        def failing(turn: Any) -> None:
            turn.pause(0)
            raise error

        def waiting(turn: Any) -> None:
            try:
                turn.pause(0)
                turn.pause(1)
            finally:
                ended.append(1)

        with pytest.raises(type(error)) as raised:
            run_side_by_side([waiting, failing, waiting], lambda _: None)
        assert raised.value is error
        assert ended == [1, 1]

    def test_what_a_meeting_raises_ends_all(self):
        def refuse(_: int) -> None:
            raise ConfigError("differ")

        with pytest.raises(ConfigError, match="differ"):
            run_side_by_side([drawing(1, seed, []) for seed in (1, 2)], refuse)

    def test_points_that_differ_are_an_error(self):
        with pytest.raises(RuntimeError, match="different points"):
            run_side_by_side([drawing(1, 1, []), drawing(2, 1, [])], lambda _: None)


def saved(net: Path, name: str, epoch: int, *, of: int = 5, optimizer: Any = ()) -> None:
    """Write a checkpoint as the host does in the middle of a training, with nothing but its place in it."""
    (net / "weights").mkdir(parents=True, exist_ok=True)
    content = {"epoch": epoch, "optimizer": optimizer, "train_args": {"epochs": of}}
    torch.save(content, net / "weights" / f"{name}.pt")


def epoch_of(net: Path, name: str) -> int:
    return torch.load(net / "weights" / f"{name}.pt")["epoch"]


class TestFilesOfSeveralNetworks:
    @pytest.fixture
    def nets(self, tmp_path):
        """Two networks, of which the first has saved an epoch more, its best one."""
        first, second = tmp_path / "net1", tmp_path / "net2"
        for net in (first, second):
            saved(net, "last", 2), saved(net, "best", 1)
            keep_previous(net)
        saved(first, "last", 3), saved(first, "best", 3)
        write_record(tmp_path, {"options": {}, "nets": {"net1": {}, "net2": {}}, "epochs": []})
        return [first, second]

    def test_all_go_back_to_the_epoch_that_all_have(self, nets):
        assert [epochs_done(net) for net in nets] == [4, 3]
        assert go_back(nets) == 3
        assert [(epoch_of(net, "last"), epoch_of(net, "best")) for net in nets] == [(2, 1), (2, 1)]
        assert go_back(nets) == 3
        forget_previous(nets)
        assert sorted(path.name for path in (nets[0] / "weights").iterdir()) == ["best.pt", "last.pt"]

    def test_a_folder_that_is_used_again_keeps_nothing_that_could_be_taken_for_the_new_run(self, nets, tmp_path):
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "best.pt").touch()
        forget_nets(tmp_path, nets)
        assert not list(tmp_path.rglob("*.pt"))

    @pytest.mark.parametrize("file", ["best.pt", "last.pt"])
    def test_going_back_may_be_stopped_and_done_again(self, nets, monkeypatch, file):
        from yolo_prune.hosts.ultralytics import grafting_files

        copied, copy_whole = [], grafting_files._copy

        def stopped(source: Path, target: Path) -> None:
            if target.name == file:
                raise KeyboardInterrupt
            copied.append(copy_whole(source, target))

        with monkeypatch.context() as patch:
            patch.setattr(grafting_files, "_copy", stopped)
            with pytest.raises(KeyboardInterrupt):
                go_back(nets)
        assert len(copied) == (file == "last.pt")
        assert go_back(nets) == 3
        assert [(epoch_of(net, "last"), epoch_of(net, "best")) for net in nets] == [(2, 1), (2, 1)]

    def test_a_best_checkpoint_of_the_first_epoch_goes_if_there_was_none(self, nets):
        (nets[0] / "weights" / "previous_best.pt").unlink()
        go_back(nets)
        assert not (nets[0] / "weights" / "best.pt").exists()

    def test_without_the_epoch_that_all_have_nothing_is_guessed(self, nets):
        saved(nets[0], "previous_last", 1)
        with pytest.raises(CheckpointError, match="no checkpoint of epoch 3"):
            go_back(nets)
        assert epoch_of(nets[0], "last") == 3

    def test_what_a_run_left(self, nets, tmp_path):
        assert interrupted(tmp_path) == state_of_nets(tmp_path) == "resumable"
        (nets[1] / "weights" / "last.pt").unlink()
        assert interrupted(tmp_path) == "nothing"
        saved(nets[1], "last", -1, optimizer=None)  # stripped
        assert epochs_done(nets[1]) == 5
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "best.pt").touch()
        assert interrupted(tmp_path) == "finished"
        assert state_of_nets(nets[0]) is None
        forget_run(tmp_path)
        assert read_record(tmp_path) is None

    def test_an_epoch_that_is_done_again_is_noted_once(self, tmp_path):
        write_record(tmp_path, {"epochs": []})
        for epoch in (1, 2, 3, 2):
            note_epoch(tmp_path, epoch, epoch)
        assert [row["epoch"] for row in read_record(tmp_path)["epochs"]] == [1, 2]

    def test_a_damaged_record(self, tmp_path):
        (tmp_path / "grafting.json").write_text("{")
        with pytest.raises(ConfigError, match="cannot read"):
            grafting_options_of(tmp_path)


FAST = [word for word in WORDS if not word.startswith(("imgsz", "batch"))] + ["imgsz=32", "batch=8", "epochs=2"]
FAST_STOCK = {**QUICK, "imgsz": 32, "batch": 8, "epochs": 2}


def words_for(model: Path, data: Path, folder: Path, *more: str) -> list[str]:
    place = [f"project={folder}", "name=a", "optimizer=SGD"]
    return ["train", f"model={model}", f"data={data}", "method=grafting", *place, *FAST, *more]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path).model.state_dict()


def assert_equal_weights(found: Path, expected: Path) -> None:
    one, other = weights_of(found), weights_of(expected)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def trained():
    """The networks of `whole` after its last epoch, and their averages, by the names of their folders."""
    return {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, slim_checkpoint, tiny_data, trained):
    """A run of two slim networks that nobody disturbed."""

    def keep(trainer: Any) -> None:
        trained[trainer.save_dir.name] = states(trainer.model, trainer.ema.ema)

    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(default_callbacks, "on_model_save", [keep])
        assert main(words_for(slim_checkpoint, tiny_data, folder)) == 0
    return folder / "a"


@pytest.mark.slow
class TestSeveralNetworks:
    def test_a_slim_start_ends_with_the_best_of_them(self, whole, slim_checkpoint):
        record = read_record(whole)
        assert list(record["nets"].values()) == [{"seed": 0, "lr_factor": 0.5}, {"seed": 1, "lr_factor": 1.0}]
        assert [row["epoch"] for row in record["epochs"]] == [1, 2]
        for row in record["epochs"]:
            assert sum(row["grafted"].values()) == pytest.approx(1.0)
            assert row["grafted"]["net1"] != 0.5
        assert record["best"] == max(record["fitness"], key=record["fitness"].get)
        slim = read_checkpoint(slim_checkpoint).model
        for name in record["nets"]:
            assert epochs_in(whole / name) == [1, 2]
            assert sorted(path.name for path in (whole / name / "weights").iterdir()) == ["best.pt", "last.pt"]
            assert_slim(whole / name / "weights" / "last.pt", slim)
        best = whole / "weights" / "best.pt"
        assert best.read_bytes() == (whole / record["best"] / "weights" / "best.pt").read_bytes()
        assert_slim(best, slim)
        assert interrupted(whole) == "finished"

    @pytest.mark.usefixtures("whole")
    def test_networks_and_their_averages_were_blended_alike(self, trained):
        """A pair is one network after the last graft; network and average of one are not."""
        first, second = trained["net1"], trained["net2"]
        for mine, theirs in zip(first, second, strict=True):
            for name, value in mine.items():
                torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6 * (1 + float(value.abs().max())))
        assert not torch.equal(first[0]["model.0.conv.weight"], first[1]["model.0.conv.weight"])

    @pytest.mark.parametrize("start", ["yolov8n.yaml", "checkpoint"])
    def test_networks_start_from_one_checkpoint_or_from_seeds_of_their_own(
        self, command, dense_checkpoint, tiny_data, tmp_path, monkeypatch, start
    ):
        found = []

        def look(_: Any, trainers: Any) -> None:
            found.extend((trainer.model.model[0].conv.weight, next(iter(trainer.train_loader))) for trainer in trainers)
            raise KeyboardInterrupt

        monkeypatch.setattr(grafting_nets.NetsTraining, "_look_alike", look)
        model = dense_checkpoint if start == "checkpoint" else start
        assert command(*words_for(model, tiny_data, tmp_path)).code == 130
        (first, images), (second, others) = found
        assert torch.equal(first, second) == (start == "checkpoint")
        assert images["im_file"] != others["im_file"]
        assert not (tmp_path / "a" / "grafting.json").exists()

    def test_networks_learn_at_their_own_rates(self, whole):
        rates = []
        for net in ("net1", "net2"):
            with (whole / net / "results.csv").open() as stream:
                rates.append([float(row["lr/pg0"]) for row in csv.DictReader(stream)])
        assert rates[0] == pytest.approx([0.5 * rate for rate in rates[1]])

    def test_a_finished_run_is_not_resumed(self, command, whole):
        outcome = command("train", f"model={whole / 'net1' / 'weights' / 'last.pt'}", "resume=true")
        assert outcome.code == 2
        assert "has no training to resume: it is finished" in outcome.err

    def test_stopped_while_it_is_wound_up_it_ends_the_same(
        self, command, whole, slim_checkpoint, tiny_data, tmp_path, monkeypatch
    ):
        """So the same command twice gives the same weights: two networks, one process, no clock."""

        def stop(_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:  # the first network is stripped, the second is not
            patch.setitem(default_callbacks, "on_train_end", [stop])
            assert command(*words_for(slim_checkpoint, tiny_data, tmp_path)).code == 130
        last = tmp_path / "a" / "net2" / "weights" / "last.pt"
        assert torch.load(last, weights_only=False)["optimizer"] is not None
        outcome = command("train", f"model={last}", "resume=true")
        assert outcome.code == 0
        assert f"best checkpoint: {tmp_path / 'a' / 'weights' / 'best.pt'}" in outcome.out
        for path in ("weights/best.pt", "net1/weights/last.pt", "net2/weights/last.pt", "net2/weights/best.pt"):
            assert_equal_weights(tmp_path / "a" / path, whole / path)
        found, expected = read_record(tmp_path / "a"), read_record(whole)
        assert found == expected

    def test_killed_between_two_saves_all_go_on_from_the_same_epoch(
        self, command, dense_checkpoint, tiny_data, tmp_path
    ):
        """The third checkpoint is the first network's second; the second network's second is never written."""
        words = words_for(dense_checkpoint, tiny_data, tmp_path)
        dead = subprocess.run(
            [sys.executable, KILLED, "on_model_save", "3", *words], capture_output=True, text=True, check=False
        )
        assert dead.returncode == -signal.SIGKILL, dead.stderr
        folder = tmp_path / "a"
        nets = [folder / "net1", folder / "net2"]
        assert [epochs_done(net) for net in nets] == [2, 1]
        assert interrupted(folder) == "resumable"
        last = nets[0] / "weights" / "last.pt"
        other = command("train", f"model={last}", "resume=true", "method=grafting", "grafting.nets=3")
        assert other.code == 2
        assert "resume=true with other grafting settings" in other.err
        assert [epochs_done(net) for net in nets] == [2, 1]
        assert command("train", f"model={last}", "resume=true").code == 0
        assert [epochs_in(net) for net in nets] == [[1, 2], [1, 2]]
        record = read_record(folder)
        assert [row["epoch"] for row in record["epochs"]] == [1, 2]
        assert set(record["fitness"]) == {"net1", "net2"}
        assert interrupted(folder) == "finished"
        assert (folder / "weights" / "best.pt").is_file()

    def test_without_grafting_each_trains_as_it_would_alone(
        self, command, dense_checkpoint, tiny_data, tmp_path, monkeypatch
    ):
        """Bit by bit: handing over disturbs nothing. The second network has the whole lr0, and seed 1."""
        monkeypatch.setattr(grafting_nets, "graft_cyclically", lambda networks, *_: [None] * len(networks))
        assert command(*words_for(dense_checkpoint, tiny_data, tmp_path)).code == 0
        place = {"project": str(tmp_path), "name": "alone", "optimizer": "SGD"}
        train(dense_checkpoint, data=str(tiny_data), **place, **{**FAST_STOCK, "seed": 1})
        for name in ("last.pt", "best.pt"):
            assert_equal_weights(tmp_path / "a" / "net2" / "weights" / name, tmp_path / "alone" / "weights" / name)
        rows = [(tmp_path / folder / "results.csv").read_text().splitlines()[1:] for folder in ("a/net2", "alone")]
        without_time = [[line.split(",")[:1] + line.split(",")[2:] for line in lines] for lines in rows]
        assert without_time[0] == without_time[1]


@pytest.mark.slow
class TestOneNetwork:
    @pytest.mark.parametrize("mode", ["internal", "noise"])
    def test_revives_and_says_how_many(self, command, slim_checkpoint, tiny_data, tmp_path, mode):
        words = words_for(slim_checkpoint, tiny_data, tmp_path, f"grafting.mode={mode}", "grafting.threshold=0.9")
        assert command(*words).code == 0
        record = json.loads((tmp_path / "a" / "grafting.json").read_text())
        assert [row["epoch"] for row in record["epochs"]] == [1]  # after the last epoch nothing would train it
        assert record["epochs"][0]["grafted"] > 0
        assert epochs_in(tmp_path / "a") == [1, 2]
        assert_slim(tmp_path / "a" / "weights" / "best.pt", read_checkpoint(slim_checkpoint).model)
        assert interrupted(tmp_path / "a") == "finished"
        assert grafting_options_of(tmp_path / "a").mode == mode


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["method=graftin"], "unknown method 'graftin'"),
            (["grafting.nets=3"], "grafting.nets=3 without method=grafting"),
            (["method=grafting", "grafting.mode=none"], "unknown grafting.mode 'none'"),
            (["method=grafting", "grafting.nets=1"], "grafting.nets=1"),
            (["method=grafting", "grafting.amplitude=1"], "grafting.amplitude=1"),
            (["method=grafting", "grafting.sharpness=0"], "grafting.sharpness=0"),
            (["method=grafting", "grafting.mode=noise", "grafting.noise_base=1"], "grafting.noise_base=1"),
            (["method=grafting", "grafting.mode=internal", "grafting.threshold=0"], "grafting.threshold=0"),
            (["method=grafting", "grafting.threshold=0.3"], "grafting.threshold=0.3 with grafting.mode=external"),
            (["method=grafting", "grafting.mode=noise", "grafting.nets=3"], "grafting.nets=3 with grafting.mode=noise"),
            (["method=grafting", "grafting.models=[dense.pt]"], "names 1 checkpoints, grafting.nets=2"),
            (["method=grafting", "grafting.mode=noise", "grafting.models=[a.pt,b.pt]"], "grafting.mode=noise"),
            (["method=grafting", "grafting.models=[b.pt,dense.pt]"], "grafting.models begins with b.pt"),
            (["method=grafting", "grafting.models=[dense.pt,slim_before.pt]"], "differ in"),
            (["method=grafting", "sparsity=auto"], "sparsity and grafting in one training"),
            (["method=grafting", "prune_every=1", "target_macs=0.5"], "pruning and grafting in one training"),
            (["method=grafting", "target_macs=0.5"], "target_macs=0.5 without prune_every"),
            (["method=grafting", "distill=dense.pt"], "distill= with grafting.mode=external"),
            (["method=grafting", "device=0,1"], "with device=0,1"),
            (["method=grafting", "device=[0,1]"], "with device=[0, 1]"),
            (["method=grafting", "batch=-1"], "with batch=-1"),
            (["method=grafting", "time=0.1"], "with time=0.1"),
            (["method=grafting", "compile=true"], "with compile=True"),
        ],
    )
    @pytest.mark.usefixtures("slim")
    def test_before_anything_is_written(self, refused, dense, data, words, said):
        assert said in refused("train", f"model={dense.name}", f"data={data}", "epochs=1", *words)

    def test_shapes_of_another_family(self, dense_checkpoint):
        require_same_shapes([dense_checkpoint, dense_checkpoint])
        with pytest.raises(ConfigError, match=r"differ in \d+ tensors, first 'model"):
            require_same_shapes([dense_checkpoint, "yolo11n.yaml"])
