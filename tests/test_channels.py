"""The channel graph against groups, locks, ties and MACs worked out by hand (see `toys`)."""

from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch
from random_plans import random_keep
from torch import nn
from toys import TOYS, Chain, build

from yolo_prune.channels import ChannelGraph, trace
from yolo_prune.errors import PlanError, TraceError
from yolo_prune.surgery import Verifier, apply, counted_macs

SIDE = 8


def graph_of(name: str) -> ChannelGraph:
    return trace(build(name), torch.zeros(1, 3, SIDE, SIDE))


def free(graph: ChannelGraph) -> dict[str, int]:
    return {graph.groups[index].name: graph.groups[index].width for index in graph.free_groups()}


FREE = {
    "Chain": {"a": 4, "b": 6},
    "Residual": {"a": 4, "b": 5},
    "Branches": {"a": 4, "b": 3},
    "Chunked": {"a#1": 4, "a#2": 4, "b": 5},
    "Depthwise": {"a": 4},
    "Grouped": {"a#1": 3, "a#2": 3, "grouped#1": 4, "grouped#2": 4},
    "Resampled": {"a": 4, "up": 6},
    "Padded": {"a": 4},
    "Picked": {"b": 5},
    "PartlyLabelled": {"a": 4},
    "Reduced": {"b": 5},
    "Gated": {"b": 5},
    "Excited": {"a": 4, "squeeze": 3},
    "Normed": {"a": 4},
    "Perceptron": {"a": 4, "hidden": 6},
    "SelfAttention": {"query": 3, "value": 5},
    "Repeated": {"a": 2},
    "Straddling": {"a": 4, "b#1": 3, "b#2": 7},
    "Shared": {"a": 4, "c": 5},
    "Reread": {},
    "GroupedUp": {"a#1": 3, "a#2": 3, "up#1": 2, "up#2": 2},
    "Shifted": {"b": 5},
    "FixedSplit": {},
    "Twin": {"a": 4},
    "Unused": {"b": 5},
}


@pytest.mark.parametrize("name", TOYS)
def test_free_groups_are_the_hand_derived_ones(name: str) -> None:
    assert free(graph_of(name)) == FREE[name]


MACS = {
    "Chain": 64 * (9 * 3 * 4 + 4 * 6 + 6 * 2),
    "Residual": 64 * (3 * 4 + 4 * 5 + 5 * 4 + 4 * 2),
    "Branches": 64 * (3 * 4 + 3 * 3 + 11 * 2),
    "Chunked": 64 * (3 * 8 + 4 * 5 + 9 * 2),
    "Depthwise": 64 * (3 * 4 + 9 * 4 + 9 * 8 + 8 * 2),
    "Grouped": 64 * (3 * 6 + 3 * 8 + 8 * 2),
    "Resampled": 16 * 9 * 3 * 4 + 16 * 4 * 4 * 6 + 6 * 2,
    "Padded": 64 * (3 * 4 + 9 * 4 * 5 + 9 * 5 * 2),
    "Picked": 64 * (3 * 5 + 3 * 5) + 16 * 5 * 2,
    "PartlyLabelled": 64 * (3 * 4 + 3 * 7 + 7 * 2),
    "Reduced": 64 * (3 * 4 + 1 * 5 + 5 * 2),
    "Gated": 64 * (3 * 4 + 4 * 5 + 5 * 2),
    "Excited": 64 * (3 * 4 + 4 * 2) + 4 * 3 + 3 * 4,
    "Normed": 64 * (3 * 4 + 4 * 2),
    "Perceptron": 64 * (3 * 4 + 4 * 6 + 6 * 2),
    "SelfAttention": 64 * (3 * 11 + 5 * 2) + 64 * 64 * (3 + 5),
    "Repeated": 64 * (3 * 2 + 3 * 4 + 4 * 2),
    "Straddling": 64 * (3 * 4 + 3 * 10 + 2 * 7 * 2),
    "Shared": 64 * (3 * 4 + 2 * 4 * 4 + 2 * 4 * 5 + 5 * 2),
    "Reread": 64 * (3 * 4 + 4 * 2),
    "GroupedUp": 64 * 3 * 6 + 64 * 4 * 6 * 2 + 256 * 4 * 4 + 1024 * 4 * 2,
    "Shifted": 64 * (3 * 4 + 4 * 5 + 5 * 2),
    "FixedSplit": 64 * (3 * 8 + 5 * 2),
    "Twin": 64 * (3 * 4 + 4 * 2),  # inference only
    "Unused": 64 * (3 * 4 + 4 * 5 + 5 * 2),
}


