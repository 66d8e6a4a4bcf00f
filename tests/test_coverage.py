"""A sample of `tools/sweep_models.py` that meets every block of every yaml; the whole sweep is a tool, run apart."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import sweep_models
import torch
import yaml
from coverage_figures import Coverage, least_plans
from model_cases import Case, all_cases, build_lively
from random_plans import random_keep
from sweep_models import TOLERANCE as ONNX_TOLERANCE
from sweep_models import require_gradients, sweep_model, without_gradient
from torch import nn

from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.errors import VerificationError
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, trace_side
from yolo_prune.surgery import TOLERANCE

CASES = {case.name: case for case in all_cases()}
PLANS = {
    "yolov3-tiny": 3, "yolov3-spp": 1, "yolov5n": 2, "yolov6n": 2, "yolov8n-ghost": 2, "yolov8n-world": 3,
    "yolov8n-pose-p6": 2, "yolov8n-cls-resnet101": 1, "yolov8-mobilenetv3": 2, "yolov9t": 2, "yolov9e-seg": 1,
    "yolov10n": 3, "yolo12n-obb": 3, "yolo12l": 1, "yolov8-resnet18": 2, "yolo26n-obb": 3, "yolo26n-pose": 2,
    "yolo26n-seg": 2, "yoloe-11n": 3, "yoloe-11n-seg": 1, "yoloe-26n-seg": 1, "rtdetr-l": 1,
}  # fmt: skip
"""Plans of each model of the sample; the third takes whole heads of attention."""

FAMILIES_OF_95_PERCENT = ("yolov8n", "yolov8s", "yolo11n", "yolo12n", "yolo26n")


def blocks(case: Case) -> set[str]:
    """Return the blocks that a yaml lists."""
    content = yaml.safe_load(case.yaml.read_text(encoding="utf-8"))
    return {str(layer[2]) for layer in content["backbone"] + content["head"]}


def test_the_sample_meets_every_block() -> None:
    everything = set().union(*(blocks(case) for case in CASES.values()))
    assert everything == set().union(*(blocks(CASES[name]) for name in PLANS))
    assert len(everything) >= 50
    assert len(CASES) >= 200


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_the_laws_hold_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", _refused)  # YOLOE's host code looks for text models on the network
    record = sweep_model(CASES[name], PLANS[name])
    assert record["failure"] == ""
    assert record["plans"] == PLANS[name]
    assert 0.0 < record["max_abs_error"] <= TOLERANCE
    assert record["onnx_max_rel"] is None or 0.0 < record["onnx_max_rel"] <= ONNX_TOLERANCE
    assert 0.4 <= record["prunable_macs"] <= 1.0
    assert record["macs_640"] > 0


def _refused(*_: object) -> None:
    raise OSError("tests stay off the network")


@pytest.mark.parametrize("name", FAMILIES_OF_95_PERCENT)
def test_at_least_95_percent_of_the_macs_can_go(name: str) -> None:
    from yolo_prune.hosts.ultralytics.checkpoints import build_from_yaml
    from yolo_prune.hosts.ultralytics.surgery import trace_model
    from yolo_prune.pipeline.inspect import prunable_macs_share

    graph = trace_model(build_from_yaml(f"{name}.yaml"))
    assert prunable_macs_share(graph, imgsz_px=640) >= 0.95


def test_a_failure_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: str) -> None:
        raise ValueError(f"no {source}\nand more")

    monkeypatch.setattr("sweep_models.build_lively", broken)
    record = sweep_model(CASES["yolov8n"], 2)
    assert record["failure"] == "ValueError: no yolov8n.yaml"
    assert "fails: n" in Coverage(records={"yolov8n": record}).table()


def test_a_gradient_may_be_missing_only_where_the_silenced_model_has_none_either() -> None:
    """Its fifth plan leaves a squeeze of channels that are all below 0, so that a ReLU lets no gradient through."""
    model = build_lively(CASES["yolov8-mobilenetv3"].source)
    graph = trace_model(model)
    keep = random_keep(graph, 4)
    slim = slim_copy(model, graph, keep)
    spared = without_gradient(copy.deepcopy(model), trace_side(model))
    squeeze = {f"model.0.m.1.block.1.{name}.weight" for name in ("fc1", "fc2")}
    assert without_gradient(slim, trace_side(model)) - spared == squeeze
    require_gradients(model, graph, keep, slim, spared=spared)
    slim.model[-1].cv2[0][0].register_forward_hook(lambda _module, _inputs, output: output.detach())
    with pytest.raises(VerificationError, match=r"parameters got no gradient, first 'model\.17\.cv2\.0\.0"):
        require_gradients(model, graph, keep, slim, spared=spared)


class Dropping(nn.Module):
    """A block that a training leaves out at random, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.often = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.always(images)
        return found + self.often(found) if float(torch.rand(())) < 0.5 else found


def test_blocks_that_are_left_out_at_random_are_the_same_ones_on_both_sides() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert len({frozenset(without_gradient(Dropping(), 8)) for _ in range(20)}) == 1
    torch.manual_seed(3)
    assert torch.equal(before, torch.random.get_rng_state())


class TestRecord:
    """What README's coverage table says of all models, held against the case table."""

    @pytest.fixture(scope="class")
    def record(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = json.loads(sweep_models.RECORD.read_text(encoding="utf-8"))
        return found

    def test_is_whole(self, record: dict[str, dict[str, Any]]) -> None:
        assert record.keys() == CASES.keys()
        assert {name: one["failure"] for name, one in record.items() if one["failure"]} == {}
        assert [name for name, case in CASES.items() if record[name]["plans"] < least_plans(case.scale)] == []

    def test_errors_are_rounding(self, record: dict[str, dict[str, Any]]) -> None:
        assert max(one["max_abs_error"] for one in record.values()) <= TOLERANCE
        assert max(one["onnx_max_rel"] or 0.0 for one in record.values()) <= ONNX_TOLERANCE

    def test_nearly_all_of_the_usual_models_can_go(self, record: dict[str, dict[str, Any]]) -> None:
        assert all(record[name]["prunable_macs"] >= 0.95 for name in FAMILIES_OF_95_PERCENT)


def test_more_plans_go_on_from_those_that_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep in several sittings does no plan twice, and ends as one in a single sitting."""
    monkeypatch.setattr("sweep_models.deploy", lambda *_: 1e-7)
    seeds: list[int] = []
    draw = sweep_models.random_keep

    def noted(graph: ChannelGraph, seed: int, **options: bool) -> BoolArray:
        seeds.append(seed)
        return draw(graph, seed, **options)

    monkeypatch.setattr("sweep_models.random_keep", noted)
    first = sweep_model(CASES["yolov8n"], 1)
    both = sweep_model(CASES["yolov8n"], 3, first)
    assert seeds == [0, 1, 2]
    assert (first["plans"], both["plans"], both["wished"]) == (1, 3, 3)
    assert both["failure"] == ""
    assert both["onnx_max_rel"] == 1e-7
    assert both["max_abs_error"] >= first["max_abs_error"]
    assert both["seconds"] >= first["seconds"]
