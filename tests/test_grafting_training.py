"""Filter grafting in whole trainings: several networks, one network, what is refused."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import states
from test_training import KILLED, QUICK, WORDS, assert_slim, epochs_in
from ultralytics.utils.callbacks import default_callbacks

from yolo_prune.cli import main
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.ultralytics import grafting_nets
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.grafting import grafting_options_of
from yolo_prune.hosts.ultralytics.grafting_files import (
    epochs_done,
    grafting_record,
)
from yolo_prune.hosts.ultralytics.grafting_nets import require_same_shapes
from yolo_prune.hosts.ultralytics.run_files import interrupted
from yolo_prune.hosts.ultralytics.trainer import train

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
        record = grafting_record(whole)
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

    @pytest.mark.exhaustive
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
        found, expected = grafting_record(tmp_path / "a"), grafting_record(whole)
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
        record = grafting_record(folder)
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
