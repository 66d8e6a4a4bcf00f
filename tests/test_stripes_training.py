"""Stripes in whole trainings: what a finished network is, killed and resumed, refused."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import globals_named_in
from command_line import contents
from models import lively
from test_training import KILLED, WORDS, epochs_in
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules.conv import Conv

from yolo_prune.claims import claimed
from yolo_prune.cli import main
from yolo_prune.errors import CheckpointError, ConfigError
from yolo_prune.hosts.slim import MARKER, Checkpoint, mark, unfinished, widths
from yolo_prune.hosts.ultralytics import stripes as training
from yolo_prune.hosts.ultralytics import stripes_finish
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import image_files
from yolo_prune.hosts.ultralytics.run_files import interrupted, network_in
from yolo_prune.hosts.ultralytics.stripe_layers import StripePrices, dead_stripes, layers_of, striped_paths
from yolo_prune.hosts.ultralytics.stripes_finish import finished
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.methods.stripes.options import StripeOptions
from yolo_prune.methods.stripes.ranking import StripeFloors, StripeRanking
from yolo_prune.methods.stripes.skeleton import SKELETON, SkeletonSteps, grow_skeleton
from yolo_prune.pipeline.training_methods import METHODS
from yolo_prune.surgery.stripes import StripeConv, living_stripes, macs_per_stripe, with_stripe_convs


def skeletal(name: str) -> Any:
    """Return a detector in the middle of stripe-wise training."""
    network = lively(name)
    for path in striped_paths(network):
        grow_skeleton(network.get_submodule(path))
    mark(network, unfinished="stripes")
    return network


def shrunk(network: Any, kept: float) -> StripePrices:
    """Let stripes of a network die until a fraction of its MACs is left; return its prices."""
    prices, layers = StripePrices(copy.deepcopy(network), 64), layers_of(network)
    ranking = StripeRanking(layers, prices.per_stripe, StripeFloors())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    dying = ranking.within(kept * prices.dense_macs, lambda stripes: prices.macs(network, stripes))
    SkeletonSteps(layers, threshold=0.01).kill(dying, optimizer)
    return prices


def checkpoint_of(network: nn.Module) -> Checkpoint:
    return Checkpoint(path=Path("last.pt"), sha256="0" * 64, model=network, stored_dtype=torch.float32, train_args={})


class TestFinishing:
    @pytest.mark.parametrize(("name", "kept"), [("yolov8n", 0.5), ("yolo26n", 0.7)])
    def test_dead_filters_go_where_the_graph_allows_it_exactly(self, name, kept):
        """The price that training is steered by is what is left in the end; the proof is inside `finished`."""
        network = skeletal(name)
        prices, before = shrunk(network, kept), widths(network)
        macs = prices.macs(network)
        assert (kept - 0.01) * prices.dense_macs < macs <= kept * prices.dense_macs
        whole = copy.deepcopy(network)
        done: Any = finished(checkpoint_of(network), imgsz_px=64)
        assert unfinished(done) is None
        assert SKELETON not in {key.rpartition(".")[2] for key in done.state_dict()}
        marker = getattr(done, MARKER)
        assert marker["stripes"]["macs"] == pytest.approx(macs, abs=0.6)
        assert marker["method"] == "stripes"
        after = widths(done)
        assert marker["widths"] == after
        assert any(after[path] < before[path] for path in before)
        graph = trace_model(done)
        assert marker["stripes"]["dense_macs"] == round(float(graph.cost.macs(graph.widths(), imgsz_px=64)))
        image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
        with torch.no_grad():
            expected, found = (model.double().eval()(image)[0] for model in (whole, done))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    def test_targets_are_what_runs_with_a_norm_behind(self):
        for name in ("yolov8n", "yolov10n", "yolov9t"):
            network = lively(name)
            found, modules = striped_paths(network), dict(network.named_modules())
            assert all(modules[path].groups == 1 and max(modules[path].kernel_size) > 1 for path in found)
            assert not [path for path in found if ".dfl" in path]
            assert set(found) <= set(macs_per_stripe(network, torch.zeros(1, 3, 64, 64)))
        assert not [
            path
            for path in found
            if modules[path.rpartition(".")[0].rpartition(".")[0]].__class__.__name__ == "RepConv"
        ]

    def test_a_network_of_1x1_convolutions_is_refused(self):
        network = nn.Sequential(Conv(3, 4, 1), Conv(4, 4, 3, g=4))
        with pytest.raises(ConfigError, match="without a convolution that has stripes"):
            METHODS["stripes"].fits(StripeOptions(), network)

    def test_nothing_dead_nothing_removed(self):
        network = skeletal("yolov8n")
        before = widths(network)
        done = finished(checkpoint_of(network), imgsz_px=64)
        assert widths(done) == before
        assert getattr(done, MARKER)["stripes"]["kept"] == getattr(done, MARKER)["stripes"]["total"]
        assert getattr(done, MARKER)["zeros"] == []

    def test_removal_that_changes_something_is_an_error(self, monkeypatch):
        network = skeletal("yolov8n")
        loud = lambda *_: np.random.default_rng(0).random(trace_model(lively("yolov8n")).channel_count) < 0.2  # noqa: E731
        monkeypatch.setattr(stripes_finish, "silent_channels", loud)
        with pytest.raises(Exception, match="still mattered"):
            finished(checkpoint_of(network), imgsz_px=64)


def words_for(model: Path, data: Path, folder: Path, **more: Any) -> list[str]:
    settings = {
        "epochs": 2,
        "method": "stripes",
        "target_macs": 0.6,
        "lr0": 0.01,
        "project": folder,
        "name": "a",
        **more,
    }
    return ["train", f"model={model}", f"data={data}", *(f"{key}={value}" for key, value in settings.items()), *WORDS]


def record_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stripes.json").read_text())


def assert_finished(folder: Path, kept: float) -> None:
    """Assert that both checkpoints of a run are stock ones whose living stripes cost what they may."""
    for name in ("best.pt", "last.pt"):
        path = folder / "weights" / name
        assert all(
            module.startswith(("torch", "ultralytics", "collections", "builtins", "__builtin__", "_codecs"))
            for module in globals_named_in(path)
        )
        model: Any = read_checkpoint(path).model
        marker = getattr(model, MARKER)
        assert marker["widths"] == widths(model)
        assert not layers_of(model)
        stripes = marker["stripes"]
        assert stripes["macs"] <= kept * record_in(folder)["macs"]
        assert stripes["kept"] < stripes["total"]
        found = sum(
            int(living_stripes(model.get_submodule(p)).sum()) for p in StripePrices(copy.deepcopy(model), 64).per_stripe
        )
        assert found == stripes["kept"]


@pytest.mark.slow
class TestInTraining:
    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory, dense_checkpoint, tiny_data):
        """A run that nobody killed."""
        folder = tmp_path_factory.mktemp("whole")
        assert main(words_for(dense_checkpoint, tiny_data, folder)) == 0
        return folder / "a"

    def test_it_ends_within_its_target_as_a_stock_network(self, whole):
        assert epochs_in(whole) == [1, 2]
        assert_finished(whole, 0.6)
        epochs = record_in(whole)["epochs"]
        assert [epoch["epoch"] for epoch in epochs] == [1, 2]
        assert 0.58 < epochs[-1]["kept_macs"] <= 0.6

    def test_living_stripes_alone_predict_the_same(self, whole, tiny_data):
        """As README shows it, on the host's fused network."""
        best, picture = whole / "weights" / "best.pt", image_files(tiny_data, "val")[0]
        stock, yolo = YOLO(best), YOLO(best)
        yolo.model = with_stripe_convs(yolo.model.float().fuse(verbose=False))
        assert any(isinstance(module, StripeConv) for module in yolo.model.modules())
        expected, found = (one.predict(picture, imgsz=64, conf=0.001, verbose=False)[0] for one in (stock, yolo))
        assert len(expected.boxes) > 0
        torch.testing.assert_close(found.boxes.data, expected.boxes.data, rtol=0, atol=1e-3)

    def test_a_later_training_keeps_the_dead_stripes(self, command, whole, tiny_data, tmp_path):
        outcome = command(
            *("finetune", f"model={whole / 'weights' / 'best.pt'}", f"data={tiny_data}", "epochs=1", "optimizer=SGD"),
            *(f"project={tmp_path}", "name=tuned", *WORDS),
        )
        assert outcome.code == 0
        before, after = (read_checkpoint(f / "weights" / "best.pt").model for f in (whole, tmp_path / "tuned"))
        names = getattr(after, MARKER)["zeros"]
        assert names == getattr(before, MARKER)["zeros"] != []
        for name in names:
            old, new = before.get_parameter(name), after.get_parameter(name)
            assert not new[old == 0].any()
        assert any(not torch.equal(before.get_parameter(name), after.get_parameter(name)) for name in names)

    @pytest.mark.parametrize(("event", "times"), [("on_train_epoch_start", 2)])
    def test_killed_and_resumed_it_ends_like_one_that_was_not(
        self, command, dense_checkpoint, tiny_data, tmp_path, whole, event, times
    ):
        words = words_for(dense_checkpoint, tiny_data, tmp_path)
        done = subprocess.run(
            [sys.executable, KILLED, event, str(times), *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        last = tmp_path / "a" / "weights" / "last.pt"
        dead = dead_stripes(network_in(last))
        assert sum(dead.values()) > 1000
        assert not [module for module in globals_named_in(last) if module.startswith("yolo_prune")]
        with pytest.raises(CheckpointError, match="method=stripes"):
            read_checkpoint(last)
        assert command("train", f"model={last}", "resume=true").code == 0
        assert epochs_in(tmp_path / "a") == epochs_in(whole)
        assert_finished(tmp_path / "a", 0.6)
        found, expected = (read_checkpoint(folder / "weights" / "last.pt").model for folder in (tmp_path / "a", whole))
        assert widths(found) == widths(expected)

    def test_killed_after_the_last_epoch_resuming_finishes_it(
        self, command, dense_checkpoint, tiny_data, tmp_path, monkeypatch
    ):
        def killed(_: Path) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(training, "finish_run", killed)
            assert command(*words_for(dense_checkpoint, tiny_data, tmp_path, epochs=1)).code == 130
        last = tmp_path / "a" / "weights" / "last.pt"
        assert interrupted(tmp_path / "a") == "finished"
        assert unfinished(network_in(last)) == "stripes"
        record = (tmp_path / "a" / "stripes.json").rename(tmp_path / "elsewhere.json")
        assert "has no stripes.json" in command("train", f"model={last}", "resume=true").err
        record.rename(tmp_path / "a" / "stripes.json")
        with claimed(tmp_path / "a"):  # as by the process that is on its way there
            before = contents(tmp_path)
            assert "another process works in" in command("train", f"model={last}", "resume=true").err
        assert contents(tmp_path) == before
        outcome = command("train", f"model={last}", "resume=true")
        assert outcome.code == 0
        assert "best.pt" in outcome.out
        assert_finished(tmp_path / "a", 0.6)
        assert command("train", f"model={last}", "resume=true").code == 2


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["method=strips"], "unknown method 'strips'"),
            (["method=stripes", "stripes.strength=0"], "strength"),
            (["method=stripes", "stripes.strength=much"], "stripes.strength=much"),
            (["method=stripes", "stripes.threshold=1"], "stripes.threshold=1"),
            (["method=stripes", "target_macs=1.5"], "target_macs=1.5"),
            (["method=stripes", "min_channels=4"], "min_channels=4 without target_macs="),
            (["method=stripes", "target_macs=0.5", "max_fraction=1"], "max_fraction=1"),
            (["method=stripes", "criterion=l1"], "criterion=l1 without prune_every="),
            (["method=stripes", "sparsity=auto"], "in one training"),
            (["method=stripes", "prune_every=1", "target_macs=0.5"], "in one training"),
            (["stripes.threshold=0.1"], "stripes.threshold=0.1 without method=stripes"),
        ],
    )
    def test_settings(self, refused, dense, data, words, said):
        assert said in refused("train", f"model={dense}", f"data={data}", *words)

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"optimizer": "AdamW"}, "method=stripes with AdamW"),
            ({"target_macs": 0.05}, "target_macs=0.05 cannot be reached by stripes"),
            ({"compile": "true"}, "method=stripes with compile=True"),
            ({"target_macs": None, "stripes.strength": 1e-5}, "moves a skeleton by"),
        ],
    )
    def test_before_the_first_epoch(self, command, dense_checkpoint, tiny_data, tmp_path, more, said):
        words = words_for(dense_checkpoint, tiny_data, tmp_path, **more)
        outcome = command(*[word for word in words if not word.endswith("=None")])
        assert outcome.code == 2
        assert said in outcome.err
        assert not (tmp_path / "a" / "results.csv").exists()
