"""Fine-tuning through the host's trainer: the slim network stays slim, whatever happens on the way."""

from __future__ import annotations

import copy
import csv
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from checkpoint_files import save_as_host
from models import lively
from ultralytics import YOLO

from yolo_prune.errors import CheckpointError
from yolo_prune.hosts.slim import MARKER, is_slim, widths
from yolo_prune.hosts.ultralytics import trainer as host_trainer
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.run_files import interrupted
from yolo_prune.hosts.ultralytics.trainer import (
    SlimDetectionTrainer,
    reset_weights,
    retarget_classes,
    trainable_copy,
    warn_of_few_steps,
)
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig

KILLED = Path(__file__).with_name("killed_process.py")
QUICK = {"imgsz": 64, "batch": 8, "nbs": 8, "warmup_epochs": 0}  # two steps an epoch, each of which counts
QUICK |= {"workers": 0, "plots": False, "device": "cpu", "verbose": False, "seed": 0}
WORDS = [f"{key}={value}" for key, value in QUICK.items()]


@pytest.fixture(scope="module")
def slim(slim_checkpoint):
    return read_checkpoint(slim_checkpoint).model


class TestFewSteps:
    """The host gathers 64 images for a step, which leaves small data sets almost none."""

    def said(self, caplog: Any, **values: Any) -> str:
        trainer = {"train_loader": range(13), "epochs": 30, "start_epoch": 0, "accumulate": 4, "batch_size": 16}
        caplog.clear()
        with caplog.at_level("WARNING", logger="ultralytics"):
            warn_of_few_steps(SimpleNamespace(**{**trainer, **values}))
        return caplog.text

    def test_few_are_told_with_the_remedy(self, caplog):
        said = self.said(caplog)
        assert "97 optimizer steps in 30 epochs" in said
        assert "nbs=16 takes 390" in said

    @pytest.mark.parametrize("enough", [{"epochs": 400}, {"accumulate": 1}, {"train_loader": range(1000)}])
    def test_where_there_are_enough_or_no_more_nothing_is_said(self, caplog, enough):
        assert self.said(caplog, **enough) == ""


def epochs_in(folder: Path) -> list[int]:
    """Return the epochs that the host wrote down."""
    with (folder / "results.csv").open() as stream:
        return [int(row["epoch"]) for row in csv.DictReader(stream)]


def assert_slim(path: Path, slim: torch.nn.Module) -> torch.nn.Module:
    """Assert that a checkpoint has the widths and the marker of a slim model; return its model."""
    model = read_checkpoint(path).model
    assert widths(model) == widths(slim)
    assert getattr(model, MARKER) == getattr(slim, MARKER)
    assert sum(p.numel() for p in model.parameters()) == getattr(slim, MARKER)["after"]["params"]
    return model


def with_classes(data: Path, names: list[str], path: Path) -> Path:
    """Describe the same images with other class names."""
    description = {**yaml.safe_load(data.read_text()), "path": str(data.parent), "names": names, "nc": len(names)}
    path.write_text(yaml.safe_dump(description))
    return path


def disturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Move every parameter away from the host's start values, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    return model