@pytest.mark.parametrize("name", TOYS)
def test_macs_and_parameters_are_the_hand_derived_ones(name: str) -> None:
    model, graph = build(name), graph_of(name)
    assert int(graph.cost.macs(graph.widths())) == MACS[name]
    assert int(graph.cost.params(graph.widths())) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", TOYS)
def test_macs_at_another_image_size_are_what_is_counted_there(name: str) -> None:
    model, graph = build(name), graph_of(name)
    counted = counted_macs(model, torch.zeros(1, 3, 4 * SIDE, 4 * SIDE))
    assert int(graph.cost.macs(graph.widths(), imgsz_px=4 * SIDE)) == counted


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", TOYS)
def test_silenced_equals_sliced(name: str, seed: int) -> None:
    model = build(name, seed=seed)
    graph = trace(model, torch.zeros(1, 3, SIDE, SIDE))
    keep = random_keep(graph, seed)
    slim = apply(model, graph, keep)
    proof = Verifier(model, graph).verify(slim, keep).require()
    assert proof.max_abs_error <= 1e-12


def test_locks_name_their_reason() -> None:
    reasons = {name: {group.lock for group in graph_of(name).groups} for name in ("Gated", "Shifted", "FixedSplit")}
    assert any("carry a constant into b" in reason for reason in reasons["Gated"])
    assert any("carry a constant into b" in reason for reason in reasons["Shifted"])
    assert any("split with fixed sizes" in reason for reason in reasons["FixedSplit"])
    assert all(any("model's output" in reason for reason in found) for found in reasons.values())


