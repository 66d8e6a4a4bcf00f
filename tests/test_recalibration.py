"""Adaptive batch normalisation: statistics by their closed form, and nothing else."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import lively
from torch import nn

from yolo_prune.errors import ConfigError
from yolo_prune.hosts.slim import MARKER
from yolo_prune.hosts.ultralytics.collection import (
    TrainingImages,
    augmented_images,
    recalibrate_on,
    shuffled,
    training_dataset,
)
from yolo_prune.search import recalibrate

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Network(nn.Module):
    """Two norms in a row, one with dropout before it, and one that is never run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.03)
        self.b, self.second = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5, momentum=0.03)
        self.unused, self.dropout = nn.BatchNorm2d(2), nn.Dropout(0.9)
        for norm in (self.first, self.second, self.unused):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.b(self.dropout(nn.functional.silu(self.first(self.a(x))))))


def batches(count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 + index, 3, 6, 6, generator=generator, dtype=torch.float64) for index in range(count)]


def run(model: nn.Module, batch: torch.Tensor) -> object:
    return model(batch)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed_in(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


class TestClosedForm:
    def test_means_over_batches_of_what_each_norm_sees(self):
        model = Network().double().eval()
        seen: dict[str, list[Any]] = {"first": [], "second": []}
        for name, found in seen.items():
            getattr(model, name).register_forward_pre_hook(lambda _, inputs, found=found: found.append(inputs[0]))
        assert recalibrate(model, batches(), run) == 5
        for name, inputs in seen.items():
            norm = getattr(model, name)
            means = torch.stack([values.mean(dim=(0, 2, 3)) for values in inputs])
            variances = torch.stack([values.transpose(0, 1).flatten(1).var(dim=1) for values in inputs])
            torch.testing.assert_close(norm.running_mean, means.mean(dim=0), rtol=0, atol=1e-6)
            torch.testing.assert_close(norm.running_var, variances.mean(dim=0), rtol=0, atol=1e-6)
            assert norm.num_batches_tracked == 5

    def test_the_first_norm_by_hand(self):
        """Two batches of one image of constants: means -1 and 3, no variance."""
        model = nn.Sequential(nn.BatchNorm2d(1)).eval()
        recalibrate(model, [torch.full((1, 1, 2, 2), -1.0), torch.full((1, 1, 2, 2), 3.0)], run)
        assert model[0].running_mean.tolist() == [1.0]
        assert model[0].running_var.tolist() == [0.0]

    def test_nothing_else_changes(self):
        model = Network().double().eval()
        model.first.train()  # as the host freezes layers, the other way round
        before, modes = state_of(model), [module.training for module in model.modules()]
        recalibrate(model, batches(), run)
        assert changed_in(model, before) == {f"{norm}.{name}" for norm in ("first", "second") for name in STATISTICS}
        assert [module.training for module in model.modules()] == modes
        assert model.first.momentum == model.second.momentum == 0.03
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_the_order_of_batches_does_not_matter(self):
        models = [Network().double().eval() for _ in range(2)]
        recalibrate(models[0], batches(), run)
        recalibrate(models[1], batches()[::-1], run)
        for name, value in models[0].state_dict().items():
            torch.testing.assert_close(value, models[1].state_dict()[name], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        ("given", "said"),
        [([], "no batch"), ([batches()[0], torch.full((1, 3, 6, 6), float("nan"), dtype=torch.float64)], "not finite")],
    )
    def test_what_cannot_be_measured_leaves_everything_as_it_was(self, given, said):
        model = Network().double().eval()
        before = state_of(model)
        with pytest.raises(ConfigError, match=said):
            recalibrate(model, given, run)
        assert changed_in(model, before) == set()
        assert model.first.momentum == 0.03


class TestOnTheHostsData:
    @pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
    def test_all_norms_of_all_heads_are_measured(self, tiny_data, name):
        model = lively(name)
        before = state_of(model)
        images = TrainingImages(data=tiny_data, imgsz_px=64, batches=3, batch=4, workers=0)
        assert recalibrate_on(model, images) == 3
        assert {path.rpartition(".")[2] for path in changed_in(model, before)} == set(STATISTICS)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert all(norm.num_batches_tracked == 3 for norm in norms)
        again = lively(name)
        recalibrate_on(again, images)
        assert changed_in(model, state_of(again)) == set()  # the same images in the same order

    def test_images_are_augmented_as_the_model_was_trained(self, tiny_data):
        """Statistics over letterboxed images are not those of training: BCCD fell from 0.62 to 0.56, dense."""
        images = TrainingImages(data=tiny_data, imgsz_px=64, batches=2, batch=4, workers=0)
        model = lively("yolov8n")
        model.args = {
            "mosaic": 0.0,
            "scale": 0.0,
            "translate": 0.0,
            "fliplr": 0.0,
            "hsv_v": 0.0,
            "hsv_h": 0.0,
            "hsv_s": 0.0,
        }
        letterboxed = training_dataset(model, images)
        for at, image in enumerate(augmented_images(model, images)):
            assert torch.equal(image["img"], letterboxed[at]["img"])
        model.args["mosaic"] = 1.0
        mosaics = augmented_images(model, images)
        assert all(not torch.equal(mosaics[at]["img"], letterboxed[at]["img"]) for at in range(len(mosaics)))
        assert {len(mosaics[at]["cls"]) > len(letterboxed[at]["cls"]) for at in range(len(mosaics))} >= {True}

    def test_augmented_images_do_not_depend_on_who_loads_them(self, tiny_data):
        images = TrainingImages(data=tiny_data, imgsz_px=64, batches=2, batch=4, workers=0)
        model = lively("yolov8n")
        dataset = augmented_images(model, images)
        random.seed(5)
        np.random.seed(5)
        before = random.getstate(), np.random.get_state()[1].tolist()
        first = [dataset[at]["img"] for at in range(len(dataset))]
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
        np.random.seed(7)
        other = augmented_images(model, images)
        backwards = [other[at]["img"] for at in reversed(range(len(other)))][::-1]
        assert all(torch.equal(one, two) for one, two in zip(first, backwards, strict=True))
        loaders = [shuffled(dataset, replace(images, workers=workers)) for workers in (0, 2)]
        for one, two in zip(*loaders, strict=True):
            assert torch.equal(one["img"], two["img"])

    def test_mosaics_show_none_of_the_images_that_are_held_out(self, tiny_data, monkeypatch):
        images = TrainingImages(data=tiny_data, imgsz_px=64, batches=2, batch=4, workers=0)
        dataset = augmented_images(lively("yolov8n"), images, [1, 3, 4])
        seen = set()
        load = dataset._dataset.get_image_and_label
        monkeypatch.setattr(dataset._dataset, "get_image_and_label", lambda index: seen.add(index) or load(index))
        assert len([dataset[at] for at in range(len(dataset))]) == 3
        assert seen == {1, 3, 4}

    def test_as_a_flag_of_prune(self, command, dense_checkpoint, data, desk):
        words = [
            "prune",
            f"model={dense_checkpoint}",
            "target_macs=0.5",
            "imgsz=64",
            f"data={data}",
            "workers=0",
            "criterion=l2",
        ]
        assert command(*words, "out=slim.pt", "recalibrate=2", "batch=4", "json=result.json").code == 0
        assert json.loads((desk / "result.json").read_text())["recalibrated_batches"] == 2
        plain = [word for word in words if not word.startswith(("data", "workers"))]
        assert command(*plain, "out=plain.pt").code == 0
        found, expected = (torch.load(desk / name, weights_only=False)["model"] for name in ("slim.pt", "plain.pt"))
        assert {path.rpartition(".")[2] for path in changed_in(found, state_of(expected))} == set(STATISTICS)
        assert [getattr(model, MARKER)["recalibrated"] for model in (found, expected)] == [2, 0]

    def test_images_have_the_side_of_the_plan(self, command, dense_checkpoint, data, desk, monkeypatch):
        """A plan says at which side it was made; `imgsz=` says nothing about it."""
        words = ["prune", f"model={dense_checkpoint}", "out=slim.pt"]
        assert command(*words, "target_macs=0.5", "imgsz=96", "save_plan=plan.json").code == 0
        (desk / "slim.pt").unlink()
        sides: list[int] = []

        def remember(model: nn.Module, images: TrainingImages) -> int:
            sides.append(images.imgsz_px)
            return recalibrate_on(model, images)

        monkeypatch.setattr("yolo_prune.pipeline.prune.recalibrate_on", remember)
        assert command(*words, "plan=plan.json", f"data={data}", "recalibrate=1", "batch=4", "workers=0").code == 0
        assert sides == [96]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["recalibrate=2"], "recalibrate=2 without data="),
            (["recalibrate=-1"], "recalibrate=-1"),
            (["recalibrate=2", "data=data.yaml", "fold=true"], "fold=true together with recalibrate="),
        ],
    )
    def test_bad_input(self, refused, dense_checkpoint, words, said):
        assert said in refused("prune", f"model={dense_checkpoint}", "out=slim.pt", "target_macs=0.5", *words)
