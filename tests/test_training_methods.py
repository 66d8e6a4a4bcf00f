"""What every method of training stands on: events of the trainer, unfinished networks, methods that act alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import save_as_host
from command_line import contents
from models import lively
from test_training import QUICK

from yolo_prune.configuration import describe, parse, setting
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.slim import is_slim, mark, unfinished, widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.records import FILES
from yolo_prune.hosts.ultralytics.run_files import forget_run
from yolo_prune.hosts.ultralytics.trainer import BEFORE_FINAL_EVAL, MODEL_SETUP, OPTIMIZER_BUILT, train
from yolo_prune.pipeline.train import Training, train_in
from yolo_prune.pipeline.train_config import TrainConfig
from yolo_prune.pipeline.training_methods import METHODS, asked_of


@pytest.mark.slow
def test_events_come_when_methods_can_still_change_what_they_are_for(slim_checkpoint, tiny_data, tmp_path):
    seen: list[tuple[str, bool, bool]] = []

    def note(event: str, trainer: Any) -> None:
        seen.append((event, trainer.optimizer is None, getattr(trainer, "ema", None) is None))
        if event == OPTIMIZER_BUILT:
            assert getattr(trainer, "scheduler", None) is None
        if event == BEFORE_FINAL_EVAL:
            assert read_checkpoint(trainer.last).model is not None

    events = (MODEL_SETUP, OPTIMIZER_BUILT, "on_pretrain_routine_end", BEFORE_FINAL_EVAL)
    callbacks = {event: lambda trainer, event=event: note(event, trainer) for event in events}
    place = {"project": str(tmp_path), "name": "a"}
    train(slim_checkpoint, callbacks=[callbacks], data=str(tiny_data), epochs=1, **place, **QUICK)
    assert seen == [
        (MODEL_SETUP, True, True),
        (OPTIMIZER_BUILT, False, True),
        ("on_pretrain_routine_end", False, False),
        (BEFORE_FINAL_EVAL, False, False),
    ]


class TestUnfinishedNetworks:
    @pytest.fixture
    def left(self, desk) -> Path:
        """The last.pt of a training that was killed while its network had a method's structures."""
        model = lively("yolov8n")
        mark(model, unfinished="resrep")
        assert is_slim(model)
        return save_as_host(model, desk / "last.pt")

    @pytest.mark.parametrize(
        "words",
        [
            ["prune", "target_macs=0.5", "out=slim.pt"],
            ["inspect"],
            ["export", "format=onnx", "out=exports"],
            ["train", "data=data.yaml", "epochs=1"],
        ],
    )
    @pytest.mark.usefixtures("data")
    def test_nothing_but_resuming_takes_them(self, refused, left, words):
        message = refused(words[0], f"model={left}", *words[1:])
        assert "in the middle of a training with method=resrep" in message
        assert "resume=true" in message

    def test_resuming_does(self, left):
        model = read_checkpoint(left, in_training=True).model
        assert unfinished(model) == "resrep"
        assert unfinished(lively("yolov8n")) is None

    def test_a_mark_keeps_what_was_there_and_renews_widths(self):
        model: Any = lively("yolov8n")
        mark(model, lineage=["a"])
        model.model[0].conv = type(model.model[0].conv)(3, 12, 3)
        mark(model, zeros=1)
        assert model.yolo_prune["lineage"] == ["a"]
        assert model.yolo_prune["zeros"] == 1
        assert model.yolo_prune["widths"] == widths(model)


