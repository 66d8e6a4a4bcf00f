"""`kill -9` at random moments: a resumed run loses no checkpoint and ends as one that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import save_as_host
from command_line import contents
from models import lively
from resrep_cases import small_network
from test_gradual import words_for
from test_run import write_settings
from test_training import epochs_in

from yolo_prune.hosts.slim import widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.run_files import WholeFile, drop_rows, interrupted, renew_best, strip_whole

KILLS = int(os.environ.get("YOLO_PRUNE_KILLS", "1"))
"""Random moments of each kind of run; more are a setting, to be run by hand."""

RUNS = {
    "sparsity": {"sparsity": "auto"}
    | dict.fromkeys(("prune_every", "prune_steps", "target_macs", "min_channels", "round_to")),
    "iterative": {},
}


def words(kind: str, model: Path, data: Path, folder: Path) -> list[str]:
    plain = words_for(model, data, folder, **{key: value for key, value in RUNS[kind].items() if value is not None})
    absent = [f"{key}=" for key, value in RUNS[kind].items() if value is None]
    return [word for word in plain if not word.startswith(tuple(absent))]


def record_of(folder: Path) -> dict[str, Any]:
    """Return the state that a run of either kind keeps."""
    file = next(path for path in (folder / "sparsity.json", folder / "pruning.json") if path.is_file())
    return json.loads(file.read_text())


@pytest.fixture(scope="module", params=["iterative", pytest.param("sparsity", marks=pytest.mark.exhaustive)])
def undisturbed(request, tmp_path_factory, dense_checkpoint, tiny_data):
    """A run of a kind that nobody killed, and how long it took after its first checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "yolo_prune", *words(request.param, dense_checkpoint, tiny_data, folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = first_checkpoint(folder / "a", process)
    assert process.wait(timeout=300) == 0
    return request.param, folder / "a", time.monotonic() - started


def first_checkpoint(folder: Path, process: subprocess.Popen) -> float:
    """Wait for a run's first checkpoint; return when it was there."""
    while not (folder / "weights" / "last.pt").is_file():
        assert process.poll() is None
        time.sleep(0.02)
    return time.monotonic()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_ends_like_one_that_was_not(undisturbed, command, dense_checkpoint, tiny_data, tmp_path, seed):
    kind, whole, seconds = undisturbed
    process = subprocess.Popen(
        [sys.executable, "-m", "yolo_prune", *words(kind, dense_checkpoint, tiny_data, tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = tmp_path / "a"
    first_checkpoint(folder, process)
    time.sleep(random.Random(f"{kind} {seed}").uniform(0.0, 0.9 * seconds))
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = interrupted(folder)
    assert state in ("resumable", "finished")  # never nothing: there was a checkpoint
    before = record_of(folder)
    if state == "resumable":
        assert command("train", f"model={folder / 'weights' / 'last.pt'}", "resume=true").code == 0
    assert epochs_in(folder) == epochs_in(whole)
    for name in ("last.pt", "best.pt"):
        found, expected = (read_checkpoint(run / "weights" / name).model for run in (folder, whole))
        assert widths(found) == widths(expected)
    after = record_of(folder)
    assert after["options"] == before["options"] == record_of(whole)["options"]
    if kind == "sparsity":  # what was done before the kill stands; an epoch that had no checkpoint yet is done again
        done = [epoch for epoch in after["epochs"] if epoch in before["epochs"]]
        assert len(done) >= len(before["epochs"]) - 1
        assert [epoch["epoch"] for epoch in after["epochs"]] == list(range(6))
    else:
        assert after["steps"] == record_of(whole)["steps"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny_data):
    """What `run` is given but for its folder, a folder of a run that nobody killed, and how long that took."""
    desk = tmp_path_factory.mktemp("run")
    model = save_as_host(small_network(), desk / "dense.pt")
    started = time.monotonic()
    assert start_run(desk, model, tiny_data).wait(timeout=300) == 0
    return model, desk / "run", time.monotonic() - started


def start_run(desk: Path, model: Path, data: Path) -> subprocess.Popen:
    settings = write_settings(desk / "settings.yaml", data, model=str(model))
    command = [sys.executable, "-m", "yolo_prune", "run", str(settings)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def told(folder: Path) -> dict[str, Any]:
    """Return the records of a run's stages without timings, hashes of checkpoints (which hold a date) and its path."""
    texts = {path.stem: path.read_text() for path in (folder / "stages").glob("*.json")}
    found = {name: json.loads(text.replace(str(folder), "RUN")) for name, text in texts.items()}
    found["benchmark"] = [entry["name"] for entry in found["benchmark"]["entries"]]
    found["prune"]["plan"].pop("source_sha256")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_of_all_stages_ends_with_the_same_files(whole_run, command, tiny_data, tmp_path, seed):
    """At any moment of its whole length. A training that is resumed draws other numbers: its weights are others."""
    model, whole, seconds = whole_run
    process, folder = start_run(tmp_path, model, tiny_data), tmp_path / "run"
    time.sleep(random.Random(f"run {seed}").uniform(0.0, seconds))
    process.kill()
    process.wait()
    resumed = interrupted(folder / "slim") == "resumable"
    outcome = command("run", tmp_path / "settings.yaml")
    assert outcome.code == 0, outcome.err
    assert {*contents(folder)} == {*contents(whole)}
    found, expected = told(folder), told(whole)
    of_weights = {"evaluate_slim", "export_slim_onnx", "detections"} if resumed else set()
    assert found.keys() == expected.keys() > of_weights
    assert all(found[name] == expected[name] for name in found.keys() - of_weights)
    costs, expected_costs = (json.loads((run / "summary.json").read_text())["costs"] for run in (folder, whole))
    assert costs == expected_costs
    for name in ("dense/weights/best.pt", "pruned.pt", "slim/weights/best.pt", "slim/weights/last.pt"):
        one, other = (read_checkpoint(run / name).model for run in (folder, whole))
        assert widths(one) == widths(other)
        if not (resumed and name.startswith("slim")):
            tensors = other.state_dict()
            assert all(torch.equal(value, tensors[path]) for path, value in one.state_dict().items())


def test_rows_of_an_epoch_that_is_repeated_are_dropped(tmp_path):
    results = tmp_path / "results.csv"
    results.write_text("epoch,time\n1,2.5\n2,3\n3,4\n")
    drop_rows(results, after=2)
    assert results.read_text() == "epoch,time\n1,2.5\n2,3\n"
    drop_rows(tmp_path / "absent.csv", after=2)
    assert not (tmp_path / "absent.csv").exists()


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    path = WholeFile(tmp_path / "last.pt")
    path.write_bytes(b"one")

    with pytest.raises(TypeError):
        path.write_bytes(None)
    assert path.read_bytes() == b"one"
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert path.write_bytes(b"three") == 5
    assert (tmp_path / "last.pt").read_bytes() == b"three"


class TestWhatAKillMayLeave:
    def test_a_best_checkpoint_of_the_larger_network_is_replaced_on_resume(self, tmp_path):
        """The host writes last.pt, then best.pt: killed in between, right after a cut."""
        last, best = (tmp_path / f"{name}.pt" for name in ("last", "best"))
        shutil.copy(save_as_host(lively("yolov8n"), tmp_path / "n.pt"), last)
        shutil.copy(save_as_host(lively("yolov8s"), tmp_path / "s.pt"), best)
        renew_best(last, best)
        assert best.read_bytes() == last.read_bytes()

    def test_a_best_checkpoint_of_the_same_widths_stays(self, tmp_path):
        last, best = (save_as_host(lively("yolov8n"), tmp_path / f"{name}.pt") for name in ("last", "best"))
        before = best.read_bytes()
        assert before != last.read_bytes()
        renew_best(last, best)
        assert best.read_bytes() == before
        best.unlink()
        renew_best(last, best)
        assert not best.exists()

    def test_stripping_leaves_the_checkpoint_or_the_stripped_one(self, tmp_path, monkeypatch):
        """The host strips the optimizer off a checkpoint where it stands."""
        path = save_as_host(lively("yolov8n"), tmp_path / "last.pt")
        before = path.read_bytes()

        def killed_in_the_middle(_content: Any, place: Any, *_: Any, **__: Any) -> None:
            Path(place).write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", killed_in_the_middle)
            with pytest.raises(KeyboardInterrupt):
                strip_whole(path)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
        assert strip_whole(path, updates={"note": 1})["note"] == 1
        content = torch.load(path, weights_only=False)
        assert content["optimizer"] is None
        assert content["note"] == 1
