"""Filter grafting: its formulas, what is blended, and grafts within one network."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import lively, states
from torch import nn

from yolo_prune.channels import trace
from yolo_prune.hosts.ultralytics.grafting_nets import lr_factor
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.methods.grafting import (
    Grafting,
    Layer,
    blend,
    entropy,
    filter_layers,
    graft_cyclically,
    graft_internally,
    graft_noise,
    invalid_filters,
    layers_of,
    own_weight,
)

FINITE = st.floats(0.0, math.log(10))


class TestFormulas:
    @pytest.mark.parametrize(
        ("weights", "expected"),
        [
            ([0.0, 0.0, 0.0, 1.0], -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
            ([0.05 + 0.1 * index for index in range(10)], math.log(10)),
            ([0.0, 0.04, 0.06, 0.14, 0.55, 1.0], 0.5 * math.log(2) + 0.5 * math.log(6)),  # 3, 1, 1, 1: bins of a tenth
            ([3.0, 3.0, 3.0], 0.0),
        ],
    )
    def test_entropy_by_hand(self, weights, expected):
        assert entropy(torch.tensor(weights)) == pytest.approx(expected, abs=1e-12)

    def test_entropy_does_not_see_scale_and_place(self):
        weights = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0)).double()
        assert entropy(-3.0 * weights + 5.0) == pytest.approx(entropy(weights), abs=1e-9)

    @given(FINITE, st.floats(1e-3, 1e6), st.floats(0.01, 0.99))
    def test_equal_entropies_give_one_half(self, own, sharpness, amplitude):
        assert own_weight(own, own, amplitude=amplitude, sharpness=sharpness) == 0.5

    @given(FINITE, FINITE, st.floats(1e-3, 1e6), st.floats(0.01, 0.99))
    def test_weights_of_a_pair_add_up_to_one(self, own, other, sharpness, amplitude):
        mine = own_weight(own, other, amplitude=amplitude, sharpness=sharpness)
        theirs = own_weight(other, own, amplitude=amplitude, sharpness=sharpness)
        assert mine + theirs == pytest.approx(1.0, abs=1e-15)
        assert 0.5 - amplitude / 2 <= mine <= 0.5 + amplitude / 2
        assert mine >= theirs or own <= other

    def test_weight_by_hand(self):
        assert own_weight(2.002, 2.0, amplitude=0.4, sharpness=500) == pytest.approx(0.5 + 0.4 / math.pi * math.pi / 4)

    def test_learning_rates_by_hand(self):
        assert [lr_factor(index, 2) for index in (1, 2)] == pytest.approx([0.5, 1.0])
        assert [lr_factor(index, 3) for index in (1, 2, 3)] == pytest.approx([0.25, 0.75, 1.0])


class Small(nn.Module):
    """A convolution with a norm, one with a bias, one that is frozen, and a vector of no convolution."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.norm, self.out = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.fixed, self.scale = nn.Conv2d(4, 2, 1).requires_grad_(False), nn.Parameter(torch.randn(4))
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.norm.num_batches_tracked.fill_(seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fixed(self.out(nn.functional.silu(self.norm(self.a(x)))) * self.scale[:, None, None])


LAYERS = [Layer(conv="a", norm="norm"), Layer(conv="out", norm=None)]

PROBE = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(9)).double()


