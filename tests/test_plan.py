"""Plans: JSON round trips, and refusals of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_plans import random_keep
from toys import TOYS, build

from yolo_prune.channels import trace
from yolo_prune.errors import OutputError, PlanError
from yolo_prune.plan import GroupChoice, PrunePlan, plan_from_keep


def graph_of(name: str = "Chunked"):
    return trace(build(name), torch.zeros(1, 3, 8, 8))


def plan_of(name: str = "Chunked", seed: int = 0) -> PrunePlan:
    graph = graph_of(name)
    choice = {"criterion": "l2", "target_macs": 0.5}
    return plan_from_keep(graph, random_keep(graph, seed), source_sha256="ab" * 32, imgsz_px=8, choice=choice)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TOYS)), st.integers(0, 1000))
def test_json_round_trip_keeps_the_mask(name: str, seed: int) -> None:
    graph, plan = graph_of(name), plan_of(name, seed)
    again = PrunePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert (again.keep_mask(graph) == random_keep(graph, seed)).all()


def test_predicted_costs_are_those_of_the_mask() -> None:
    graph, plan = graph_of("Chain"), plan_of("Chain", 3)
    kept = graph.kept_widths(plan.keep_mask(graph))
    assert plan.before.macs == 64 * 144
    assert plan.after.macs == int(graph.cost.macs(kept, imgsz_px=8))
    assert plan.after.params == int(graph.cost.params(kept))


def test_files_are_written_once_and_read_back(tmp_path: Path) -> None:
    plan = plan_of()
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == plan
    with pytest.raises(OutputError, match="already exists"):
        plan.save(tmp_path / "plan.json")


def test_a_plan_for_another_checkpoint_is_refused() -> None:
    plan = plan_of()
    plan.require_source("ab" * 32)
    with pytest.raises(PlanError, match="belongs to checkpoint abababababab"):
        plan.require_source("cd" * 32)


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match="no such group"):
        plan_of("Chunked").keep_mask(graph_of("Residual"))


def test_a_plan_that_breaks_a_tie_is_refused() -> None:
    value = plan_of().to_json()
    value["groups"] = {"a#1": {"width": 4, "keep": [0, 1]}}
    with pytest.raises(PlanError, match="tie"):
        PrunePlan.from_json(value).keep_mask(graph_of())


@pytest.mark.parametrize("keep", [(1, 0), (0, 0), (-1,), (4,)])
def test_wrong_indices_are_refused(keep: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="kept indices"):
        GroupChoice(width=4, keep=keep)


@pytest.mark.parametrize("change", [{"format": "other/1"}, {"groups": 3}, {"before": {}}, {"imgsz_px": "large"}])
def test_malformed_plans_are_refused(change: dict) -> None:
    with pytest.raises(PlanError):
        PrunePlan.from_json({**plan_of().to_json(), **change})


def test_edited_costs_are_not_believed() -> None:
    value = plan_of().to_json()
    value["after"] = {"macs": 1000, "params": 10}
    with pytest.raises(PlanError, match="claims"):
        PrunePlan.from_json(value).keep_mask(graph_of())


@pytest.mark.parametrize("keep", [[0.9, 1.7], "012", [True], [-1]])
def test_indices_are_not_rounded_or_read_from_text(keep) -> None:
    value = plan_of().to_json()
    value["groups"] = {"a#1": {"width": 4, "keep": keep}}
    with pytest.raises(PlanError):
        PrunePlan.from_json(value)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    for name, text in (("text.json", "not json"), ("list.json", "[1]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(PlanError):
            PrunePlan.load(tmp_path / name)
    with pytest.raises(PlanError, match="cannot read"):
        PrunePlan.load(tmp_path / "absent.json")


def test_only_narrowed_groups_are_written() -> None:
    graph = graph_of()
    plan = plan_from_keep(graph, np.ones(graph.channel_count, bool), source_sha256="x", imgsz_px=8, choice={})
    assert plan.groups == {}
    assert plan.before == plan.after