@pytest.mark.slow
class TestFinetuning:
    def test_finetuning_does_not_restore_the_full_size(self, command, slim_checkpoint, slim, tiny_data, tmp_path):
        """ultralytics#9813, #3507, YOLO-Pruning-RKNN#17, #24."""
        outcome = command(
            *("finetune", f"model={slim_checkpoint}", f"data={tiny_data}", "epochs=2"),
            *(f"project={tmp_path}", "name=tuned", *WORDS),
        )
        assert outcome.code == 0
        weights = tmp_path / "tuned" / "weights"
        assert f"best checkpoint: {weights / 'best.pt'}" in outcome.out
        for name in ("best.pt", "last.pt"):
            tuned = assert_slim(weights / name, slim)
            for path in ("model.0.conv.weight", "model.22.cv2.0.0.conv.weight"):
                before, after = slim.state_dict()[path].flatten(), tuned.state_dict()[path].flatten()
                assert not torch.equal(before, after)  # it was trained,
                assert torch.cosine_similarity(before, after, dim=0) > 0.9  # and from the pruned weights
        assert epochs_in(tmp_path / "tuned") == [1, 2]

    def test_stock_training_restores_it(self, slim_checkpoint, slim, tiny_data, tmp_path):
        """What we guard against; if the host learns to keep widths, our trainer may go."""
        YOLO(slim_checkpoint).train(data=str(tiny_data), epochs=1, project=str(tmp_path), name="stock", **QUICK)
        model = read_checkpoint(tmp_path / "stock" / "weights" / "last.pt").model
        assert widths(model) != widths(slim)
        assert sum(p.numel() for p in model.parameters()) == getattr(slim, MARKER)["before"]["params"]

    def test_dense_models_train_as_in_stock(self, dense_checkpoint, tiny_data, tmp_path):
        states = []
        for name, trainer in (("stock", None), ("ours", SlimDetectionTrainer)):
            yolo = YOLO(dense_checkpoint)
            yolo.train(trainer=trainer, data=str(tiny_data), epochs=1, project=str(tmp_path), name=name, **QUICK)
            states.append(read_checkpoint(tmp_path / name / "weights" / "last.pt").model.state_dict())
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        dense = read_checkpoint(dense_checkpoint).model.state_dict()
        assert not torch.equal(dense["model.0.conv.weight"], states[0]["model.0.conv.weight"])

    @pytest.mark.parametrize("family", ["yolov10n", "yolo26n"])
    def test_twin_heads_keep_both_their_branches_slim(self, family, tiny_data, tmp_path):
        """New families fail (Torch-Pruning#386 v10): an untraced branch would break the first training step."""
        source = save_as_host(lively(family), tmp_path / "dense.pt")
        out = prune(PruneConfig(model=str(source), out=str(tmp_path / "slim.pt"), target_macs=0.5)).out
        slim = read_checkpoint(out).model
        yolo = YOLO(out)
        yolo.train(
            trainer=SlimDetectionTrainer, data=str(tiny_data), epochs=1, project=str(tmp_path), name="tuned", **QUICK
        )
        model = assert_slim(tmp_path / "tuned" / "weights" / "last.pt", slim)
        for branch in ("cv3", "one2one_cv3"):
            path = f"{branch}.0.0.0.conv.weight"
            before, after = (m.model[-1].state_dict()[path] for m in (slim, model))
            assert not torch.equal(before, after)

    def test_a_width_that_is_not_the_planned_one_is_an_error(self, command, slim_checkpoint, tiny_data, tmp_path):
        model = copy.deepcopy(read_checkpoint(slim_checkpoint).model)
        getattr(model, MARKER)["widths"]["model.0.conv"] = [15, 3]
        torch.save({"model": model, "train_args": {}}, tmp_path / "wrong.pt")
        outcome = command(
            *("finetune", f"model={tmp_path / 'wrong.pt'}", f"data={tiny_data}", "epochs=1"),
            *(f"project={tmp_path}", "name=tuned", *WORDS),
        )
        assert outcome.code == 1
        assert "after loading: 1 layers changed their width, first 'model.0.conv'" in outcome.err
        assert not list((tmp_path / "tuned" / "weights").glob("*"))


