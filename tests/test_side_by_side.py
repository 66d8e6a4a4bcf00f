"""Trainings side by side: none notices the others, and all come back to the same epoch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yolo_prune.errors import CheckpointError, ConfigError
from yolo_prune.hosts.ultralytics.grafting import grafting_options_of
from yolo_prune.hosts.ultralytics.grafting_files import (
    epochs_done,
    forget_nets,
    forget_previous,
    go_back,
    grafting_record,
    keep_previous,
    note_epoch,
    state_of_nets,
    write_record,
)
from yolo_prune.hosts.ultralytics.run_files import forget_run, interrupted
from yolo_prune.hosts.ultralytics.side_by_side import ProcessState, run_side_by_side


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
        deterministic = torch.are_deterministic_algorithms_enabled()  # whatever an earlier training left
        together = run_side_by_side([drawing(3, seed, log) for seed in (1, 2, 3)], lambda _: None)
        alone = [run_side_by_side([drawing(3, seed, log)], lambda _: None)[0] for seed in (1, 2, 3)]
        assert together == alone
        assert len({value for drawn in alone for value in drawn}) == 27
        assert torch.equal(torch.get_rng_state(), before.torch_rng)
        assert torch.are_deterministic_algorithms_enabled() == deterministic

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
        assert grafting_record(tmp_path) is None

    def test_an_epoch_that_is_done_again_is_noted_once(self, tmp_path):
        write_record(tmp_path, {"epochs": []})
        for epoch in (1, 2, 3, 2):
            note_epoch(tmp_path, epoch, epoch)
        assert [row["epoch"] for row in grafting_record(tmp_path)["epochs"]] == [1, 2]

    def test_a_damaged_record(self, tmp_path):
        (tmp_path / "grafting.json").write_text("{")
        with pytest.raises(ConfigError, match="cannot read"):
            grafting_options_of(tmp_path)
