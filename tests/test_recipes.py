"""Recipes and their record: what they share is equal, cells are only appended, figures are the record's."""

from __future__ import annotations

import copy
import dataclasses
import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from bench_recipes import RECORD, Cell, Laboratory, RecipesConfig, bench
from recipe_figures import Cells
from recipes import CONTROLS, RECIPES
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_prune.errors import ConfigError
from yolo_prune.files import append_line, read_lines
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.pipeline.rewrite import RewriteConfig
from yolo_prune.pipeline.search import SearchConfig
from yolo_prune.pipeline.train_config import TrainConfig

CELL = Cell(recipe="direct", budget=0.5, seed=0, data="d", model="m", imgsz_px=64, batch=4, dense_epochs=1, epochs=20)


def line(recipe: str, seed: int = 0, test: float = 0.5, **stage: Any) -> dict[str, Any]:
    """A finished cell by hand: the dense training, then one training of two epochs."""
    train = [] if recipe == "start" else [{"train": "0_train", **stage}]
    return {
        "cell": dataclasses.asdict(dataclasses.replace(CELL, recipe=recipe, seed=seed)),
        "figures": {"macs_kept": 0.5, "params": 1_000_000, "unpruned": 0.6, "pruned": 0.1, "val": 0.5, "test": test},
        "curves": {"base": [0.9, 0.9], "0_train": [0.2, 0.3]},
        "stages": [{"train": "base"}, *train],
    }


def race(seed: int, backend: str, **ratios: float) -> dict[str, Any]:
    """A race by hand."""
    cell = {key: value for key, value in dataclasses.asdict(CELL).items() if key != "recipe"}
    return {
        "cell": {**cell, "seed": seed, "backend": backend, "threads": 2, "runners": ["dense", *ratios]},
        "speed_ups": {name: {"ratio": ratio, "p25": ratio, "p75": ratio} for name, ratio in ratios.items()},
    }


class TestRecipes:
    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("epochs", [30, 100])
    def test_all_train_as_long(self, recipe, epochs):
        laboratory = Laboratory(
            RecipesConfig(data="d", model="m"), dataclasses.replace(CELL, recipe=recipe, epochs=epochs)
        )
        total = sum(laboratory._epochs(step) * step.nets for step in RECIPES[recipe] if step.verb == "train")
        assert total == (0 if recipe == "start" else epochs)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_settings_exist(self, recipe):
        """A misspelt setting would be found out hours later."""
        known = {
            "train": {field.name for field in dataclasses.fields(TrainConfig)} | DEFAULT_CFG_DICT.keys(),
            "prune": {field.name for field in dataclasses.fields(PruneConfig)},
            "search": {field.name for field in dataclasses.fields(SearchConfig)},
            "rewrite": {field.name for field in dataclasses.fields(RewriteConfig)},
        }
        for step in RECIPES[recipe]:
            settings = step.settings(30, 0.5)
            if step.verb == "search":  # of the cut that follows
                assert set(settings) - known["search"] == {"recalibrate"}
                continue
            assert set(settings) <= known[step.verb]
            assert settings.get("grafting", {}).get("nets", 1) == step.nets

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_all_but_controls_prune_to_the_budget(self, recipe):
        budgets = [step.settings(30, 0.25).get("target_macs") for step in RECIPES[recipe]]
        assert [value for value in budgets if value] == ([] if recipe in CONTROLS else [0.25])

    def test_an_unknown_one_is_refused_before_anything_is_trained(self, tmp_path):
        with pytest.raises(ConfigError, match="unknown recipe 'magic'"):
            bench(RecipesConfig(data="d", model="m", out=str(tmp_path / "out"), recipes=["magic"]))
        assert not (tmp_path / "out").exists()


class TestRecord:
    def test_is_only_appended_to(self, tmp_path):
        record = tmp_path / "records" / "recipes.jsonl"
        append_line(record, line("direct"))
        before = record.read_bytes()
        append_line(record, line("gradual"))
        assert record.read_bytes().startswith(before)
        assert [one["cell"]["recipe"] for one in read_lines(record)] == ["direct", "gradual"]
        assert read_lines(tmp_path / "none.jsonl") == []

    def test_the_one_in_the_repository_is_whole(self):
        cells = read_lines(RECORD)
        keys = [json.dumps(record["cell"], sort_keys=True) for record in cells]
        assert len(set(keys)) == len(keys)
        assert all(record["cell"]["recipe"] in RECIPES for record in cells)