class TestBlending:
    def test_layers_are_found_with_the_norm_behind_them(self):
        model = Small(0)
        assert layers_of(model, trace(model.eval(), torch.zeros(1, 3, 9, 9)).norms) == LAYERS

    def test_a_norm_follows_its_convolution(self):
        own, other = Small(1).double(), Small(2).double()
        (before, scions), weights = states(own, other), {"a": 0.25, "out": 0.7}
        blend(own, scions, LAYERS, weights)
        alphas = {"a.weight": 0.25, "out.weight": 0.7, "out.bias": 0.7}
        alphas |= {f"norm.{name}": 0.25 for name in ("weight", "bias", "running_mean", "running_var")}
        for name, value in own.state_dict().items():
            alpha = alphas.pop(name, None)
            expected = before[name] if alpha is None else alpha * before[name] + (1 - alpha) * scions[name]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-15)
        assert not alphas
        assert own.norm.num_batches_tracked == 1

    @given(st.floats(0.0, 1.0))
    def test_equal_networks_are_a_fixed_point_bit_by_bit(self, alpha):
        model = Small(1)
        before = copy.deepcopy(model.state_dict())
        blend(model, before, LAYERS, dict.fromkeys(("a", "out"), alpha))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_each_takes_from_the_one_before_as_all_were_before(self):
        nets = [[Small(seed).double(), Small(seed + 10).double()] for seed in range(3)]
        before = [states(*net) for net in nets]
        chosen = graft_cyclically(nets, LAYERS, Grafting())
        for index, (net, weights) in enumerate(zip(nets, chosen, strict=True)):
            for part, model in enumerate(net):  # the network and its average, by the same weights
                own, scions = before[index][part], before[index - 1][part]
                for path in ("a", "out"):
                    alpha = own_weight(
                        entropy(before[index][0][f"{path}.weight"]),
                        entropy(before[index - 1][0][f"{path}.weight"]),
                        amplitude=0.4,
                        sharpness=500,
                    )
                    assert weights[path] == alpha
                    assert 0.3 <= alpha <= 0.7
                    expected = alpha * own[f"{path}.weight"] + (1 - alpha) * scions[f"{path}.weight"]
                    torch.testing.assert_close(model.state_dict()[f"{path}.weight"], expected, rtol=0, atol=1e-15)

    def test_a_pair_is_one_network_afterwards(self):
        """What alpha_i + alpha_j = 1 means for two networks; from then on, data and learning rates part them."""
        first, second = [Small(1).double()], [Small(2).double()]
        graft_cyclically([first, second], LAYERS, Grafting())
        for name in (name for layer in LAYERS for name in layer.tensors(first[0].state_dict())):
            torch.testing.assert_close(first[0].state_dict()[name], second[0].state_dict()[name], rtol=0, atol=1e-15)

    def test_one_that_is_not_finite_neither_gives_nor_takes(self):
        nets = [[Small(seed)] for seed in range(3)]
        nets[1][0].norm.running_var[0] = math.nan
        before = states(*(net[0] for net in nets))
        weights = graft_cyclically(nets, LAYERS, Grafting())
        assert [chosen is None for chosen in weights] == [False, True, True]
        for index in (1, 2):
            found = nets[index][0].state_dict()
            for name, value in before[index].items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(nets[0][0].a.weight, before[0]["a.weight"])

    @pytest.mark.parametrize("name", ["yolov8n", "yolov9t", "yolo12n", "yolo26n", "yolov8n-seg"])
    def test_real_networks(self, name):
        """Every norm has its convolution, every value is the blend, and the constant layer stays."""
        own, other = lively(name, seed=1).double(), lively(name, seed=2).double()
        for path, parameter in own.named_parameters():
            parameter.requires_grad = ".dfl" not in path
        layers = layers_of(own, trace_model(own).norms)
        modules = dict(own.named_modules())
        assert {layer.norm for layer in layers if layer.norm} == {
            path for path, module in modules.items() if isinstance(module, nn.BatchNorm2d)
        }
        before, scions = states(own, other)
        (weights, _) = graft_cyclically([[own], [other]], layers, Grafting())
        touched = {name: layer.conv for layer in layers for name in layer.tensors(before)}
        for path, value in own.state_dict().items():
            expected = before[path]
            if path in touched:
                alpha = weights[touched[path]]
                expected = alpha * expected + (1 - alpha) * scions[path]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
        left = {path.rpartition(".")[2] for path in before if path not in touched}
        assert left <= {"num_batches_tracked", "weight", "bias", "gamma", "anchors"}
        assert not [path for path in touched if ".dfl" in path]

    @pytest.mark.parametrize("name", ["yolov5n", "yolov8n", "yolo11n"])
    def test_real_networks_that_are_identical_are_a_fixed_point(self, name):
        """Two of them, each with its average: one graft moves no bit."""
        network, average = lively(name, seed=1), lively(name, seed=2)
        layers, before = layers_of(network, trace_model(network).norms), states(network, average)
        nets = [[network, average], [copy.deepcopy(network), copy.deepcopy(average)]]
        for weights in graft_cyclically(nets, layers, Grafting()):
            assert set(weights.values()) == {0.5}
        for net in nets:
            for model, expected in zip(net, before, strict=True):
                assert all(torch.equal(value, expected[path]) for path, value in model.state_dict().items())