def test_operators_without_a_rule_and_untraced_parameters_are_reported() -> None:
    class Flipped(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cumsum(super().forward(x), 1)

    graph = trace(Flipped(nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, SIDE, SIDE))
    assert graph.report.operators_without_rule == {"aten.cumsum": 1}  # training makes the same call
    assert graph_of("Unused").report.untraced_parameters == ("idle.spare.weight",)
    locked = [group for group in graph_of("Unused").groups if group.name == "idle.a"]
    assert "idle.spare.weight was never traced" in locked[0].lock


def test_shortcut_joins_the_filters_of_every_producer() -> None:
    graph = graph_of("Residual")
    group = graph.groups[graph.group_names()["a"]]
    assert set(group.axes) == {("a.weight", 0), ("c.weight", 0), ("b.weight", 1), ("out.weight", 1)}


def test_a_channel_read_twice_costs_twice() -> None:
    graph = graph_of("Branches")
    fewer = graph.widths()
    fewer[graph.group_names()["a"]] -= 1
    assert int(graph.cost.macs(graph.widths()) - graph.cost.macs(fewer)) == SIDE * SIDE * (3 + 2 * 2)


def test_chunk_breaks_no_pruning() -> None:
    """C2f's complaint (ultralytics#14171) on its smallest form: halves lose equal counts, each its own channels."""
    graph = graph_of("Chunked")
    (tie,) = graph.ties
    halves = [graph.groups[index] for part in tie.sets for index, _ in part]
    keep = np.ones(graph.channel_count, dtype=bool)
    keep[halves[0].channels[0]] = False
    with pytest.raises(PlanError, match="tie at equal split"):
        graph.check_keep(keep)
    keep[halves[1].channels[3]] = False
    graph.check_keep(keep)


def test_check_keep_refuses_locked_and_emptied_groups() -> None:
    graph = graph_of("Chain")
    for name, message in (("out", "locked"), ("a", "every channel")):
        keep = np.ones(graph.channel_count, dtype=bool)
        keep[graph.groups[graph.group_names()[name]].channels] = False
        with pytest.raises(PlanError, match=message):
            graph.check_keep(keep)
    with pytest.raises(PlanError, match="type int64"):
        graph.check_keep(np.ones(graph.channel_count, dtype=np.int64))
    with pytest.raises(PlanError, match="shape"):
        graph.check_keep(np.ones(3, dtype=bool))


@pytest.mark.parametrize("training", [True, False])
def test_a_trace_leaves_every_bit_as_it_was(training: bool) -> None:
    model = build("Chain").train(training)
    model.cache = torch.ones(1)  # heads cache anchors in plain attributes
    before = copy.deepcopy(model.state_dict())
    trace(model, torch.rand(1, 3, SIDE, SIDE))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_trace_holds_no_activation_that_the_forward_let_go() -> None:
    """Held until the end, they took more memory than the graph."""

    most = [0]

    class Deep(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen: list[weakref.ref[torch.Tensor]] = []
            for layer in self:
                x = layer(x)
                seen.append(weakref.ref(x))
                most[0] = max(most[0], sum(value() is not None for value in seen))
            return x

    trace(Deep(*(nn.Conv2d(3, 3, 1) for _ in range(20))), torch.zeros(1, 3, 8, 8))
    assert most == [1]


def test_apply_leaves_the_dense_model_alone_and_rereads_sizes() -> None:
    model = build("Depthwise")
    before = copy.deepcopy(model.state_dict())
    graph = trace(model, torch.zeros(1, 3, SIDE, SIDE))
    keep = np.ones(graph.channel_count, dtype=bool)
    keep[graph.groups[graph.group_names()["a"]].channels[[0, 2]]] = False
    slim = apply(model, graph, keep)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    depth, multiplied = slim.depth, slim.multiplied
    assert (depth.in_channels, depth.out_channels, depth.groups) == (2, 2, 2)
    assert (multiplied.in_channels, multiplied.out_channels, multiplied.groups) == (2, 4, 2)
    assert torch.equal(multiplied.weight, model.multiplied.weight[[2, 3, 6, 7]])


def test_groups_do_not_depend_on_the_image_size() -> None:
    small, large = (trace(build("Chunked"), torch.zeros(1, 3, side, side)) for side in (SIDE, 4 * SIDE))
    assert [(group.name, group.width, group.lock) for group in small.groups] == [
        (group.name, group.width, group.lock) for group in large.groups
    ]


def test_a_forward_that_fails_is_a_clear_error() -> None:
    with pytest.raises(TraceError, match="forward failed"):
        trace(Chain(), torch.zeros(1, 5, SIDE, SIDE))


class Hidden(nn.Module):
    """Returns its output in an object that only it knows."""

    class Box:
        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()

    def forward(self, x: torch.Tensor) -> Box:
        return self.Box(self.chain(x))


def test_outputs_that_cannot_be_looked_into_are_a_clear_error() -> None:
    with pytest.raises(TraceError, match="returns a Box"):
        trace(Hidden(), torch.zeros(1, 3, SIDE, SIDE))


def test_integer_buffers_are_indices_not_channels() -> None:
    graph = graph_of("Picked")
    assert ("order", 0) not in graph.axes
    locks = [group.lock for group in graph.groups if group.name.partition("#")[0] == "a"]
    assert locks
    assert all("picked by position" in lock for lock in locks)


def test_unrelated_modules_stay_traceable_after_a_failure() -> None:
    broken = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(5, 2, 1))
    with pytest.raises(TraceError):
        trace(broken, torch.zeros(1, 3, SIDE, SIDE))
    assert free(graph_of("Chain")) == FREE["Chain"]
