"""ResRep in whole trainings: killed and resumed, converted, refused."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import globals_named_in, save_as_host
from models import lively
from resrep_cases import FLOORS, forgetting_of, record_of, small_network, with_compactors
from shapes import draw_dataset
from test_training import KILLED, epochs_in

from yolo_prune.allocation import Constraints
from yolo_prune.cli import main
from yolo_prune.errors import VerificationError
from yolo_prune.hosts.slim import MARKER, unfinished, widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint, unpickle
from yolo_prune.hosts.ultralytics.compactors import frozen_names, suitable
from yolo_prune.hosts.ultralytics.resrep import ResRepTraining
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.hosts.ultralytics.trainer import train
from yolo_prune.methods.resrep.options import ResRepOptions
from yolo_prune.methods.resrep.schedule import (
    Course,
    Pull,
)


@pytest.fixture(scope="module")
def dense_small(tmp_path_factory) -> Path:
    return save_as_host(small_network(), tmp_path_factory.mktemp("small") / "dense.pt")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """The data yaml of 32 images: as many steps an epoch, so that four epochs are enough to forget in."""
    return draw_dataset(tmp_path_factory.mktemp("drawn") / "shapes", seed=0, train=32, val=4, test=1, imgsz_px=64)


QUICK = {"imgsz": 64, "batch": 1, "nbs": 1, "workers": 0, "plots": False, "device": "cpu", "verbose": False, "seed": 0}
QUICK |= {"warmup_epochs": 0.5, "optimizer": "SGD", "lr0": 0.01, "epochs": 4}


def words_for(model: Path, data: Path, folder: Path, **more: Any) -> list[str]:
    settings = {**QUICK, **FLOORS, "method": "resrep", "target_macs": 0.6, "project": folder, "name": "a", **more}
    return ["train", f"model={model}", f"data={data}", *(f"{key}={value}" for key, value in settings.items())]


class Steps:
    """Notes at each optimizer step the iteration and the settings of two parameter groups, as the step sees them."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Any], dict[str, Any]]] = []
        self.callbacks = {"on_train_batch_start": self.count, "on_pretrain_routine_end": self.hook}
        self.iteration = -1

    def count(self, _: Any) -> None:
        self.iteration += 1

    def hook(self, trainer: Any) -> None:
        trainer.optimizer.register_step_post_hook(self.note)

    def note(self, optimizer: Any, *_: Any) -> None:
        groups = {group["param_group"]: {**group, "params": None} for group in optimizer.param_groups}
        self.seen.append((self.iteration, groups["weight"], groups.get("compactor", {})))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dense_small, drawn):
    """A training that nobody killed, with the command line's words; its folder."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(words_for(dense_small, drawn, folder)) == 0
    return folder / "a"


def macs_in(path: Path) -> float:
    graph = trace_model(read_checkpoint(path).model)
    return float(graph.cost.macs(graph.widths(), imgsz_px=64))


@pytest.mark.slow
class TestTraining:
    def test_ends_with_slim_stock_checkpoints_of_the_target(self, whole, dense_small):
        assert epochs_in(whole) == [1, 2, 3, 4]
        record, dense = record_of(whole), macs_in(dense_small)
        for name in ("best.pt", "last.pt"):
            path = whole / "weights" / name
            assert 0.5 < macs_in(path) / dense <= 0.6
            model = read_checkpoint(path).model
            marker = getattr(model, MARKER)
            assert marker["after"]["macs"] == macs_in(path)
            assert marker["widths"] == widths(model)
            assert marker["plan"]["choice"]["method"] == "resrep"
            assert unfinished(model) is None
            assert not any("yolo_prune" in name for name in globals_named_in(path))
        assert record["converted"]["macs"] == macs_in(path) / dense == record["epochs"][-1]["macs"]
        assert record["converted"]["difference"] < 1e-9
        assert record["converted"]["max_abs_error"] < 1e-9

    def test_the_record_tells_how_rows_went(self, whole):
        rows = record_of(whole)["epochs"]
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
        assert [row["settled"] for row in rows] == [False, True, True, True]
        assert not rows[2]["gone"]
        assert rows[-1]["gone"]
        assert rows[-1]["largest_masked"] == 0.0
        assert rows[-1]["smallest_kept"] > 0.5
        masked = [row["masked"] for row in rows]
        assert masked == sorted(masked)

    def test_what_was_converted_is_kept_and_read_by_nobody_else(self, whole, command):
        left = whole / "weights" / "compactors.pt"
        content = unpickle(left)
        assert unfinished(content["ema"]) == "resrep"
        assert not any("yolo_prune" in name for name in globals_named_in(left))
        outcome = command("inspect", f"model={left}")
        assert outcome.code == 2
        assert "method=resrep" in outcome.err

    def test_the_group_of_the_compactors_and_the_foretold_rates(self, dense_small, drawn, tmp_path):
        """Through warm-up too, in which the host sets momentum and learning rate of every group; two batches a step."""
        steps = Steps()
        options = ResRepOptions(target=0.6, constraints=Constraints(**FLOORS))
        training = ResRepTraining(options)
        settings = {**QUICK, "nbs": 2, "epochs": 2, "lr0": 0.1, "warmup_epochs": 1.0, "momentum": 0.9}
        caught: list[Course] = []

        def catch(_: Any) -> None:
            caught.append(training._forgetting.course)

        # Too few steps to forget in, so what chooses is told that they were more.
        training._chosen = lambda _: Pull(strength=0.01, momentum=0.25)  # type: ignore[method-assign]
        callbacks = [training.callbacks(), steps.callbacks, {"on_train_start": catch}]
        with pytest.raises(VerificationError, match="largest masked row"):
            train(dense_small, callbacks=callbacks, data=str(drawn), project=str(tmp_path), name="a", **settings)
        (where,) = caught
        assert [iteration for iteration, _, _ in steps.seen] == where.steps.tolist()
        assert len(where.steps) < where.iterations == 64
        for iteration, host, ours in steps.seen:
            assert host["lr"] == pytest.approx(where.rates[iteration], rel=1e-12)
            tail = where.tail(Pull(strength=0.01, momentum=0.25))[iteration]
            assert ours["lr"] == pytest.approx(where.rates[iteration] * tail, rel=1e-12)
            assert (ours["momentum"], ours["weight_decay"], ours["nesterov"]) == (0.25, 0.0, False)
        assert steps.seen[0][1]["momentum"] == 0.8
        assert unfinished(unpickle(tmp_path / "a" / "weights" / "last.pt")["ema"]) == "resrep"  # nothing was converted

    def test_killed_and_resumed_it_ends_the_same(self, command, whole, dense_small, drawn, tmp_path):
        """Killed in the third epoch: masks have settled, no row is gone."""
        kill = [sys.executable, KILLED, "on_train_batch_end", "75", *words_for(dense_small, drawn, tmp_path)]
        done = subprocess.run(kill, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        folder = tmp_path / "a"
        assert command("prune", f"model={folder / 'weights' / 'last.pt'}", "target_macs=0.5", "out=x.pt").code == 2
        assert command("train", f"model={folder / 'weights' / 'last.pt'}", "resume=true").code == 0
        assert epochs_in(folder) == epochs_in(whole)
        assert [row["epoch"] for row in record_of(folder)["epochs"]] == [1, 2, 3, 4]
        for name in ("best.pt", "last.pt"):
            found, expected = (read_checkpoint(run / "weights" / name).model for run in (folder, whole))
            assert widths(found) == widths(expected)

    @pytest.mark.parametrize("converted", ["none", "best"])
    def test_killed_before_or_between_its_conversions_it_is_finished(self, command, whole, tmp_path, converted):
        folder = Path(shutil.copytree(whole, tmp_path / "a"))
        weights = folder / "weights"
        shutil.copy(weights / "compactors.pt", weights / "last.pt")
        if converted == "none":
            shutil.copy(weights / "compactors.pt", weights / "best.pt")
            (weights / "compactors.pt").unlink()
        outcome = command("train", f"model={weights / 'last.pt'}", "resume=true")
        assert outcome.code == 0
        assert str(weights / "best.pt") in outcome.out
        assert (weights / "compactors.pt").is_file()
        for name in ("best.pt", "last.pt"):
            found, expected = (read_checkpoint(run / "weights" / name).model for run in (folder, whole))
            assert widths(found) == widths(expected)
            assert unpickle(weights / name)["optimizer"] is None
        assert "no training to resume" in command("train", f"model={weights / 'last.pt'}", "resume=true").err

    def test_a_best_one_of_an_earlier_stage_becomes_the_last_one(self, command, whole, tmp_path):
        folder = Path(shutil.copytree(whole, tmp_path / "a"))
        weights = folder / "weights"
        shutil.copy(weights / "compactors.pt", weights / "last.pt")
        content = unpickle(weights / "compactors.pt")
        getattr(content["ema"], MARKER)["resrep"]["gone"] = False
        torch.save(content, weights / "best.pt")
        assert command("train", f"model={weights / 'last.pt'}", "resume=true").code == 0
        best, last = (read_checkpoint(weights / name).model.state_dict() for name in ("best.pt", "last.pt"))
        assert all(torch.equal(best[name], last[name]) for name in last)

    def test_without_the_record_of_its_folder_nothing_is_resumed(self, command, whole, tmp_path):
        folder = Path(shutil.copytree(whole, tmp_path / "a"))
        shutil.copy(folder / "weights" / "compactors.pt", folder / "weights" / "last.pt")
        (folder / "resrep.json").unlink()
        outcome = command("train", f"model={folder / 'weights' / 'last.pt'}", "resume=true")
        assert outcome.code == 2
        assert "resrep.json" in outcome.err


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["method=resrep"], "'target_macs=' is required"),
            (["method=resrp", "target_macs=0.5"], "unknown method 'resrp'"),
            (["method=resrep", "target_macs=1.5"], "target_macs=1.5"),
            (["method=resrep", "target_macs=0.5", "resrep.strength=weak"], "resrep.strength=weak"),
            (["method=resrep", "target_macs=0.5", "resrep.strength=0"], "resrep.strength=0"),
            (["method=resrep", "target_macs=0.5", "resrep.momentum=1"], "resrep.momentum=1"),
            (["method=resrep", "target_macs=0.5", "resrep.interval=0"], "resrep.interval=0"),
            (["method=resrep", "target_macs=0.5", "criterion=l1"], "criterion=l1 without"),
            (["method=resrep", "target_macs=0.5", "sparsity=auto"], "resrep alone"),
            (["method=resrep", "target_macs=0.5", "prune_every=1"], "resrep alone"),
            (["resrep.interval=3"], "resrep.interval=3 without method=resrep"),
            (["target_macs=0.5"], "'prune_every=' is required"),
        ],
    )
    def test_settings(self, command, dense_small, drawn, words, said):
        outcome = command("train", f"model={dense_small}", f"data={drawn}", *words)
        assert outcome.code == 2
        assert said in outcome.err

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"target_macs": 0.05}, "target_macs=0.05 cannot be reached with method=resrep"),
            ({"epochs": 1}, "are too few for resrep.strength=auto"),
            ({"resrep.strength": 0.1}, "are too few for resrep.strength=0.1"),
            ({"optimizer": "AdamW"}, "method=resrep with AdamW"),
            ({"compile": "true"}, "method=resrep with compile="),
            ({"time": 0.1}, "method=resrep with time="),
            ({"freeze": 6}, "cannot be reached"),
        ],
    )
    def test_trainings_before_their_first_epoch(self, command, dense_small, drawn, tmp_path, more, said):
        outcome = command(*words_for(dense_small, drawn, tmp_path, **more))
        assert outcome.code == 2
        assert said in outcome.err
        assert not list((tmp_path / "a").glob("results.csv"))
        assert not list((tmp_path / "a").glob("resrep*"))

    def test_the_reachable_target_is_named_and_reached(self, command, dense_small, drawn, tmp_path):
        said = command(*words_for(dense_small, drawn, tmp_path, target_macs=0.05)).err
        least = float(re.search(r"at least (0\.\d+)", said)[1])
        model = small_network()
        graph, targets = with_compactors(model)
        forgetting = forgetting_of(model, graph, targets)
        masked = forgetting._chosen(least)
        assert graph.cost.macs(graph.kept_widths(~masked)) <= least * graph.cost.macs(graph.widths())

    def test_frozen_layers_have_no_compactors(self):
        model = lively("yolov8n")
        paths = suitable(model, frozen_names([0, 2]))
        assert "model.0.conv" not in paths
        assert not [path for path in paths if path.startswith("model.2.")]
        assert "model.22.cv2.0.0.conv" in paths
        assert frozen_names(2) == ["model.0.", "model.1."]
        assert frozen_names(None) == []