class TestWithinOneNetwork:
    def weak(self, seed: int = 0) -> Small:
        """Return a network three of whose eight filters are small; the smallest is the third."""
        model = Small(seed).double()
        with torch.no_grad():
            for index, factor in ((1, 0.02), (2, 0.01), (5, 0.03)):
                model.a.weight[index] *= factor
        return model

    def test_invalid_filters_by_hand(self):
        weight = torch.tensor([4.0, 0.1, 5.0, 0.2, 3.0])[:, None]  # mean 2.46
        small, large = invalid_filters(weight, 0.5)
        assert (small.tolist(), large.tolist()) == ([1, 3], [2, 0])
        assert invalid_filters(weight, 0.06)[0].tolist() == [1]
        assert invalid_filters(torch.ones(6, 2), 0.99)[0].tolist() == []
        small, large = invalid_filters(torch.tensor([0.0, 0.0, 0.0, 9.0])[:, None], 0.5)
        assert len(small) == 2
        assert not {*small.tolist()} & {*large.tolist()}

    def test_outputs_and_grouped_convolutions_are_left_alone(self):
        model = Small(0)
        assert filter_layers(model, LAYERS) == LAYERS[:1]
        model.a = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        assert filter_layers(model, LAYERS) == []

    def test_a_strong_filter_is_added_to_a_weak_one(self):
        model, average = self.weak(), self.weak(3)
        (before, of_average) = states(model, average)
        small, large = invalid_filters(before["a.weight"], 0.5)
        assert small.tolist() == [2, 1, 5]
        assert graft_internally([model, average], LAYERS[:1], 0.5) == 3
        for found, old in ((model, before), (average, of_average)):
            kept = [index for index in range(8) if index not in small]
            for name in ("a.weight", "norm.running_mean", "norm.running_var"):
                now = found.state_dict()[name]
                torch.testing.assert_close(now[small], old[name][small] + old[name][large], rtol=0, atol=1e-15)
                assert torch.equal(now[kept], old[name][kept])
            assert torch.equal(found.norm.weight, old["norm.weight"])

    def test_the_running_mean_behind_a_revived_filter_is_right(self):
        model = self.weak()
        outputs = model.a(PROBE)
        model.norm.running_mean.copy_(outputs.mean((0, 2, 3)).detach())
        graft_internally([model], LAYERS[:1], 0.5)
        torch.testing.assert_close(model.norm.running_mean, model.a(PROBE).mean((0, 2, 3)), rtol=0, atol=1e-14)

    def test_noise_goes_onto_invalid_filters_alone_and_is_the_same_for_the_average(self):
        model, average = self.weak(), self.weak(3)
        before = states(model, average)
        state = torch.get_rng_state()
        assert graft_noise([model, average], LAYERS[:1], 0.5, deviation=0.25, seed=7) == 3
        assert torch.equal(torch.get_rng_state(), state)
        added = [found.a.weight - old["a.weight"] for found, old in zip((model, average), before, strict=True)]
        torch.testing.assert_close(added[0], added[1], rtol=0, atol=1e-15)
        assert added[0].abs().flatten(1).sum(1).nonzero()[:, 0].tolist() == [1, 2, 5]
        again = self.weak()
        graft_noise([again], LAYERS[:1], 0.5, deviation=0.25, seed=7)
        assert torch.equal(again.a.weight, model.a.weight)

    def test_noise_has_the_deviation_that_was_asked_for(self):
        model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.BatchNorm2d(64))
        with torch.no_grad():
            model[0].weight[:32] = 0.0
        graft_noise([model], [Layer(conv="0", norm="1")], 0.5, deviation=0.125, seed=0)
        values = model[0].weight[:32].detach()
        assert values.std().item() == pytest.approx(0.125, rel=0.02)
        assert abs(values.mean().item()) < 0.125 * 5 / math.sqrt(values.numel())