@pytest.mark.slow
class TestResume:
    def kill(self, event: str, times: int, words: list[str]) -> None:
        """Run a fine-tune until it is killed."""
        done = subprocess.run(
            [sys.executable, KILLED, event, str(times), *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr

    def test_after_a_kill_ends_slim_at_the_planned_epoch(
        self, command, slim_checkpoint, slim, tiny_data, tmp_path, monkeypatch
    ):
        words = ["finetune", f"model={slim_checkpoint}", f"data={tiny_data}", "epochs=3"]
        folder = tmp_path / "tuned"
        self.kill(
            "on_train_batch_end", 3, [*words, f"project={tmp_path}", "name=tuned", *WORDS]
        )  # two batches an epoch
        assert epochs_in(folder) == [1]
        last = folder / "weights" / "last.pt"
        assert interrupted(folder) == "resumable"
        assert_slim(last, slim)
        careful: list[tuple[str, ...]] = []  # what `test_kills` tests apart has to be called, too

        def told(name: str, function: Any) -> Any:
            def call(*files: Any, **more: Any) -> Any:
                careful.append((name, *(Path(file).name for file in files)))
                return function(*files, **more)

            return call

        for name in ("renew_best", "strip_whole"):
            monkeypatch.setattr(host_trainer, name, told(name, getattr(host_trainer, name)))
        assert command("finetune", f"model={last}", "resume=true").code == 0
        assert careful == [("renew_best", "last.pt", "best.pt"), ("strip_whole", "last.pt"), ("strip_whole", "best.pt")]
        assert epochs_in(folder) == [1, 2, 3]
        assert interrupted(folder) == "finished"
        for name in ("best.pt", "last.pt"):
            assert_slim(folder / "weights" / name, slim)
        assert torch.load(last, weights_only=False)["optimizer"] is None  # stripped: the host finished its work
        again = command("finetune", f"model={last}", "resume=true")
        assert again.code == 2
        assert "no training to resume" in again.err

    def test_after_a_kill_when_all_epochs_were_done_is_refused(self, command, slim_checkpoint, tiny_data, tmp_path):
        """The host strips `last.pt` after the last epoch; killed before, it looks as if epochs were left."""

        class Interruption(BaseException):
            pass

        def interrupt(_: object) -> None:
            raise Interruption

        yolo = YOLO(slim_checkpoint)
        yolo.add_callback("on_fit_epoch_end", interrupt)
        with pytest.raises(Interruption):
            yolo.train(
                trainer=SlimDetectionTrainer,
                data=str(tiny_data),
                epochs=1,
                project=str(tmp_path),
                name="tuned",
                **QUICK,
            )
        last = tmp_path / "tuned" / "weights" / "last.pt"
        assert torch.load(last, weights_only=False)["optimizer"] is not None
        assert interrupted(tmp_path / "tuned") == "finished"
        assert "no training to resume" in command("finetune", f"model={last}", "resume=true").err


class TestInterrupted:
    @pytest.mark.parametrize("content", [None, b"", b"PK half of a checkpoint"])
    def test_nothing_to_go_on_from(self, tmp_path, content):
        if content is not None:
            (tmp_path / "weights").mkdir()
            (tmp_path / "weights" / "last.pt").write_bytes(content)
        assert interrupted(tmp_path) == "nothing"


class TestClasses:
    @pytest.mark.slow
    def test_data_with_other_classes_replace_the_last_layers_only(
        self, command, slim_checkpoint, slim, tiny_data, tmp_path
    ):
        names = ["disc", "square", "triangle", "star", "moon", "heart"]
        data = with_classes(tiny_data, names, tmp_path / "six.yaml")
        outcome = command(
            *("finetune", f"model={slim_checkpoint}", f"data={data}", "epochs=1"),
            *(f"project={tmp_path}", "name=tuned", *WORDS),
        )
        assert outcome.code == 0
        model = read_checkpoint(tmp_path / "tuned" / "weights" / "last.pt").model
        before, after = widths(slim), widths(model)
        changed = {path for path in before if before[path] != after[path]}
        assert changed == {f"model.22.cv3.{level}.2" for level in range(3)}
        assert all(after[path] == [6, before[path][1]] for path in changed)
        assert is_slim(model)
        assert getattr(model, MARKER)["widths"] == after
        assert list(model.names.values()) == names

    @pytest.mark.parametrize("family", ["yolov8n", "yolov10n", "yolo26n"])
    def test_everything_else_keeps_its_weights(self, family):
        model = disturbed(lively(family))
        setattr(model, MARKER, {"widths": widths(model)})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        retarget_classes(model, 7, dict(enumerate("abcdefg")))
        after = model.state_dict()
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        head, towers = len(model.model) - 1, ["cv3", "one2one_cv3"] if family != "yolov8n" else ["cv3"]
        assert changed == {
            f"model.{head}.{tower}.{level}.2.{leaf}"
            for tower in towers
            for level in range(3)
            for leaf in ("weight", "bias")
        }
        assert getattr(model, MARKER)["widths"] == widths(model)
        model.train()(torch.rand(1, 3, 64, 64))

    def test_same_classes_change_nothing(self):
        model = disturbed(lively("yolov8n"))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        retarget_classes(model, 4, model.names)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class TestTrainableCopy:
    def test_thaws_everything_but_the_constant_layer(self, slim):
        model = trainable_copy(slim)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"model.22.dfl.conv.weight"}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert getattr(model, MARKER) == getattr(slim, MARKER)

    def test_refuses_a_fused_model(self, slim):
        with pytest.raises(CheckpointError, match="fused"):
            trainable_copy(copy.deepcopy(slim).fuse(verbose=False))


class TestControl:
    """The control is the slim network with random weights: widths and constants stay, knowledge goes."""

    def test_resets_every_weight_but_the_constant_one(self, slim):
        trained = disturbed(copy.deepcopy(slim))
        model = copy.deepcopy(trained)
        reset_weights(model, seed=0)
        assert widths(model) == widths(slim)
        for name, parameter in model.named_parameters():
            same = torch.equal(parameter, trained.state_dict()[name])
            assert same == name.startswith("model.22.dfl"), name
        for name, buffer in model.named_buffers():
            assert torch.all(buffer == name.endswith("running_var"))

    def test_seed_decides(self, slim):
        models = [copy.deepcopy(slim) for _ in range(3)]
        for model, seed in zip(models, (0, 0, 1), strict=True):
            reset_weights(model, seed=seed)
        first, same, other = (model.state_dict()["model.0.conv.weight"] for model in models)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
