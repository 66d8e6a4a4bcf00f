"""Criteria: a hand-computed case each, equivariance under permutation, and the reduction over a channel's members."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import build

from yolo_prune.channels import ChannelGraph, trace
from yolo_prune.errors import ConfigError
from yolo_prune.importance import BUILT_IN, Evidence, score_channels
from yolo_prune.importance.chance import seeded
from yolo_prune.importance.evidence import Activations, effective_rank
from yolo_prune.importance.lamp import lamp
from yolo_prune.importance.plugged import CRITERIA

# Four filters of Chain.a, flattened to three numbers each (the rest zero), and four scales.
FILTERS = [[3.0, 4.0, 0.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [0.0, -5.0, 12.0]]
SCALES = [0.5, -2.0, 0.0, 1.0]
GRADIENTS = [[1.0, -2.0, 0.0], [0.0, 3.0, 1.0], [5.0, 5.0, 5.0], [2.0, 0.0, -1.0]]
SCALE_GRADIENTS = [2.0, 0.5, 3.0, 1.0]
EXPECTED = {
    "l1": [7.0, 3.0, 0.0, 17.0],
    "l2": [5.0, 3.0**0.5, 0.0, 13.0],
    "bn_scale": [0.5, 2.0, 0.0, 1.0],
    "fpgm": [  # distances to the others: to b, c and d from a, and so on
        30.0**0.5 + 5.0 + 234.0**0.5,
        30.0**0.5 + 3.0**0.5 + 138.0**0.5,
        5.0 + 3.0**0.5 + 13.0,
        234.0**0.5 + 138.0**0.5 + 13.0,
    ],
    "lamp": [25 / (25 + 169), 3 / (3 + 25 + 169), 0.0, 1.0],
    "taylor": [3 * 1 + 4 * 2, 1 * 3 + 1 * 1, 0.0, 12 * 1],
    "taylor_scale": [(0.5 * 2) ** 2, (2 * 0.5) ** 2, 0.0, 1.0],
    "fisher": [(9 * 1 + 16 * 4) / 2, (9 + 1) / 2, 0.0, 144 / 2],
    "apoz": [0.75, 0.5, 0.0, 1.0],
    "hrank": [2.0, 1.0, 0.0, 3.0],
}


def spread(rows: list[list[float]]) -> torch.Tensor:
    """Three numbers a filter in the middle of 3x3 kernels."""
    weight = torch.zeros(4, 3, 3, 3)
    weight[:, :, 1, 1] = torch.tensor(rows)
    return weight


def four_filters() -> tuple[nn.Module, ChannelGraph]:
    model = build("Chain")
    with torch.no_grad():
        model.a.weight.copy_(spread(FILTERS))
        model.norm.weight.copy_(torch.tensor(SCALES))
    return model, trace(model, torch.zeros(1, 3, 8, 8))


def evidence_of(model: nn.Module, order: list[int] | None = None) -> Evidence:
    """The model's weights, and what is said to have been gathered of its four filters, in another order if asked."""
    order = order or [0, 1, 2, 3]
    gradients = {"a.weight": spread(GRADIENTS).abs()[order], "norm.weight": torch.tensor(SCALE_GRADIENTS)[order]}
    quiet, rank = torch.tensor([0.25, 0.5, 1.0, 0.0])[order], torch.tensor([2.0, 1.0, 0.0, 3.0])[order]
    return Evidence(
        tensors={**dict(model.named_parameters()), **dict(model.named_buffers())},
        gradients=gradients,
        squares={name: value.square() for name, value in gradients.items()},
        activations={("a.weight", 0): Activations(quiet=quiet, rank=rank)},
    )


def scores_of(
    model: nn.Module, graph: ChannelGraph, criterion: str, group: str = "a", order: list[int] | None = None, **options
) -> np.ndarray:
    scores = score_channels(graph, evidence_of(model, order), CRITERIA[criterion], **options)
    return scores[graph.groups[graph.group_names()[group]].channels]


def test_every_criterion_has_a_hand_computed_case() -> None:
    assert set(EXPECTED) | {"random"} == set(BUILT_IN)


@pytest.mark.parametrize("criterion", EXPECTED)
def test_hand_computed_scores(criterion: str) -> None:
    model, graph = four_filters()
    np.testing.assert_allclose(scores_of(model, graph, criterion, normalization="none"), EXPECTED[criterion], rtol=1e-6)


@pytest.mark.parametrize("criterion", EXPECTED)
def test_mean_normalization_divides_by_the_groups_mean(criterion: str) -> None:
    model, graph = four_filters()
    expected = np.array(EXPECTED[criterion])
    found = scores_of(model, graph, criterion, normalization="mean")
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-6)


@pytest.mark.parametrize("criterion", EXPECTED)
def test_permuting_filters_permutes_scores(criterion: str) -> None:
    model, graph = four_filters()
    before = scores_of(model, graph, criterion)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        model.a.weight.copy_(model.a.weight[order])
        model.norm.weight.copy_(model.norm.weight[order])
    found = scores_of(model, graph, criterion, order=order.tolist())
    np.testing.assert_allclose(found, before[order.numpy()], rtol=1e-12)


