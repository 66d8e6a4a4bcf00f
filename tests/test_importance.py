"""Criteria: a hand-computed case each, equivariance under permutation, and the reduction over a channel's members."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from toys import build

from yolo_prune.channels import ChannelGraph, trace
from yolo_prune.errors import ConfigError
from yolo_prune.importance import CRITERIA, score_channels

# Four filters of Chain.a, flattened to three numbers each (the rest zero), and four scales.
FILTERS = [[3.0, 4.0, 0.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [0.0, -5.0, 12.0]]
SCALES = [0.5, -2.0, 0.0, 1.0]
EXPECTED = {
    "l1": [7.0, 3.0, 0.0, 17.0],
    "l2": [5.0, 3.0**0.5, 0.0, 13.0],
    "bn_scale": [0.5, 2.0, 0.0, 1.0],
}


def four_filters() -> tuple[nn.Module, ChannelGraph]:
    model = build("Chain")
    with torch.no_grad():
        model.a.weight.zero_()
        model.a.weight[:, :, 1, 1] = torch.tensor(FILTERS)
        model.norm.weight.copy_(torch.tensor(SCALES))
    return model, trace(model, torch.zeros(1, 3, 8, 8))


def scores_of(model: nn.Module, graph: ChannelGraph, criterion: str, group: str = "a", **options) -> np.ndarray:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    scores = score_channels(graph, tensors, CRITERIA[criterion], **options)
    return scores[graph.groups[graph.group_names()[group]].channels]


def test_every_criterion_has_a_hand_computed_case() -> None:
    assert set(EXPECTED) == set(CRITERIA)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_hand_computed_scores(criterion: str) -> None:
    model, graph = four_filters()
    np.testing.assert_allclose(scores_of(model, graph, criterion, normalization="none"), EXPECTED[criterion], rtol=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_mean_normalization_divides_by_the_groups_mean(criterion: str) -> None:
    model, graph = four_filters()
    expected = np.array(EXPECTED[criterion])
    found = scores_of(model, graph, criterion, normalization="mean")
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_permuting_filters_permutes_scores(criterion: str) -> None:
    model, graph = four_filters()
    before = scores_of(model, graph, criterion)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        model.a.weight.copy_(model.a.weight[order])
        model.norm.weight.copy_(model.norm.weight[order])
    np.testing.assert_allclose(scores_of(model, graph, criterion), before[order.numpy()], rtol=1e-12)


@pytest.mark.parametrize(("reduction", "combine"), [("sum", np.sum), ("mean", np.mean), ("max", np.max)])
def test_a_shortcut_channel_is_scored_by_all_its_producers(reduction: str, combine) -> None:
    model = build("Residual")
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    producers = [layer.weight.detach().double().flatten(1).norm(dim=1).numpy() for layer in (model.a, model.c)]
    expected = combine(np.stack(producers), axis=0)
    found = scores_of(model, graph, "l2", reduction=reduction, normalization="none")
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_channels_without_a_scale_are_the_last_to_go() -> None:
    model, graph = four_filters()
    assert np.isinf(scores_of(model, graph, "bn_scale", group="b")).all()  # b has no batch norm


def test_weights_that_are_not_finite_are_refused() -> None:
    model, graph = four_filters()
    with torch.no_grad():
        model.a.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"a\.weight"):
        scores_of(model, graph, "l1")
