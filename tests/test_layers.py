"""How much of which layer goes: ratios that a person writes down, and drops that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from models import lively
from toys import build

from yolo_prune.allocation import Allocation, Budget, Constraints, allocate
from yolo_prune.allocation.layers import layer_ratios
from yolo_prune.allocation.paths import DropCurve, EqualDrop
from yolo_prune.channels import ChannelGraph, trace
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.ultralytics.surgery import trace_model

LOOSE = Constraints(min_channels=1, round_to=1)


def toy(name: str) -> ChannelGraph:
    return trace(build(name), torch.zeros(1, 3, 8, 8))


def kept(graph: ChannelGraph, allocation: Allocation, budget: Budget | None = None) -> dict[str, int]:
    keep = allocate(graph, np.arange(graph.channel_count, dtype=float), budget, allocation)
    return {group.name: int(keep[group.channels].sum()) for group in graph.groups if group.name != "a:input"}


class TestRatios:
    def test_by_hand(self):
        """Chain: a of 4, b of 6."""
        graph = toy("Chain")
        assert kept(graph, Allocation(constraints=LOOSE, ratios={"a": 0.25, "b": 0.5})) == {"a": 3, "b": 3, "out": 2}
        assert kept(graph, Allocation(constraints=LOOSE, ratios={"b": 0.5})) == {"a": 4, "b": 3, "out": 2}

    def test_any_producer_of_a_shortcut_names_the_group(self):
        graph = toy("Residual")
        for name in ("a", "c"):
            assert kept(graph, Allocation(constraints=LOOSE, ratios={name: 0.5}))["a"] == 2

    def test_the_last_pattern_counts_and_a_path_means_all_below_it(self):
        graph = trace_model(lively("yolov8n"))
        names = graph.group_names()
        ratios = layer_ratios(graph, {"*": 0.3, "model.2": 0.5, "model.2.cv2": 0.0})
        free = np.array([not group.lock for group in graph.groups])
        assert (ratios[~free] == 0.0).all()
        assert ratios[names["model.0.conv"]] == 0.3
        below = [index for name, index in names.items() if name.startswith("model.2.") and free[index]]
        assert {ratios[index] for index in below} == {0.5, 0.0}
        assert ratios[names["model.2.cv2.conv"]] == 0.0

    def test_with_a_budget_they_are_proportions_and_the_others_stay_whole(self):
        graph = trace_model(lively("yolov8n"))
        allocation = Allocation(ratios={"model.[4-9]": 0.2, "model.12": 0.4})
        widths = kept(graph, allocation, Budget(unit="macs", ratio=0.85))
        gone = {
            group.name: (1.0 - widths[group.name] / group.width, int(group.name.split(".")[1]))
            for group in graph.groups
            if not group.lock
        }
        assert all(share == 0.0 for share, layer in gone.values() if layer in {0, 1, 2, 15, 18, 21})
        little = [share for share, layer in gone.values() if 4 <= layer <= 9]
        much = [share for share, layer in gone.values() if layer == 12]
        assert np.median(much) == pytest.approx(2.0 * np.median(little), abs=0.13)  # multiples of 8 of 64 channels
        assert np.median(little) > 0.0

    @pytest.mark.parametrize(
        ("ratios", "said"),
        [
            ({"a": 1.0}, "ratio 1.0 of 'a'"),
            ({"a": "half"}, "ratio 'half' of 'a'"),
            ({"a": True}, "ratio True of 'a'"),
            ({"aa": 0.5}, "no layer matches 'aa'"),
            ({"out": 0.5}, "nothing of 'out' may go"),
        ],
    )
    def test_bad_input(self, ratios, said):
        with pytest.raises(ConfigError, match=said):
            layer_ratios(toy("Chain"), ratios)

    def test_neither_ratios_nor_a_budget(self):
        with pytest.raises(ConfigError, match="neither a budget nor ratios"):
            kept(toy("Chain"), Allocation())


class TestEqualDrop:
    def test_by_hand(self):
        """Where b loses .1 at a half and a at a quarter, the step that costs .1 takes a quarter of a and half of b."""
        graph = toy("Chain")
        drops = {"a": DropCurve(removed=(0.25,), drops=(0.1,)), "b": DropCurve(removed=(0.5,), drops=(0.1,))}
        path = EqualDrop(graph, drops)
        wishes = np.array([path.wish(step) for step in range(path.steps + 1)])
        nearest = wishes[np.abs(wishes[:, graph.group_names()["a"]] - 3.0).argmin()]
        assert nearest[graph.group_names()["b"]] == pytest.approx(3.0, abs=0.02)

    def test_from_everything_to_nothing_and_never_back(self):
        graph = trace_model(lively("yolov8n"))
        generator = np.random.default_rng(0)
        drops = {
            group.name: DropCurve(removed=(0.25, 0.5, 0.75), drops=tuple(generator.normal(0.02, 0.05, 3).tolist()))
            for group in graph.groups[::2]
        }
        path = EqualDrop(graph, drops)
        wishes = np.array([path.wish(step) for step in range(0, path.steps + 1, 50)])
        np.testing.assert_allclose(wishes[0], graph.widths())
        np.testing.assert_allclose(wishes[-1], 0.0, atol=1e-9)
        assert (np.diff(wishes, axis=0) <= 1e-9).all()

    def test_what_costs_nothing_goes_before_what_costs_much(self):
        graph = trace_model(lively("yolov8n"))
        cheap = "model.6.m.0.cv1.conv"
        drops = {
            group.name: DropCurve(removed=(0.5,), drops=(0.0 if group.name == cheap else 0.2,))
            for group in graph.groups
            if not group.lock
        }
        widths = kept(graph, Allocation(drops=drops), Budget(unit="macs", ratio=0.9))
        index = graph.group_names()[cheap]
        assert widths[cheap] == graph.groups[index].width // 2
        assert widths[cheap] / graph.groups[index].width == min(
            widths[group.name] / group.width for group in graph.groups
        )


def file_of(desk: Path, content: object) -> str:
    path = desk / "layers.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


class TestAsFlags:
    def test_ratios_alone_and_with_a_target(self, command, dense, desk):
        words = ["prune", f"model={dense}", f"ratios={file_of(desk, {'model.4': 0.5, 'model.6': 0.25})}"]
        assert command(*words, "out=a.pt", "json=a.json").code == 0
        plan = json.loads((desk / "a.json").read_text())["plan"]
        assert plan["choice"]["ratios"] == {"model.4": 0.5, "model.6": 0.25}
        assert plan["choice"]["allocation"] == "ratios"
        assert command(*words, "out=b.pt", "json=b.json", "target_macs=0.8").code == 0
        costs = json.loads((desk / "b.json").read_text())["plan"]
        assert 0.78 <= costs["after"]["macs"] / costs["before"]["macs"] <= 0.8

    @pytest.mark.parametrize(
        ("content", "more", "said"),
        [
            ("[1, 2]", (), "holds list"),
            ("", (), "holds NoneType"),
            ("a: [", (), "cannot read"),
            ({"model.4": 2}, (), "ratio 2 of 'model.4'"),
            ({"model.44": 0.5}, (), "no layer matches 'model.44'"),
            ({"model.4": 0.5}, ("allocation=uniform",), "allocation=uniform together with ratios="),
            ({"model.4": 0.5}, ("sensitivity=s.json",), "ratios= together with sensitivity="),
            ({"model.4": 0.5}, ("plan=p.json",), "plan= together with ratios="),
        ],
    )
    def test_bad_ratios(self, refused, dense, desk, content, more, said):
        assert said in refused("prune", f"model={dense}", "out=s.pt", f"ratios={file_of(desk, content)}", *more)

    @pytest.mark.parametrize(
        ("drops", "said"),
        [
            (None, "cannot read"),
            ({"a": {"removed": [0.5]}}, "cannot read"),
            ({"a": {"removed": [0.5, 0.2], "drops": [0.1, 0.2]}}, "cannot read"),
            ({"a": {"removed": [0.5], "drops": [0.1, 0.2]}}, "cannot read"),
            ({"a": {"removed": [0.5], "drops": ["much"]}}, "cannot read"),
            ({}, "measured on another checkpoint"),
        ],
    )
    def test_bad_sensitivity(self, refused, dense, desk, drops, said):
        path = file_of(desk, json.dumps({"source_sha256": "0" * 8, "criterion": "l2", "dense": 0.5, "drops": drops}))
        assert said in refused("prune", f"model={dense}", "out=s.pt", "target_macs=0.5", f"sensitivity={path}")
