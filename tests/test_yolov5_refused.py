"""What the classic host refuses: hostile pickles, folders and versions that it does not know, and wrong flags."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_files import Payload
from classic_yolov5 import TINY, lively_classic, save_as_classic
from command_line import contents, write_yaml

from yolo_prune.errors import ConfigError
from yolo_prune.hosts.yolov5.reading import _require_plain_yaml
from yolo_prune.hosts.yolov5.shims import stand_ins
from yolo_prune.hosts.yolov5.source import NEEDED, installed


@pytest.fixture
def refused(desk, command, monkeypatch):
    """Run words that must be refused; return the message, behind what the classic code logs before it."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # its handler holds the error stream of an earlier test

    def run(*words: object) -> str:
        before = contents(desk)
        outcome = command(*words)
        assert outcome.code == 2
        assert contents(desk) == before
        assert "Traceback" not in outcome.err
        message = outcome.err.partition("error: ")[2]
        assert "expected: " in message
        return message

    return run


@pytest.fixture
def classic_dense(desk):
    """A dense classic checkpoint of the user's."""
    return save_as_classic(lively_classic(), desk / "dense.pt")


def evil_code(mark: Path) -> str:
    return f"__import__('os').system('touch {mark}')"


class Built:
    """Calls the constructor of a model with a yaml, whose words the classic code evaluates."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return installed().module("models.yolo").DetectionModel, (with_yaml(self.mark, "layer").yaml,)


def with_yaml(mark: Path, place: str) -> torch.nn.Module:
    model = lively_classic()
    if place == "layer":
        model.yaml["backbone"][0][2] = evil_code(mark)
    elif place == "argument":
        model.yaml["head"][0][3] = [evil_code(mark)]
    else:
        model.yaml["activation"] = evil_code(mark)
    return model


HOSTILE = {
    "a command": Payload,
    "a constructor": Built,
    "a layer's name": lambda mark: with_yaml(mark, "layer"),
    "an argument": lambda mark: with_yaml(mark, "argument"),
    "an activation": lambda mark: with_yaml(mark, "activation"),
}


class TestHostilePickles:
    """Classic checkpoints are pickles of whole models, which stock YOLOv5 runs without looking."""

    @pytest.mark.parametrize("kind", HOSTILE)
    @pytest.mark.parametrize("verb", ["prune", "train", "val"])
    def test_their_code_never_runs(self, desk, data, command, kind, verb):
        mark = desk / "mark"
        weights = save_as_classic(HOSTILE[kind](mark), desk / "evil.pt")
        more = {
            "prune": ["--out", "slim.pt", "--target-macs", 0.5],
            "train": ["--data", data, "--epochs", 1, "--project", desk / "runs", *TINY],
            "val": ["--data", data, "--project", desk / "runs"],
        }
        outcome = command("yolov5", verb, "--pypi", "--weights", weights, *more[verb])
        assert outcome.code == 2
        assert "evil.pt" in outcome.err
        assert not mark.exists()

    @pytest.mark.parametrize("kind", ["a command", "a constructor", "an activation"])
    def test_they_would_run_elsewhere(self, desk, kind, monkeypatch):
        """The mutation: what the tests above hold back does run when it is loaded as stock YOLOv5 loads it."""
        conv = installed().module("models.common").Conv
        monkeypatch.setattr(conv, "default_act", conv.default_act)  # building a model of such a yaml replaces it
        mark = desk / "mark"
        weights = save_as_classic(HOSTILE[kind](mark), desk / "evil.pt")
        with pytest.raises((AttributeError, TypeError), match="'int' object"):  # what the command returned is no layer
            installed().module("models.yolo").DetectionModel(torch.load(weights, weights_only=False)["model"].yaml)
        assert mark.exists()

    def test_no_yaml_of_its_own_is_taken_for_hostile(self):
        files = sorted((installed().root / "models").rglob("*.yaml"))
        assert len(files) > 20
        for file in files:
            _require_plain_yaml(file, yaml.safe_load(file.read_text(errors="ignore")))

    def test_torchscript_and_text_are_no_checkpoints(self, desk, command):
        torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 8, 8)), desk / "script.pt")
        (desk / "text.pt").write_text("hello")
        for name in ("script.pt", "text.pt"):
            outcome = command("yolov5", "prune", "--pypi", "--weights", name, "--out", "slim.pt", "--target-macs", 0.5)
            assert outcome.code == 2
            assert "no complete archive" in outcome.err


class TestModels:
    def test_other_tasks_transformers_and_fused_ones_are_refused(self, desk, refused):
        segment = (
            installed()
            .module("models.yolo")
            .SegmentationModel(installed().root / "models" / "segment" / "yolov5n-seg.yaml")
        )
        unbound = lively_classic()
        del unbound.model[0].bn
        with torch.no_grad():
            fused = lively_classic().fuse()
        cases = {
            "as fused and segmentation models do": segment,
            "transformer blocks": lively_classic("hub/yolov5s-transformer"),
            "(builtins.getattr)": fused,
            "is fused": unbound,
            "no model": None,
            "a dict": {},
        }
        for message, model in cases.items():
            save_as_classic(model, desk / "model.pt")
            words = ["--weights", "model.pt", "--out", "slim.pt", "--target-macs", 0.5]
            assert message in refused("yolov5", "prune", "--pypi", *words)


WRONG_TRAINING = {
    "unknown sparsity mode": (["--sparsity", 1, "--sparsity-mode", "l0"], "unknown --sparsity-mode 'l0'"),
    "unknown schedule": (["--sparsity", 1, "--sparsity-schedule", "step"], "unknown --sparsity-schedule 'step'"),
    "negative strength": (["--sparsity", -0.1], "sparsity strength -0.1"),
    "zero strength": (["--sparsity", 0], "sparsity strength 0"),
    "strength that is no number": (["--sparsity", "much"], "sparsity strength 'much'"),
    "infinite strength": (["--sparsity", "inf"], "sparsity strength inf"),
    "adaptive optimizer": (
        ["--sparsity", 1, "--sparsity-mode", "subgradient", "--optimizer", "AdamW"],
        "--sparsity-mode subgradient with --optimizer AdamW",
    ),
}


class TestTrainingFlags:
    @pytest.mark.parametrize("case", WRONG_TRAINING)
    def test_are_refused_before_anything_is_written(self, desk, data, classic_dense, refused, case):
        flags, message = WRONG_TRAINING[case]
        words = ["--weights", classic_dense, "--data", data, "--project", desk / "runs", *TINY, *flags]
        assert message in refused("yolov5", "train", "--pypi", *words)

    def test_data_that_is_missing(self, desk, classic_dense, command):
        data = write_yaml(desk / "none.yaml", {"path": str(desk), "train": "a", "val": "b", "names": ["disc"]})
        words = ["--weights", classic_dense, "--data", data, "--project", desk / "runs", *TINY]
        outcome = command("yolov5", "train", "--pypi", *words)
        assert outcome.code == 2
        assert "refuses this training: Dataset not found" in outcome.err

    def test_from_another_folder_than_the_one_where_it_was_imported(self, desk, classic_dense, command, monkeypatch):
        """YOLOv5 finds its default files relative to the working directory of its import."""
        data = write_yaml(desk / "none.yaml", {"path": str(desk), "train": "a", "val": "b", "names": ["disc"]})
        words = ["--weights", classic_dense, "--data", data, "--project", desk / "runs", *TINY]
        for folder in (desk / "a", desk / "a" / "b" / "c"):
            folder.mkdir(parents=True)
            monkeypatch.chdir(folder)
            assert "refuses this training: Dataset not found" in command("yolov5", "train", "--pypi", *words).err

    def test_a_yaml_with_a_slim_checkpoint(self, desk, data, classic_dense, command, refused):
        words = ["--weights", classic_dense, "--out", "slim.pt", "--target-macs", 0.5, "--imgsz", 64]
        assert command("yolov5", "prune", "--pypi", *words).code == 0
        cfg = installed().root / "models" / "yolov5n.yaml"
        words = ["--weights", "slim.pt", "--cfg", cfg, "--data", data, "--project", desk / "runs", *TINY]
        assert "with a slim checkpoint" in refused("yolov5", "train", "--pypi", *words)

    def test_its_own_parser_speaks_for_its_flags(self, capsys, command):
        with pytest.raises(SystemExit) as stopped:
            command("yolov5", "train", "--pypi", "--epoks", 3)
        assert stopped.value.code == 2
        assert "--epoks" in capsys.readouterr().err


class TestCode:
    def test_a_folder_without_train_py(self, desk, refused):
        (desk / "empty").mkdir()
        assert "train.py" in refused("yolov5", "train", "--repo", "empty")
        assert "no folder 'nowhere'" in refused("yolov5", "val", "--repo", "nowhere")

    def test_an_unknown_version_is_named_by_what_it_lacks_and_never_run(self, desk, refused):
        old = desk / "old"
        (old / "utils").mkdir(parents=True)
        (old / "train.py").write_text(f"open({str(desk / 'mark')!r}, 'w')\ndef train(hyp, opt): pass\n")
        error = refused("yolov5", "train", "--repo", old)
        missing = [name for names in NEEDED.values() for name in names]
        assert all(name in error for name in missing)
        assert "v7.0 or newer" in error

    @pytest.mark.parametrize("flags", [[], ["--repo", "x", "--pypi"]])
    def test_one_code_has_to_be_named(self, refused, flags):
        assert "--pypi" in refused("yolov5", "val", *flags)

    def test_a_package_that_is_not_installed(self, refused, monkeypatch):
        monkeypatch.setattr("yolo_prune.hosts.yolov5.source.importlib.util.find_spec", lambda _: None)
        assert "pip install --no-deps yolov5" in refused("yolov5", "val", "--pypi")

    def test_subcommands(self, refused, command):
        assert "no subcommand" in refused("yolov5")
        assert "'train'?" in refused("yolov5", "trian")
        assert "its val.py" in command("yolov5", "--help").out
        assert "unknown flag '--epochs'" in refused(
            "yolov5", "prune", "--pypi", "--weights", "a.pt", "--out", "b.pt", "--target-macs", 0.5, "--epochs", 3
        )


class TestStandIns:
    def test_an_absent_sdk_can_be_imported_but_not_used_and_vanishes(self):
        with stand_ins():
            from roboflow import Roboflow
        assert "roboflow" not in sys.modules
        with pytest.raises(ConfigError, match="'roboflow' is not installed"):
            Roboflow(api_key="key")


def test_the_code_does_not_install_packages():
    assert os.environ["YOLOv5_AUTOINSTALL"] == "false"  # noqa: SIM112  # its spelling