@pytest.mark.parametrize(("reduction", "combine"), [("sum", np.sum), ("mean", np.mean), ("max", np.max)])
def test_a_shortcut_channel_is_scored_by_all_its_producers(reduction: str, combine) -> None:
    model = build("Residual")
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    producers = [layer.weight.detach().double().flatten(1).norm(dim=1).numpy() for layer in (model.a, model.c)]
    expected = combine(np.stack(producers), axis=0)
    found = scores_of(model, graph, "l2", reduction=reduction, normalization="none")
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_reads_a_channel_counts_if_asked() -> None:
    """Channels of a: its filters, and the columns of b that read them; of the inputs: the columns of a."""
    model, graph = four_filters()
    columns = model.b.weight.detach().double().flatten(2).movedim(1, 0).flatten(1).norm(dim=1).numpy()
    found = scores_of(model, graph, "l2", reduction="sum", normalization="none", consumers=True)
    np.testing.assert_allclose(found, np.array(EXPECTED["l2"]) + columns, rtol=1e-6)
    without = scores_of(model, graph, "l2", reduction="sum", normalization="none")
    np.testing.assert_allclose(without, EXPECTED["l2"], rtol=1e-6)


def test_readers_in_a_grouped_convolution_are_those_of_their_own_group() -> None:
    """a (6) is read by `grouped` in two groups: channel 4 is entry 1 of the second half of its filters."""
    model = build("Grouped")
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    reader = model.grouped.weight.detach().double()
    halves = [block.movedim(1, 0).flatten(1).abs().sum(dim=1) for block in reader.chunk(2)]
    scores = score_channels(
        graph, Evidence.of(model), CRITERIA["l1"], reduction="sum", normalization="none", consumers=True
    )
    filters = model.a.weight.detach().double().flatten(1).abs().sum(dim=1)
    found = scores[graph.axes["a.weight", 0].channels]
    np.testing.assert_allclose(found, (filters + torch.cat(halves)).numpy(), rtol=1e-6)


@pytest.mark.parametrize("criterion", ["bn_scale", "taylor_scale", "apoz", "hrank", "random"])
def test_what_looks_at_no_filters_has_no_readers(refused, dense_checkpoint, criterion) -> None:
    words = ["prune", f"model={dense_checkpoint}", "out=s.pt", "target_macs=0.5", f"criterion={criterion}"]
    assert "which looks at no filters" in refused(*words, "consumers=true")


def test_channels_without_a_scale_are_the_last_to_go() -> None:
    model, graph = four_filters()
    assert np.isinf(scores_of(model, graph, "bn_scale", group="b")).all()  # b has no batch norm


def test_weights_that_are_not_finite_are_refused() -> None:
    model, graph = four_filters()
    with torch.no_grad():
        model.a.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"a\.weight"):
        scores_of(model, graph, "l1")


def test_chance_is_repeatable_one_number_a_channel_and_none_of_the_weights() -> None:
    model = build("Residual")
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    before = scores_of(model, graph, "random", reduction="mean")
    np.testing.assert_array_equal(before, scores_of(model, graph, "random", reduction="max"))
    with torch.no_grad():
        model.a.weight.mul_(2.0)
    np.testing.assert_array_equal(before, scores_of(model, graph, "random"))
    assert len(set(before)) == len(before)


def test_chance_has_a_seed_and_what_draws_nothing_has_none() -> None:
    model = build("Residual")
    graph, evidence = trace(model, torch.zeros(1, 3, 8, 8)), Evidence.of(model)
    orders = [np.argsort(score_channels(graph, evidence, seeded(CRITERIA["random"], seed))).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]
    for seed, order in enumerate(orders):
        again = score_channels(graph, evidence, seeded(CRITERIA["random"], seed))
        assert np.argsort(again).tolist() == order
    assert np.argsort(score_channels(graph, evidence, CRITERIA["random"])).tolist() == orders[0]
    assert seeded(CRITERIA["l2"], 1) is CRITERIA["l2"]


def test_a_prune_by_chance_is_another_one_with_another_seed(command, refused, dense, desk) -> None:
    words = ["prune", f"model={dense}", "target_macs=0.5", "imgsz=64"]
    kept = {}
    for name, seed in (("a", 0), ("b", 1), ("c", 1)):
        outcome = command(*words, "criterion=random", f"seed={seed}", f"out={name}.pt", f"save_plan={name}.json")
        assert outcome.code == 0, outcome.err
        plan = json.loads((desk / f"{name}.json").read_text())
        assert plan["choice"]["seed"] == seed
        kept[name] = plan["groups"]
    assert kept["a"] != kept["b"]
    assert kept["b"] == kept["c"]
    assert "seed=1 with criterion=l2, which draws nothing" in refused(*words, "out=d.pt", "criterion=l2", "seed=1")
    assert "seed=-1" in refused(*words, "out=d.pt", "criterion=random", "seed=-1")
    assert "plan= together with seed=1" in refused("prune", f"model={dense}", "out=d.pt", "plan=a.json", "seed=1")


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30))
def test_lamp_by_its_definition(squares: list[float]) -> None:
    values = np.array(squares)
    expected = [value / values[values >= value].sum() if value else 0.0 for value in values]
    np.testing.assert_allclose(lamp(values), expected, rtol=1e-9)


class TestEffectiveRank:
    @pytest.mark.parametrize(
        ("matrix", "rank"),
        [
            (torch.eye(4), 4.0),
            (torch.ones(3, 5), 1.0),
            (torch.zeros(3, 3), 0.0),
            (torch.diag(torch.tensor([2.0, 1.0, 1.0])), np.exp(0.5 * np.log(2) + 0.5 * np.log(4))),
        ],
    )
    def test_by_hand(self, matrix, rank):
        assert float(effective_rank(matrix)) == pytest.approx(rank, rel=1e-5)
        assert effective_rank(matrix.expand(2, 3, *matrix.shape)).shape == (2, 3)

    @settings(deadline=None)
    @given(st.floats(0.1, 10.0), st.integers(0, 100))
    def test_scale_does_not_matter(self, scale, seed):
        matrix = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(effective_rank(matrix), effective_rank(scale * matrix), rtol=1e-3, atol=1e-3)
