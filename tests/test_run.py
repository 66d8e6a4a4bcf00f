"""`run`: every stage once, whatever kills it on the way."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import yaml
from command_line import contents
from test_training import KILLED, epochs_in
from torch import nn

from yolo_prune.claims import LOCK
from yolo_prune.errors import OutputError
from yolo_prune.files import new_file
from yolo_prune.hosts.slim import MARKER, widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.pipeline.stages import Stages

TRAINING = {
    **{"epochs": 1, "batch": 8, "nbs": 8, "warmup_epochs": 0, "optimizer": "SGD", "lr0": 0.01},
    **{"workers": 0, "plots": False, "device": "cpu", "verbose": False},
}
SETTINGS = {
    "model": "yolov8n.yaml",
    "imgsz": 64,
    "train": TRAINING,
    "prune": {"target_macs": 0.5, "criterion": "bn_scale"},
    "finetune": {**TRAINING, "epochs": 2},
    "formats": ["onnx"],
    "runs": 3,
    "threads": 1,
}
STAGES = (
    *("dense", "prune", "finetune", "evaluate_dense", "evaluate_slim", "widths", "detections"),
    *("export_dense_onnx", "export_slim_onnx", "benchmark"),
)


class StoppedError(Exception):
    """Ends a run at its first stage."""


def _stop(*_: object) -> None:
    raise StoppedError


def write_settings(path: Path, data: Path, **more: object) -> Path:
    path.write_text(yaml.safe_dump({**SETTINGS, "data": str(data), "out": str(path.parent / "run"), **more}))
    return path


def records(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Return what tells one writing of a stage's record from another: inode, time and text."""
    return {
        path.stem: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_text())
        for path in (folder / "stages").glob("*.json")
    }


