"""Sparsity training through the host's trainer: `yolo-prune train ... sparsity=`."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import yaml
from models import lively
from test_training import KILLED, WORDS, epochs_in
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_prune.channels import ChannelGraph
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.slim import is_slim, widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.collection import TrainingImages, recalibrate_on
from yolo_prune.hosts.ultralytics.sparsity import (
    SETTLING,
    SparsityOptions,
    SparsityTraining,
    groups_in,
)
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.methods.slimming.health import EpochHealth, GroupHealth, warnings_of
from yolo_prune.methods.slimming.penalty import channel_scales, penalised_channels
from yolo_prune.methods.steps import learning_rates
from yolo_prune.pipeline.train import train_in
from yolo_prune.report.scales import draw_scales

SGD = ["optimizer=SGD", "lr0=0.01"]


def scales_in(path: Path) -> tuple[ChannelGraph, np.ndarray]:
    """Return the channel graph of a checkpoint and the scale of each penalised channel."""
    model = read_checkpoint(path).model
    graph = trace_model(model)
    chosen = penalised_channels(graph)
    return graph, channel_scales(graph, dict(model.named_parameters()))[chosen]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sparsity.json").read_text())


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "sparsity.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
class TestTraining:
    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory, dense_checkpoint, tiny_data):
        """Three epochs, the same with and without a penalty, pictures included."""
        folder = tmp_path_factory.mktemp("sparsity")
        base = ["train", f"model={dense_checkpoint}", f"data={tiny_data}", "epochs=3", f"project={folder}", *SGD]
        from yolo_prune.cli import main

        quick = [word for word in WORDS if not word.startswith("plots")]
        assert main([*base, "name=without", *WORDS]) == 0
        assert main([*base, "name=with", "sparsity=auto", "sparsity_share=0.5", "plots=true", *quick]) == 0
        return folder

    def test_scales_go_to_zero_and_the_checkpoint_shows_it(self, trained):
        """L1 does not move gamma (ZJU-lishuang/yolov5_prune#10, midasklr#39); the saved EMA has the zeros."""
        _, without = scales_in(trained / "without" / "weights" / "last.pt")
        _, found = scales_in(trained / "with" / "weights" / "last.pt")
        assert (without == 0).mean() == 0
        assert (found == 0).mean() > 0.4
        assert np.median(found) < 0.2 * np.median(without)

    def test_statistics_of_norms_are_those_of_the_network_that_is_saved(self, trained, tiny_data):
        """Those of training lag behind scales that move, and a network that is well finds nothing."""
        images = TrainingImages(data=tiny_data, imgsz_px=64, batches=SETTLING, batch=8, workers=0)
        lags = {}
        for name in ("with", "without"):
            model = read_checkpoint(trained / name / "weights" / "last.pt").model
            before = {key: value.clone() for key, value in model.named_buffers() if key.endswith("running_var")}
            recalibrate_on(model, images)
            after = dict(model.named_buffers())
            lags[name] = max(float((after[key] / old - 1).abs().max()) for key, old in before.items())
        assert lags["with"] < 0.01  # it was saved in half precision
        assert lags["without"] > 0.1

    def test_the_record_has_every_group_and_epoch(self, trained, dense_checkpoint):
        graph, scales = scales_in(dense_checkpoint)
        names = {graph.groups[index].name for index in graph.free_groups()}
        rows = rows_of(trained / "with")
        assert {row["group"] for row in rows} <= names
        assert [sum(row["epoch"] == str(epoch) for row in rows) for epoch in range(4)] == [len(rows) // 4] * 4
        assert sum(int(row["width"]) for row in rows if row["epoch"] == "0") == len(scales)
        epochs = record_of(trained / "with")["epochs"]
        assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2, 3]
        assert epochs[0]["silent"] == 0.0
        assert epochs[-1]["silent"] > 0.4
        assert epochs[-1]["macs"] < 0.6
        assert all(sum(epoch["histogram"]) <= len(scales) for epoch in epochs)
        assert all(float(row["pull"]) > 0 for row in rows if row["epoch"] == "3")

    def test_pictures_and_columns_are_the_hosts(self, trained):
        assert (trained / "with" / "sparsity.png").stat().st_size > 10_000
        heads = [(trained / name / "results.csv").read_text().splitlines()[0] for name in ("with", "without")]
        assert heads[0] == heads[1]
        assert epochs_in(trained / "with") == [1, 2, 3]

    def test_without_a_penalty_it_is_the_stock_training(self, trained, dense_checkpoint, tiny_data):
        stock = {key: yaml.safe_load(value) for key, value in (word.split("=") for word in [*SGD, *WORDS])}
        YOLO(dense_checkpoint).train(data=str(tiny_data), epochs=3, project=str(trained), name="stock", **stock)
        states = [
            read_checkpoint(trained / name / "weights" / "last.pt").model.state_dict() for name in ("stock", "without")
        ]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    @pytest.mark.parametrize(("prunes", "best_epoch"), [(False, 2), (True, 1)])
    def test_the_best_network_is_the_sparse_one(
        self, dense_checkpoint, tiny_data, tmp_path, monkeypatch, prunes, best_epoch
    ):
        """The host's best has the highest mAP, so the largest scales: a cut by them would be a cut by chance."""

        def worse_with_every_epoch(trainer):
            fitness = 1.0 - 0.1 * trainer.epoch
            if trainer.best_fitness is None or trainer.best_fitness < fitness:
                trainer.best_fitness = fitness
            return {}, fitness

        monkeypatch.setattr(DetectionTrainer, "validate", worse_with_every_epoch)
        monkeypatch.setattr(DetectionTrainer, "final_eval", lambda _: None)  # it would strip the checkpoints
        words: dict[str, Any] = {"sparsity": "auto"}
        if prunes:
            words |= {"prune_every": 1, "prune_steps": 1, "target_macs": 0.9, "criterion": "l2"}
        stock = {key: yaml.safe_load(value) for key, value in (word.split("=") for word in [*SGD, *WORDS])}
        folder = tmp_path / "a"
        train_in(folder, dense_checkpoint, tiny_data, {**words, **stock, "epochs": 3})
        assert torch.load(folder / "weights" / "best.pt", weights_only=False)["epoch"] == best_epoch

    def test_a_slim_checkpoint_stays_slim_and_frozen_layers_as_they_are(
        self, command, slim_checkpoint, tiny_data, tmp_path
    ):
        outcome = command(
            *("train", f"model={slim_checkpoint}", f"data={tiny_data}", "epochs=1", "sparsity=1.0", "freeze=1"),
            *(f"project={tmp_path}", "name=a", *SGD, *WORDS),
        )
        assert outcome.code == 0
        model = read_checkpoint(tmp_path / "a" / "weights" / "last.pt").model
        assert is_slim(model)
        start = read_checkpoint(slim_checkpoint).model
        assert widths(model) == widths(start)
        for layer, frozen in (("0", True), ("1", False)):
            found, before = model.model[int(layer)].bn.weight, start.model[int(layer)].bn.weight
            assert torch.equal(found, before) == frozen
        assert record_of(tmp_path / "a")["options"]["strength"] == 1.0

    def test_a_cfg_file_of_the_host_passes_through(self, command, dense_checkpoint, tiny_data, tmp_path):
        cfg = {"data": str(tiny_data), "epochs": 1, "project": str(tmp_path), "name": "a", "optimizer": "auto"}
        (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(cfg))
        outcome = command(
            *("train", f"model={dense_checkpoint}", f"cfg={tmp_path / 'cfg.yaml'}", "sparsity=0.1"),
            *("sparsity_mode=subgradient", *WORDS),
        )
        assert outcome.code == 0
        assert "optimizer=SGD instead of auto" in outcome.err
        assert yaml.safe_load((tmp_path / "a" / "args.yaml").read_text())["optimizer"] == "SGD"

    def test_from_python_with_the_hosts_own_callbacks(self, dense_checkpoint, tiny_data, tmp_path):
        yolo = YOLO(dense_checkpoint)
        for event, callback in SparsityTraining(SparsityOptions(strength=5.0)).callbacks().items():
            yolo.add_callback(event, callback)
        stock = {key: yaml.safe_load(value) for key, value in (word.split("=") for word in [*SGD, *WORDS])}
        seen = []  # what TensorBoard, MLflow and W&B, which come after, find in the host's metrics
        yolo.add_callback("on_fit_epoch_end", lambda trainer: seen.append(dict(trainer.metrics)))
        yolo.train(data=str(tiny_data), epochs=1, project=str(tmp_path), name="a", **stock)
        last = record_of(tmp_path / "a")["epochs"][-1]
        assert last["strength"] == 5.0
        assert {key: seen[0][f"sparsity/{key}"] for key in ("strength", "silent", "macs", "pull")} == {
            key: last[key] for key in ("strength", "silent", "macs", "pull")
        }

    def test_killed_it_resumes_with_its_own_settings(self, command, dense_checkpoint, tiny_data, tmp_path):
        words = ["train", f"model={dense_checkpoint}", f"data={tiny_data}", "epochs=4", f"project={tmp_path}"]
        words += ["name=a", "sparsity=auto", "sparsity_schedule=linear", *SGD, *WORDS]
        done = subprocess.run(
            [sys.executable, KILLED, "on_train_batch_end", "5", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        folder, last = tmp_path / "a", tmp_path / "a" / "weights" / "last.pt"
        before = record_of(folder)
        assert [epoch["epoch"] for epoch in before["epochs"]] == [0, 1, 2]
        refused = command("train", f"model={last}", "resume=true", "sparsity=0.5")
        assert refused.code == 2
        assert "other sparsity settings" in refused.err
        assert command("train", f"model={last}", "resume=true").code == 0
        after = record_of(folder)
        assert epochs_in(folder) == [1, 2, 3, 4]
        assert after["epochs"][:3] == before["epochs"]
        assert [epoch["epoch"] for epoch in after["epochs"]] == [0, 1, 2, 3, 4]
        assert after["options"] == before["options"]
        assert after["silent_below"] == before["silent_below"]
        assert {row["epoch"] for row in rows_of(folder)} == {"0", "1", "2", "3", "4"}


class TestBadInput:
    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("sparsity=-1", "sparsity strength -1"),
            ("sparsity=0", "sparsity strength 0"),
            ("sparsity=nan", "sparsity strength nan"),
            ("sparsity=much", "sparsity strength 'much'"),
            ("sparsity_mode=lasso", "unknown sparsity_mode 'lasso'"),
            ("sparsity_schedule=step", "unknown sparsity_schedule 'step'"),
            ("sparsity_scope=[tail]", "unknown sparsity_scope 'tail'"),
            ("sparsity_share=1.5", "sparsity share 1.5"),
        ],
    )
    def test_values_out_of_range(self, command, dense_checkpoint, tiny_data, word, said):
        words = [word] if word.startswith("sparsity=") else ["sparsity=auto", word]
        outcome = command("train", f"model={dense_checkpoint}", f"data={tiny_data}", *words)
        assert outcome.code == 2
        assert said in outcome.err

    def test_a_subgradient_with_adam(self, command, dense_checkpoint, tiny_data, tmp_path):
        outcome = command(
            *("train", f"model={dense_checkpoint}", f"data={tiny_data}", "epochs=1", f"project={tmp_path}", "name=a"),
            *("sparsity=0.1", "sparsity_mode=subgradient", "optimizer=Adam", *WORDS),
        )
        assert outcome.code == 2
        assert "sparsity_mode=subgradient with Adam" in outcome.err
        assert not list((tmp_path / "a" / "weights").glob("*.pt"))

    def test_no_data(self, command, dense_checkpoint):
        outcome = command("train", f"model={dense_checkpoint}")
        assert outcome.code == 2
        assert "'data=' is required" in outcome.err

    def test_an_exported_model(self, command, tmp_path, tiny_data):
        (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
        outcome = command("train", f"model={tmp_path / 'model.onnx'}", f"data={tiny_data}", "sparsity=auto")
        assert outcome.code == 2


class TestScope:
    def test_parts_of_the_network_partition_the_groups(self):
        model = lively("yolov8n")
        graph = trace_model(model)
        parts = [set(groups_in(graph, model, (part,))) for part in ("backbone", "neck", "head")]
        assert set.union(*parts) == set(graph.free_groups())
        assert sum(map(len, parts)) == len(graph.free_groups())
        assert all(parts)
        names = [{graph.groups[index].name for index in part} for part in parts]
        assert "model.9.cv1.conv" in names[0]
        assert "model.12.m.0.cv1.conv" in names[1]
        assert "model.22.cv2.0.0.conv" in names[2]


class TestLearningRates:
    def test_of_a_schedule_with_warm_up_by_hand(self):
        """Ten batches an epoch, one epoch of warm-up from 0, in which the accumulation grows from 1 to 2."""
        found = learning_rates(0.1, lambda epoch: 1.0 - epoch / 4, epochs=3, batches=10, warmup=10, accumulate=2)
        iterations = np.arange(10)
        warm = 0.1 * iterations / 10 / np.round(1 + iterations / 10)
        assert found == pytest.approx([warm.sum(), 10 * 0.075 / 2, 10 * 0.05 / 2], abs=1e-3)


class TestSeveralProcesses:
    def test_the_callbacks_survive_the_hosts_pickle(self):
        training = SparsityTraining(SparsityOptions(strength=0.5, mode="subgradient"), draw=draw_scales)
        callbacks = cloudpickle.loads(cloudpickle.dumps(training.callbacks()))
        owners = {id(callback.__self__) for callback in callbacks.values()}
        assert len(owners) == 1
        assert callbacks["on_train_end"].__self__.options == training.options


def epoch_health(**values: Any) -> EpochHealth:
    plain = {"epoch": 1, "strength": 1.0, "silent": 0.0, "macs": 1.0, "distance": 1.0, "nominal": 0.0}
    return EpochHealth(**{**plain, "arrived": 1.0, "pull": 1.0, "histogram": [], **values})


def test_processes_without_metrics_are_left_in_peace() -> None:
    """On several GPUs the host's trainer has metrics in its first process only."""
    training = SparsityTraining(SparsityOptions(strength=1.0))
    training._course = SimpleNamespace(figures=lambda: {"sparsity/silent": 0.5})
    first, other = SimpleNamespace(metrics={"fitness": 1.0}), SimpleNamespace(metrics=None)
    for trainer in (first, other):
        training.tell_loggers(trainer)
    assert first.metrics == {"fitness": 1.0, "sparsity/silent": 0.5}
    assert other.metrics is None


class TestWarnings:
    def test_all_is_well(self):
        group = GroupHealth(group="a", width=8, quantiles=(0.1,) * 5, silent=0.5, pull=1.0)
        assert warnings_of([epoch_health(), epoch_health(distance=0.6, nominal=0.5, arrived=0.8)], [group]) == []

    def test_a_cut_takes_the_small_scales_away_and_is_no_standstill(self):
        assert warnings_of([epoch_health(), epoch_health(distance=1.2, nominal=0.5, arrived=0.8)], []) == []

    def test_nothing_moves(self):
        said = warnings_of([epoch_health(), epoch_health(distance=0.999, nominal=0.5, arrived=0.002)], [])
        assert len(said) == 1
        assert "nothing moves" in said[0]
        assert "sparsity_mode=proximal" in said[0]

    def test_everything_collapses(self):
        assert "everything collapses" in warnings_of([epoch_health(), epoch_health(macs=0.01)], [])[0]

    def test_a_cliff(self):
        group = GroupHealth(group="model.4.cv1", width=8, quantiles=(0.0,) * 5, silent=0.95, pull=1.0)
        said = warnings_of([epoch_health()], [group])
        assert "cliff ahead: 1 groups are almost silent, first model.4.cv1 (95%)" in said[0]


def test_options_are_refused_where_they_are_made() -> None:
    with pytest.raises(ConfigError, match="sparsity scope"):
        SparsityOptions(scope=())