class TestFigures:
    def test_controls_come_first_and_seeds_share_a_row(self):
        records = [line("gradual", 0, 0.5), line("gradual", 1, 0.6), line("dense"), line("start")]
        rows = [
            [cell.strip() for cell in row.split("|")]
            for row in Cells(records=records, races=[]).table(markdown=True).split("\n")
        ]
        body = [row[1:-1] for row in rows[2:] if len(row) > 2]
        assert [row[1] for row in body] == ["start", "dense", "gradual"]
        assert body[0][2] == "0"
        assert body[2][3] == "0 1"
        assert body[2][-1] == "0.550 (0.500..0.600)"

    def test_silent_channels_are_those_of_the_last_epoch(self):
        table = Cells(records=[line("gradual_sparse", silent=[0.0, 0.2, 0.4])], races=[]).table()
        assert " 40% " in table

    def test_stripes_have_a_share_of_their_own(self):
        record = line("stripes")
        record["figures"] |= {"macs_kept": 0.7, "stripe_macs_kept": 0.5}
        assert " 70.0% (50.0% in stripes) " in Cells(records=[record], races=[]).table()

    def test_latencies_are_the_last_race_of_each_seed(self):
        races = [race(0, "ncnn", direct=1.0), race(0, "ncnn", direct=1.5), race(1, "ncnn", direct=1.7, gradual=2.0)]
        table = Cells(records=[line("start"), line("direct", 0), line("direct", 1)], races=races).table()
        start, direct = table.splitlines()[2:4]
        assert direct.endswith(" 1.60x")
        assert start.endswith(" -")

    def test_what_a_conversion_changed_is_said(self):
        record = line("resrep")
        record["figures"]["before_conversion"] = {"val": 0.501, "test": 0.5}
        table = Cells(records=[record], races=[]).table()
        assert "resrep, seed 0, before and after its conversion: val 0.5010 and 0.5000, test 0.5000 and 0.5000" in table

    def test_the_curves_are_drawn_alike_each_time(self, tmp_path):
        records = [line("direct"), line("dense"), line("start"), line("gradual_sparse", silent=[0.0, 0.4])]
        cells = Cells(records=records, races=[])
        Cells(records=[line("dense")], races=[]).draw(tmp_path / "none.svg")
        assert not (tmp_path / "none.svg").exists()  # a control alone is compared with nothing
        files = [tmp_path / "a.svg", tmp_path / "b.svg"]
        for file in files:
            copy.deepcopy(cells).draw(file)
        assert files[0].read_bytes() == files[1].read_bytes()
        texts = {element.text for element in ET.parse(files[0]).iter() if element.tag.endswith("text")}
        assert {
            "direct",
            "dense",
            "start",
            "gradual_sparse",
            "m, d, 64 px, 20 epochs, 50% of the MACs, batch 4, dense 1 epochs",
        } <= texts


@pytest.mark.exhaustive
def test_a_cell_is_a_training_a_cut_and_a_line(tmp_path, dense_checkpoint, tiny_data):
    """The smallest cell, and that asking again runs nothing."""
    words = {"imgsz": 64, "batch": 4, "workers": 0, "epochs": 1, "dense_epochs": 1}
    config = RecipesConfig(
        data=str(tiny_data), model=str(dense_checkpoint), out=str(tmp_path / "cells"),
        recipes=["start", "direct_often", "plain_direct"], record=str(tmp_path / "recipes.jsonl"),
        backends=["onnxruntime"], threads=1, runs=3, **words,
    )  # fmt: skip
    start, direct, plain = bench(config).records
    assert 0.4 < plain["figures"]["macs_kept"] <= 0.5  # of the dense model, though the rewritten one costs more
    assert plain["stages"][1]["rewrite"].startswith("0_rewritten_")
    assert start["figures"]["macs_kept"] == 1.0
    assert start["figures"]["pruned"] is None
    assert 0.4 < direct["figures"]["macs_kept"] <= 0.5
    assert direct["stages"][2]["nbs"] == 16
    assert [len(curve) for curve in direct["curves"].values()] == [1, 1]
    slim = next((tmp_path / "cells").glob("*-direct_often-*/1_train/weights/best.pt"))
    assert int(direct["figures"]["params"]) == sum(p.numel() for p in read_checkpoint(slim).model.parameters())
    before = (tmp_path / "recipes.jsonl").read_bytes()
    races = bench(config).races
    assert [race["speed_ups"].keys() for race in races] == [{"direct_often", "plain_direct"}]
    assert len(bench(config).records) == 3
    assert (tmp_path / "recipes.jsonl").read_bytes() == before