class TestTrainingInAFolder:
    """What `run` and the benchmarks do with a training that may have been killed."""

    @pytest.fixture
    def resumed(self, monkeypatch) -> list[TrainConfig]:
        """The settings of every training that was begun."""
        begun: list[TrainConfig] = []

        def noted(config: TrainConfig, _: Any) -> Training:
            begun.append(config)
            return Training(best=Path("new.pt"))

        monkeypatch.setattr("yolo_prune.pipeline.train.train_model", noted)
        return begun

    def finished(self, folder: Path, **marks: str) -> Path:
        model = lively("yolov8n")
        mark(model, **marks)
        (folder / "weights").mkdir(parents=True)
        for name in ("last.pt", "best.pt"):
            save_as_host(model, folder / "weights" / name)
        return folder

    def test_one_that_is_done_is_taken(self, tmp_path, resumed):
        folder = self.finished(tmp_path / "a")
        assert train_in(folder, Path("m.pt"), Path("d.yaml"), {}) == folder / "weights" / "best.pt"
        assert not resumed

    def test_one_that_was_killed_before_its_network_was_converted_is_finished(self, tmp_path, resumed):
        folder = self.finished(tmp_path / "a", unfinished="resrep")
        assert train_in(folder, Path("m.pt"), Path("d.yaml"), {}) == Path("new.pt")
        assert [(config.model, config.resume) for config in resumed] == [(str(folder / "weights" / "last.pt"), True)]

    def test_one_that_left_nothing_is_begun_anew(self, tmp_path, resumed):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "half.txt").touch()
        train_in(tmp_path / "a", Path("m.pt"), Path("d.yaml"), {"epochs": 3, "sparsity": "auto"})
        assert [(config.model, config.data, config.sparsity) for config in resumed] == [("m.pt", "d.yaml", "auto")]
        assert not (tmp_path / "a").exists()


class TestMethodsTogether:
    WORDS = dataclasses.replace(TrainConfig(model="a.pt", sparsity="auto"), prune_every=1, target_macs=0.5)

    def test_those_that_can_act_together_in_their_order(self):
        assert list(asked_of(self.WORDS)) == ["pruning", "sparsity"]

    def test_one_that_is_named_is_refused_beside_others(self):
        words = dataclasses.replace(self.WORDS, sparsity=None, method="stripes")
        with pytest.raises(ConfigError, match="pruning and stripes in one training") as error:
            asked_of(words)
        assert "stripes alone" in str(error.value)
        alone = dataclasses.replace(words, prune_every=None)
        assert list(asked_of(alone)) == ["stripes"]


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    "words",
    [
        ["train", "data=data.yaml", "epochs=1", "method=resrep", "target_macs=0.6"],
        ["train", "data=data.yaml", "epochs=1", "method=grafting"],
        ["rewrite", "out=plain.pt"],
    ],
)
def test_what_would_fill_zeros_that_are_kept_is_refused(refused, desk, words):
    model = lively("yolov8n")
    mark(model, zeros=["model.0.conv.weight"])
    path = save_as_host(model, desk / "zeros.pt")
    assert "whose zeros are kept" in refused(words[0], f"model={path}", *words[1:])


class TestRecords:
    """What a run leaves in its folder, from which it is resumed."""

    def test_each_method_has_one(self):
        assert FILES.keys() == METHODS.keys()

    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("content", ['{"options": {', "{}", '{"options": {"unheard": 1}}', "[]", "3"])
    def test_a_damaged_one_is_a_clear_error(self, tmp_path, name, content):
        record = FILES[name][0]
        (tmp_path / record).write_text(content)
        with pytest.raises(ConfigError, match=f"cannot read '.*{record}'"):
            METHODS[name].known(tmp_path)

    @pytest.mark.parametrize("name", METHODS)
    def test_without_one_there_was_no_such_method(self, tmp_path, name):
        assert METHODS[name].known(tmp_path) is None

    @pytest.mark.parametrize("name", METHODS)
    def test_a_new_run_forgets_everything_that_an_earlier_one_left(self, tmp_path, name):
        (tmp_path / "weights").mkdir()
        for left in FILES[name]:
            (tmp_path / left.replace("*", "3")).write_text('{"options": {')
        (tmp_path / "thesis.json").write_text("a year of work")
        forget_run(tmp_path)
        assert set(contents(tmp_path)) == {"weights/", "thesis.json"}


@dataclasses.dataclass
class Part:
    share: float = setting(0.5, help="how much", unit="of it")


@dataclasses.dataclass
class Whole:
    name: str = setting("a", help="its name")
    part: Part = dataclasses.field(default_factory=Part)


def test_settings_of_a_part_are_typed_and_described_with_a_dot():
    assert describe(Whole) == [("name", "a", "its name"), ("part.share", "0.5 of it", "how much")]
    found, _ = parse(Whole, ["part.share=0.25"])
    assert found == Whole(part=Part(share=0.25))
    for wrong in ("part.shrae=1", "part.share=much"):
        with pytest.raises(ConfigError):
            parse(Whole, [wrong])
