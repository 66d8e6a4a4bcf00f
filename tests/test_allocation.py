"""Allocation: budgets are met, floors, ties and multiples hold, and wishes are settled monotonically."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SMALL, lively
from toys import build

from yolo_prune.allocation import PATHS, Allocation, Budget, Constraints, WidthSolver, allocate
from yolo_prune.allocation.budget import lowest_go
from yolo_prune.allocation.knapsack import Knapsack
from yolo_prune.allocation.threshold import GlobalThreshold
from yolo_prune.channels import ChannelGraph, trace
from yolo_prune.errors import ConfigError, InfeasibleTargetError
from yolo_prune.hosts.ultralytics.surgery import trace_model


@functools.cache
def family(name: str) -> ChannelGraph:
    return trace_model(lively(name))


def random_scores(graph: ChannelGraph, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(graph.channel_count)


constraints = st.builds(
    Constraints,
    min_channels=st.integers(1, 40),
    max_fraction=st.floats(0.0, 0.97),
    round_to=st.sampled_from([1, 2, 4, 8, 16, 32]),
)


@settings(max_examples=40, deadline=None)
@given(constraints, st.integers(0, 2**32 - 1), st.sampled_from(["yolov8n", "yolov9t", "yolo11n"]))
def test_settled_widths_respect_everything(limits: Constraints, seed: int, name: str) -> None:
    graph = family(name)
    solver, widths = WidthSolver(graph, limits), graph.widths()
    wish = widths * np.random.default_rng(seed).random(len(widths))
    kept = solver.settle(wish)
    assert (kept <= widths).all()
    assert (kept >= np.minimum(limits.min_channels, widths)).all()
    assert (widths - kept <= widths * limits.max_fraction + 1e-6).all()
    side_by_side = np.ones(len(widths), dtype=int)  # heads lie in one layer: their sum is rounded
    for tie in graph.ties:
        side_by_side[list(tie.members())] = np.maximum(side_by_side[list(tie.members())], tie.rows)
    assert ((kept * side_by_side % limits.round_to == 0) | (kept == widths)).all()
    assert all(kept[i] == group.width for i, group in enumerate(graph.groups) if group.lock)
    for tie in graph.ties:
        assert len(set(tie.entries(widths - kept))) == 1
    assert (solver.settle(wish * 0.7) <= kept).all()  # monotone, or bisection would be a lottery


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 0.95), st.sampled_from(list(PATHS)), st.sampled_from(["macs", "params"]), st.sampled_from([1, 8]))
def test_budgets_are_met_and_used(ratio: float, path: str, unit: str, round_to: int) -> None:
    graph = family("yolov8n")
    budget = Budget(unit=unit, ratio=ratio)
    plan = Allocation(path=path, constraints=Constraints(round_to=round_to))
    keep = allocate(graph, random_scores(graph), budget, plan)
    graph.check_keep(keep)
    reached = budget.cost(graph, graph.kept_widths(keep)) / budget.cost(graph, graph.widths())
    assert ratio - (0.02 if round_to == 1 else 0.06) <= reached <= ratio


@pytest.mark.parametrize("name", SMALL)
def test_half_the_macs_is_reached_closely_on_every_family(name: str) -> None:
    graph = family(name)
    budget = Budget(unit="macs", ratio=0.5)
    keep = allocate(graph, random_scores(graph), budget, Allocation())
    assert 0.485 <= budget.cost(graph, graph.kept_widths(keep)) / budget.cost(graph, graph.widths()) <= 0.5


def test_the_lowest_scores_of_each_group_go() -> None:
    graph = family("yolov8n")
    scores = random_scores(graph, 1)
    keep = allocate(graph, scores, Budget(unit="macs", ratio=0.5), Allocation())
    for group in graph.groups:
        kept, removed = (scores[group.channels[mask]] for mask in (keep[group.channels], ~keep[group.channels]))
        if len(removed):
            assert removed.max() <= kept.min()


def test_global_takes_from_where_scores_are_low() -> None:
    graph = trace(build("Chain"), torch.zeros(1, 3, 8, 8))
    scores = np.ones(graph.channel_count)
    a, b = (graph.groups[graph.group_names()[name]].channels for name in "ab")
    scores[b] = [6, 5, 0.1, 0.2, 4, 3]
    limits = Constraints(min_channels=1, round_to=1)
    keep = allocate(graph, scores, Budget(unit="params", ratio=0.93), Allocation(path="global", constraints=limits))
    assert keep[a].all()
    assert keep[b].tolist() == [True, True, False, False, True, True]  # 152 parameters, 6 a channel of b: two go


def halves() -> tuple[ChannelGraph, list[np.ndarray]]:
    """A graph with a C2f, and the channels of its tied halves and of a group that is tied to none."""
    graph = family("yolov8n")
    names = graph.group_names()
    return graph, [graph.groups[names[f"model.6.{name}"]].channels for name in ("cv1.conv#1", "cv1.conv#2", "cv2.conv")]


def test_dead_channels_go_before_good_ones_that_are_tied_to_dead_ones() -> None:
    """One half of a C2f is dead, the other is good. Ranked singly, the halves would meet at half of both."""
    graph, (dead, good, other) = halves()
    scores = np.full(graph.channel_count, 10.0)
    scores[dead], scores[good], scores[other] = 0.0, 1.0, 0.4
    limits = Constraints(min_channels=8, round_to=8)
    path = GlobalThreshold(graph, scores, WidthSolver(graph, limits, scores=scores))
    groups = [next(index for index, group in enumerate(graph.groups) if group.channels is one) for one in (dead, good)]
    first = graph.widths() - path.wish(1)
    assert first[groups].tolist() == [0.0, 0.0]  # the pair costs 0.5 a channel, the other group 0.4
    scores[other] = 0.6
    path = GlobalThreshold(graph, scores, WidthSolver(graph, limits, scores=scores))
    first = graph.widths() - path.wish(1)
    assert first[groups].tolist() == [8.0, 8.0]
    assert first.sum() == 16.0


def test_of_equal_scores_only_dead_channels_go_while_there_are_any() -> None:
    """Half of every group is dead: 30% fewer MACs need none of the others."""
    graph = family("yolov8n")
    scores = np.ones(graph.channel_count)
    for group in graph.groups:
        scores[group.channels[::2]] = 0.0
    keep = allocate(graph, scores, Budget(unit="macs", ratio=0.7), Allocation())
    assert scores[~keep].max() == 0.0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["yolov8n", "yolov9t", "yolo11n"]), st.sampled_from([1, 8]))
def test_each_step_of_the_threshold_can_be_built_and_scores_rise(seed: int, name: str, round_to: int) -> None:
    graph, scores = family(name), random_scores(family(name), seed)
    solver = WidthSolver(graph, Constraints(round_to=round_to), scores=scores)
    path = GlobalThreshold(graph, scores, solver)
    places = np.unique(np.linspace(0, path.steps, 12).astype(int))
    widths = [path.wish(step) for step in places]
    assert all((solver.settle(one) == one).all() for one in widths)
    assert all((later <= before).all() for before, later in itertools.pairwise(widths))
    assert (widths[0] == graph.widths()).all()
    assert (widths[-1] == solver.smallest()).all()
    lost = [scores[~lowest_go(graph, scores, one.astype(int))].sum() for one in widths]
    gone = [(graph.widths() - one).sum() for one in widths]
    means = np.diff(lost) / np.diff(gone)
    assert (np.diff(means) >= -1e-9).all()


def test_without_ties_floors_and_multiples_it_is_the_papers_one_threshold() -> None:
    graph = trace(build("Chain"), torch.zeros(1, 3, 8, 8))
    scores = random_scores(graph, 3)
    limits = Constraints(min_channels=1, max_fraction=0.97, round_to=1)
    path = GlobalThreshold(graph, scores, WidthSolver(graph, limits, scores=scores))
    free = np.concatenate([graph.groups[index].channels for index in graph.free_groups()])
    for step in range(path.steps + 1):
        kept = lowest_go(graph, scores, path.wish(step).astype(int))
        lowest = np.sort(scores[free])[:step]
        if min(path.wish(step)[graph.free_groups()]) > 1:  # of each, one stays
            assert set(scores[~kept]) == set(lowest)


def test_uniform_takes_the_same_fraction_everywhere() -> None:
    graph = family("yolov8n")
    plan = Allocation(path="uniform", constraints=Constraints(min_channels=1, round_to=1, max_fraction=0.99))
    keep = allocate(graph, random_scores(graph), Budget(unit="macs", ratio=0.5), plan)
    free = graph.free_groups()
    fractions = (graph.kept_widths(keep) / graph.widths())[free]
    assert fractions.max() - fractions.min() < 0.05


@pytest.mark.parametrize(
    ("score_of_a", "order"),
    [(30.0, ["a", "a", "a", "b"]), (40.0, ["b", "b", "b", "b"])],
)
def test_the_knapsack_by_hand(score_of_a: float, order: list[str]) -> None:
    """Chain costs 64 * (27 a + a b + 2 b): at 4 and 6, one of a saves 33, one of b, which scores 6, saves 6.

    30 / 33 is less than 6 / 6, and stays so as b's price falls with a. 40 / 33 is more, and grows as b goes.
    """
    graph = trace(build("Chain"), torch.zeros(1, 3, 8, 8))
    names, scores = graph.group_names(), np.ones(graph.channel_count)
    scores[graph.groups[names["a"]].channels], scores[graph.groups[names["b"]].channels] = score_of_a, 6.0
    solver = WidthSolver(graph, Constraints(min_channels=1, round_to=1))
    path = Knapsack(graph, scores, solver, graph.cost.macs)
    falls = -np.diff([path.wish(step) for step in range(path.steps + 1)], axis=0)
    found = [next(name for name, index in names.items() if fall[index]) for fall in falls]
    assert found[:4] == order
    assert path.steps == 8  # 3 of a and 5 of b may go


def test_the_knapsack_looks_behind_states_that_save_nothing() -> None:
    """Where widths cost as if padded to fours, one channel less of six saves nothing, and two save four."""
    graph = trace(build("Chain"), torch.zeros(1, 3, 8, 8))
    names, scores = graph.group_names(), np.ones(graph.channel_count)
    scores[graph.groups[names["a"]].channels] = 1000.0

    def costs(kept: np.ndarray) -> np.ndarray:
        return graph.cost.macs(np.ceil(kept / 4) * 4)

    path = Knapsack(graph, scores, WidthSolver(graph, Constraints(min_channels=1, round_to=1)), costs)
    assert path.wish(1)[names["b"]] == 4
    assert path.wish(path.steps)[[names["a"], names["b"]]].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_the_knapsack_keeps_more_importance_than_the_others(name: str, unit: str) -> None:
    graph = family(name)
    layers = np.random.default_rng(1).lognormal(sigma=1.0, size=len(graph.groups))
    scores = random_scores(graph)
    for group, factor in zip(graph.groups, layers, strict=True):
        scores[group.channels] *= factor
    budget = Budget(unit=unit, ratio=0.5)  # type: ignore[arg-type]
    kept = {path: scores[allocate(graph, scores, budget, Allocation(path=path))].sum() for path in PATHS}
    assert max(kept, key=kept.__getitem__) == "knapsack"


def test_plans_are_deterministic() -> None:
    graph = family("yolo11n")
    scores = np.zeros(graph.channel_count)  # every score equal: only the rule for equals decides
    masks = [allocate(graph, scores, Budget(unit="macs", ratio=0.6), Allocation()) for _ in range(2)]
    assert (masks[0] == masks[1]).all()


def test_channels_that_no_criterion_scored_stay() -> None:
    graph = trace(build("Chain"), torch.zeros(1, 3, 8, 8))
    scores = np.ones(graph.channel_count)
    group = graph.groups[graph.group_names()["b"]].channels
    scores[group] = np.inf
    limits = Constraints(min_channels=1, round_to=1)
    for path in PATHS:
        keep = allocate(graph, scores, Budget(unit="macs", ratio=0.6), Allocation(path=path, constraints=limits))
        assert keep[group].all()


def test_an_impossible_target_names_the_smallest_reachable_one() -> None:
    graph = family("yolov8n")
    plan = Allocation(constraints=Constraints(max_fraction=0.3))
    with pytest.raises(InfeasibleTargetError, match="at least 0") as raised:
        allocate(graph, random_scores(graph), Budget(unit="macs", ratio=0.1), plan)
    reachable = float(raised.value.expected.split()[2].rstrip(","))
    allocate(graph, random_scores(graph), Budget(unit="macs", ratio=reachable), plan)
    with pytest.raises(InfeasibleTargetError):
        allocate(graph, random_scores(graph), Budget(unit="macs", ratio=reachable - 2e-4), plan)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.2, -0.5, float("nan"), "half"])
def test_targets_outside_zero_and_one_are_refused(ratio) -> None:
    with pytest.raises(ConfigError, match="target_macs"):
        Budget(unit="macs", ratio=ratio)


@pytest.mark.parametrize("wrong", [{"min_channels": 0}, {"max_fraction": 1.0}, {"max_fraction": -0.1}, {"round_to": 0}])
def test_wrong_constraints_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Constraints(**wrong)
