"""The solver: wishes become widths that satisfy ties, floors and multiples together, always the same, or a refusal."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import lively
from toys import build

from yolo_prune.allocation import Allocation, Budget, Constraints, WidthSolver, allocate
from yolo_prune.allocation.coupled import Coupled
from yolo_prune.allocation.ladders import Ladder, equations, independent
from yolo_prune.channels import BoolArray, ChannelGraph, Tie, trace
from yolo_prune.errors import ConfigError, InfeasibleTargetError
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, verifier
from yolo_prune.surgery import TOLERANCE

LOOSE = Constraints(min_channels=1, max_fraction=0.99, round_to=1)


@functools.cache
def toy(name: str) -> ChannelGraph:
    return trace(build(name), torch.zeros(1, 3, 8, 8))


@functools.cache
def family(name: str) -> ChannelGraph:
    return trace_model(lively(name))


def mask(graph: ChannelGraph, kept: np.ndarray) -> BoolArray:
    keep = np.ones(graph.channel_count, dtype=bool)
    for group, width in zip(graph.groups, kept, strict=True):
        keep[group.channels[width:]] = False
    return keep


limits = st.builds(
    Constraints,
    min_channels=st.integers(1, 24),
    max_fraction=st.floats(0.0, 0.97),
    round_to=st.sampled_from([1, 2, 4, 8, 16, 3]),
    attention=st.sampled_from(["width", "heads", "none"]),
)
NAMES = ["Chunked", "Grouped", "GroupedUp", "Straddling", "Repeated", "yolo11n", "yolo12n", "yolo26n", "yolov10n"]


@settings(max_examples=60, deadline=None)
@given(limits, st.integers(0, 2**32 - 1), st.sampled_from(NAMES))
def test_every_wish_becomes_a_mask_that_can_be_applied(constraints: Constraints, seed: int, name: str) -> None:
    graph = family(name) if name.startswith("yolo") else toy(name)
    rng = np.random.default_rng(seed)
    wish, scores = graph.widths() * rng.random(len(graph.groups)), rng.random(graph.channel_count)
    kept = WidthSolver(graph, constraints, scores=scores).settle(wish)
    graph.check_keep(mask(graph, kept))  # locks, ties, no empty group but a head's
    assert (kept == WidthSolver(graph, constraints, scores=scores).settle(wish)).all()
    heads = {index for tie in graph.ties if tie.rows for index in tie.members()}
    others = [index for index in range(len(kept)) if index not in heads]
    blocks = np.ones(len(kept), dtype=int)
    for tie in graph.ties:
        blocks[list(tie.members())] = np.maximum(blocks[list(tie.members())], tie.blocks)
    fewest = np.ceil(constraints.min_channels / blocks)
    assert (kept[others] >= np.minimum(fewest, graph.widths())[others]).all()
    gone = graph.widths()[others] - kept[others]
    assert (gone <= graph.widths()[others] * constraints.max_fraction + 1e-6).all()
    for tie in graph.ties:
        if tie.rows and tie.rows == len(tie.sets) and constraints.attention == "heads":
            whole = [all(kept[index] == graph.groups[index].width for index, _ in part) for part in tie.sets]
            assert whole.count(False) <= len(whole) * constraints.max_fraction
    if constraints.attention == "none":
        assert (kept == graph.widths())[list(heads)].all()


def test_wishes_that_can_be_built_are_granted() -> None:
    """a (4) and b#1 (3) together lose as many as b#2 (7): 1 + 2 = 3."""
    graph = toy("Straddling")
    solver, names = WidthSolver(graph, LOOSE), graph.group_names()
    assert any(isinstance(unit, Coupled) for unit in solver.units)
    wish = graph.widths().astype(float)
    wish[[names["a"], names["b#1"], names["b#2"]]] = [3, 1, 4]
    assert solver.settle(wish)[[names["a"], names["b#1"], names["b#2"]]].tolist() == [3, 1, 4]
    wish[names["b#2"]] = 7  # contradicts the tie: the nearest that does not
    kept = solver.settle(wish)
    assert graph.widths()[names["b#2"]] - kept[names["b#2"]] == 7 - kept[names["a"]] - kept[names["b#1"]]


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_independent_numbers_span_what_the_equations_allow(size: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ties = []
    for _ in range(count):
        parts = rng.permutation(size)[: rng.integers(2, size + 1)]
        cut = rng.integers(1, len(parts))
        sets = tuple(tuple((int(i), int(rng.integers(1, 4))) for i in half) for half in (parts[:cut], parts[cut:]))
        ties.append(Tie(sets=sets, where="drawn"))
    matrix = equations(ties, np.arange(size))
    spans = independent(matrix)
    if spans is None:
        return
    assert len(spans) == size - np.linalg.matrix_rank(matrix)
    for span in spans:
        assert not (matrix @ span).any()
        assert (span >= 0).all()
        assert np.gcd.reduce(span) == 1
    assert (sum((span > 0).astype(int) for span in spans) <= 1).all() if spans else True


def test_every_tie_of_the_hosts_blocks_is_a_ladder() -> None:
    """No block of a host needs the integer programme."""
    for name in ("yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"):
        assert all(isinstance(unit, Ladder) for unit in WidthSolver(family(name), Constraints()).units)


def attention_of(name: str) -> tuple[ChannelGraph, Tie]:
    graph = family(name)
    return graph, max(
        (tie for tie in graph.ties if tie.rows), key=lambda tie: sum(n for part in tie.sets for _, n in part)
    )


@pytest.mark.parametrize("name", ["yolo11n", "yolo12n", "yolo26n"])
def test_heads_side_by_side_are_rounded_together(name: str) -> None:
    graph = family(name)
    kept = WidthSolver(graph, Constraints(round_to=8, min_channels=1)).settle(graph.widths() * 0.6)
    narrowed = 0
    for tie in graph.ties:
        for index in tie.members() if tie.rows else ():
            assert kept[index] * tie.rows % 8 == 0
            narrowed += kept[index] < graph.groups[index].width
    assert narrowed


@pytest.mark.parametrize("name", ["yolo11n", "yolo12n", "yolo26n", "yolov10n"])
def test_whole_heads_go_the_least_important_first(name: str) -> None:
    model = lively(name)
    graph, heads = attention_of(name)
    scores = np.ones(graph.channel_count)
    weakest = heads.sets[1]
    for index, _ in weakest:
        scores[graph.groups[index].channels] = 0.1
    solver = WidthSolver(graph, Constraints(attention="heads", round_to=1, min_channels=1), scores=scores)
    kept = solver.settle(graph.widths() * 0.55)  # of two heads, one goes
    assert all(kept[index] == 0 for index, _ in weakest)
    left = [part for part in heads.sets if all(kept[index] == graph.groups[index].width for index, _ in part)]
    gone = [part for part in heads.sets if all(kept[index] == 0 for index, _ in part)]
    assert left
    assert len(left) + len(gone) == len(heads.sets)
    keep = mask(graph, kept)
    slim = slim_copy(model, graph, keep)
    assert verifier(model, graph).verify(slim, keep).require().max_abs_error <= TOLERANCE
    found, dense = (
        [module.num_heads for module in net.modules() if hasattr(module, "num_heads")] for net in (slim, model)
    )
    assert sum(found) < sum(dense)
    assert all(1 <= slim_heads <= dense_heads for slim_heads, dense_heads in zip(found, dense, strict=True))


def test_keys_and_values_of_attention_get_widths_of_their_own() -> None:
    model, graph = lively("yolo11n"), family("yolo11n")
    keep = mask(graph, WidthSolver(graph, LOOSE).settle(graph.widths() * np.linspace(0.3, 0.9, len(graph.groups))))
    slim = slim_copy(model, graph, keep)
    path = "model.10.m.0.attn"
    before, after = model.get_submodule(path), slim.get_submodule(path)
    assert after.key_dim < before.key_dim
    assert after.head_dim < before.head_dim
    assert after.head_dim * after.num_heads == after.qkv.conv.in_channels == after.proj.conv.in_channels
    assert after.scale == after.key_dim**-0.5  # as the host computes it; the queries grew by the difference
    rows = torch.from_numpy(keep[graph.axes[f"{path}.qkv.bn.weight", 0].channels])
    kept = before.qkv.bn.weight[rows][: after.key_dim]
    assert torch.allclose(after.qkv.bn.weight[: after.key_dim], kept * (after.key_dim / before.key_dim) ** 0.5)


def test_a_target_that_ties_and_floors_forbid_is_refused_with_the_smallest_one() -> None:
    graph = family("yolo11n")
    plan = Allocation(constraints=Constraints(min_channels=64, round_to=32))
    with pytest.raises(InfeasibleTargetError, match="cannot be reached within the floors") as error:
        allocate(graph, np.ones(graph.channel_count), Budget(unit="macs", ratio=0.05), plan)
    assert "the smallest that min_channels, max_fraction and round_to allow" in str(error.value)


def test_an_unknown_way_with_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="attention=half"):
        Constraints(attention="half")


def test_floors_and_multiples_of_a_grouped_convolution_count_over_its_groups() -> None:
    """32 groups of 4 channels each, as in a ResNeXt: no group alone could keep 8, or a multiple of 8."""
    torch.manual_seed(0)
    grouped = torch.nn.Conv2d(128, 128, 3, padding=1, groups=32)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 128, 1), grouped, torch.nn.Conv2d(128, 2, 1))
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    solver = WidthSolver(graph, Constraints(min_channels=8, max_fraction=0.9, round_to=8))
    for share, each in ((0.0, 1), (0.3, 1), (0.5, 2), (0.8, 3), (1.0, 4)):
        kept = solver.settle(graph.widths() * share)
        widths = {graph.groups[index].name.partition("#")[0]: 0 for index in graph.free_groups()}
        for index in graph.free_groups():
            widths[graph.groups[index].name.partition("#")[0]] += int(kept[index])
        assert widths == {"0": 32 * each, "1": 32 * each}