def run_until_killed(event: str, times: int, settings: Path) -> str:
    """Run in a process that dies; return what it printed."""
    done = subprocess.run(
        [sys.executable, KILLED, event, str(times), "run", settings], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout


def half_written(path: Path) -> Path:
    """Return the file that a process leaves which is killed while it writes `path`."""
    with contextlib.suppress(KeyboardInterrupt), new_file(path, replace=True) as left:
        raise KeyboardInterrupt
    left.parent.mkdir(exist_ok=True)
    left.touch()
    return left


@pytest.mark.slow
def test_killed_twice_it_goes_on_where_it_stopped(command, tiny_data, tmp_path):
    settings, folder = write_settings(tmp_path / "settings.yaml", tiny_data), tmp_path / "run"

    # In the second of three epochs of training: the dense one and the first of fine-tuning are done.
    assert "[3/10] finetune" in run_until_killed("on_train_batch_end", 5, settings)
    first = records(folder)
    assert set(first) == {"dense", "prune"}
    assert epochs_in(folder / "slim") == [1]

    # In the second export: the working folder of the exporter is left behind.
    printed = run_until_killed("on_export_start", 2, settings)
    assert "[2/10] prune: done before" in printed
    assert "Resuming training" in printed
    second = records(folder)
    assert set(second) == set(STAGES[:8])
    assert {name: second[name] for name in first} == first
    assert epochs_in(folder / "slim") == [1, 2]
    assert list((folder / "exports").glob(".*"))

    done = command("run", settings, f"json={tmp_path / 'summary.json'}")
    assert done.code == 0
    assert "[8/10] export_dense_onnx: done before" in done.out
    third = records(folder)
    assert set(third) == set(STAGES)
    assert {name: third[name] for name in second} == second
    assert not [path for path in folder.rglob(".*") if path.name not in (".gitignore", LOCK)]
    assert_complete(folder, done.out)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads((folder / "summary.json").read_text())

    left = [half_written(folder / name) for name in ("stages/dense.json", "slim/weights/last.pt", "data/mine.jpg")]
    again = command("run", settings)
    assert again.code == 0
    assert again.out.count("done before") == len(STAGES)
    assert [path.exists() for path in left] == [False, False, True]
    assert records(folder) == third
    assert_others_are_refused(command, settings, folder)


@pytest.mark.exhaustive
def test_the_fine_tune_may_prune_and_be_taught_by_the_dense_model(command, tiny_data, tmp_path):
    """The recipe that README recommends, in one file; killed between its steps it goes on with them."""
    steps = {"target_macs": 0.5, "prune_every": 1, "prune_steps": 2, "prune_batches": 1, "distill": "dense"}
    more = {"prune": {}, "finetune": {**TRAINING, "epochs": 3, **steps}, "control": True}
    settings, folder = write_settings(tmp_path / "settings.yaml", tiny_data, **more), tmp_path / "run"
    assert "[2/13] finetune" in run_until_killed("on_train_batch_end", 6, settings)  # the second of its epochs
    assert command("run", settings).code == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["costs"]["slim"]["macs"] <= 0.5 * summary["costs"]["dense"]["macs"]
    assert summary["costs"]["slim"] == summary["costs"]["control"]
    assert 0.0 < summary["verification"]["max_abs_error"] <= 1e-9
    assert epochs_in(folder / "slim") == epochs_in(folder / "control") == [1, 2, 3]
    slim, control = (read_checkpoint(folder / name / "weights" / "best.pt").model for name in ("slim", "control"))
    assert widths(slim) == widths(control)
    assert [step["step"] for step in json.loads((folder / "slim" / "pruning.json").read_text())["steps"]] == [1, 2]


@pytest.mark.slow
def test_what_is_pruned_may_be_rewritten_first(command, dense_checkpoint, tiny_data, tmp_path):
    more = {"model": str(dense_checkpoint), "train": {}, "rewrite": {"shortcuts": "remove"}, "formats": ["onnx"]}
    more["finetune"] = {**TRAINING, "epochs": 1}
    settings, folder = write_settings(tmp_path / "settings.yaml", tiny_data, **more), tmp_path / "run"
    assert command("run", settings).code == 0
    costs = json.loads((folder / "summary.json").read_text())["costs"]
    plan = json.loads((folder / "stages" / "prune.json").read_text())["plan"]
    grown = json.loads((folder / "stages" / "rewrite.json").read_text())
    assert costs["dense"] == grown["before"] != grown["after"] == plan["before"]
    assert costs["slim"] == plan["after"]
    slim = read_checkpoint(folder / "slim" / "weights" / "best.pt").model
    assert len(slim.model) > 23  # the rows of yolov8n
    layers = json.loads((folder / "stages" / "widths.json").read_text())  # a layer is compared with itself
    rewritten = read_checkpoint(folder / "rewritten.pt").model
    assert layers["dense"] == {path: size[0] for path, size in widths(rewritten).items()}
    assert [*layers["dense"]] == [*layers["slim"]]
    assert all(layers["slim"][path] <= layers["dense"][path] for path in layers["slim"])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "before pruning: the rewritten form of the dense model" in page


STEPS = {"prune_every": 1, "target_macs": 0.5}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"finetune": {"epochs": 2, "target_macs": 0.5}}, "'prune_every=' is required"),
        ({"finetune": {"epochs": 2, **STEPS, "prune_steps": 1}}, "both `prune:` and `finetune:` prune"),
        ({"prune": {}, "finetune": {"epochs": 2, **STEPS, "prune_steps": 2}}, "comes after epoch 2 of 2"),
        ({"train": {"epochs": 2, **STEPS, "prune_steps": 1}}, "`train:` prunes"),
        ({"finetune": {"epochs": 2, "distill": "absent.pt"}}, "no file 'absent.pt'"),
        ({"rewrite": {"shortcuts": "keep"}}, "unknown shortcuts 'keep'"),
        ({"rewrite": {"out": "plain.pt"}}, "unknown key 'out'"),
        ({"finetune": {"epochs": 2, "sparsity": "much"}}, "sparsity"),
        ({"direct": {"criterion": "best"}}, "unknown criterion 'best'"),
        ({"direct": {"out": "x.pt"}}, "unknown key 'out'"),
        ({"smaller": "absent.pt"}, "absent.pt"),
    ],
)
def test_methods_that_cannot_be_run_are_refused_before_the_first_training(command, tiny_data, tmp_path, more, said):
    outcome = command("run", write_settings(tmp_path / "settings.yaml", tiny_data, **more))
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "run").exists()


def assert_complete(folder: Path, printed: str) -> None:
    """Assert that the results of a run are there and agree with each other."""
    settings = json.loads((folder / "run.json").read_text())
    assert settings["prune"] == SETTINGS["prune"]
    summary = json.loads((folder / "summary.json").read_text())
    slim = read_checkpoint(folder / "slim" / "weights" / "best.pt").model
    pruned = read_checkpoint(folder / "pruned.pt").model
    assert widths(slim) == widths(pruned) == getattr(slim, MARKER)["widths"]
    assert summary["costs"]["slim"]["params"] == sum(parameter.numel() for parameter in slim.parameters())
    assert summary["costs"]["slim"]["macs"] <= summary["costs"]["dense"]["macs"] / 2
    assert summary["verification"]["max_abs_error"] <= 1e-9
    assert set(summary["latency_ms"]) == {"dense_pytorch", "slim_pytorch", "dense_onnx", "slim_onnx"}
    assert set(summary["parity"]) == {"dense_onnx", "slim_onnx"}
    assert summary["evaluations"]["slim"]["val"]["images"] == 8
    assert_shown(folder, slim)
    table = (folder / "summary.md").read_text()
    for shown in (table, printed):
        assert all(word in shown for word in ("dense", "slim", "MACs", "mAP50-95 val", "onnx ms"))
    assert "| dense" in table


def assert_shown(folder: Path, slim: nn.Module) -> None:
    """Assert that what a report shows of models is theirs."""
    layers = json.loads((folder / "stages" / "widths.json").read_text())
    assert layers["slim"] == {path: size[0] for path, size in widths(slim).items()}
    assert [*layers["dense"]] == [*layers["slim"]]
    assert layers["dense"]["model.0.conv"] == 16
    record = json.loads((folder / "stages" / "detections.json").read_text())
    assert [image["image"] for image in record["images"]] == sorted(image["image"] for image in record["images"])
    assert len(record["images"]) == 4
    for image in record["images"]:
        for model in ("dense", "slim"):
            assert cv2.imread(str(folder / image["models"][model]["file"])) is not None
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 8
    assert "This report lacks" not in page


def assert_others_are_refused(command, settings: Path, folder: Path) -> None:
    """Assert that a folder belongs to the settings that it was made with."""
    before = contents(folder)
    for words, key in ((["prune.target_macs=0.6"], "prune"), (["seed=1", "runs=4"], "runs, seed")):
        refused = command("run", settings, *words)
        assert refused.code == 2
        assert f"holds a run with other settings: {key}" in refused.err
        assert "choose another out=" in refused.err
    assert contents(folder) == before


class TestFolders:
    def test_of_the_user_is_left_alone(self, command, tiny_data, tmp_path):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "thesis.txt").write_text("a year of work")
        settings = write_settings(tmp_path / "settings.yaml", tiny_data)
        before = contents(tmp_path)
        refused = command("run", settings)
        assert refused.code == 2
        assert "is not empty and holds no run" in refused.err
        assert contents(tmp_path) == before

    def test_that_is_a_file(self, command, tiny_data, tmp_path):
        (tmp_path / "run").write_text("mine")
        settings = write_settings(tmp_path / "settings.yaml", tiny_data)
        refused = command("run", settings)
        assert refused.code == 2
        assert "run'" in refused.err
        assert (tmp_path / "run").read_text() == "mine"

    def test_that_holds_only_its_data_is_taken(self, tmp_path):
        (tmp_path / "data").mkdir()
        Stages(tmp_path, []).open({"seed": 0})
        assert json.loads((tmp_path / "run.json").read_text()) == {"seed": 0}

    def test_that_holds_a_hidden_file_is_the_users(self, tmp_path):
        """Its name is made as that of a temporary file is, but for what is ours in it."""
        (tmp_path / ".notes.abcdefgh.txt").write_text("a year of work")
        with pytest.raises(OutputError, match="is not empty"):
            Stages(tmp_path, []).open({"seed": 0})

    def test_that_was_killed_while_its_settings_were_written_is_begun_anew(self, tmp_path):
        half_written(tmp_path / "run.json")
        Stages(tmp_path, []).open({"seed": 0})
        assert json.loads((tmp_path / "run.json").read_text()) == {"seed": 0}

    def test_whose_files_changed_meanwhile_is_refused(self, command, tiny_data, tmp_path, monkeypatch):
        """Stages of another data set would be taken for this one's."""
        monkeypatch.setattr(Stages, "run", _stop)
        data = tmp_path / "data.yaml"
        data.write_text(f"path: {tiny_data.parent}\n{tiny_data.read_text()}")
        settings = write_settings(tmp_path / "settings.yaml", data)
        with pytest.raises(StoppedError):
            command("run", settings)
        data.write_text(f"{data.read_text()}# another\n")
        refused = command("run", settings)
        assert refused.code == 2
        assert "holds a run with other settings: files_sha256" in refused.err

    @pytest.mark.parametrize("content", ["", "{", "[1]"])
    def test_with_a_damaged_record_is_refused(self, tmp_path, content):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(OutputError, match=r"run\.json"):
            Stages(tmp_path, []).open({"seed": 0})
        assert (tmp_path / "run.json").read_text() == content


class TestStages:
    def test_each_runs_once(self, tmp_path, capsys):
        calls = []

        def work() -> dict[str, int]:
            calls.append(None)
            return {"answer": 42}

        for _ in range(2):
            assert Stages(tmp_path, ["think", "act"]).run("think", work) == {"answer": 42}
        assert len(calls) == 1
        assert capsys.readouterr().out == "[1/2] think\n[1/2] think: done before\n"

    def test_one_that_failed_has_no_record(self, tmp_path):
        with pytest.raises(ZeroDivisionError):
            Stages(tmp_path, ["divide"]).run("divide", lambda: {"ratio": 1 / 0})
        assert Stages(tmp_path, ["divide"]).run("divide", lambda: {"ratio": 1}) == {"ratio": 1}
