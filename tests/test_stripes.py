"""Stripes: the sparse convolution, skeletons and their steps, ranking, and channels that fell silent."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from models import lively
from torch import nn
from torch.nn import functional

from yolo_prune.channels import trace
from yolo_prune.channels.tensors import named_tensors
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.methods.stripes.options import StripeOptions, falling_epochs
from yolo_prune.methods.stripes.ranking import StripeFloors, StripeRanking, protected_stripes, stripe_worth
from yolo_prune.methods.stripes.skeleton import SKELETON, SkeletonSteps, StripedLayer, grow_skeleton, strongest_stripes
from yolo_prune.surgery import counted_macs
from yolo_prune.surgery.silent import silent_channels, without_silent
from yolo_prune.surgery.stripes import StripeConv, living_stripes, macs_per_stripe, with_stripe_convs

KINDS = [
    {"padding": 1},
    {"padding": 1, "stride": 2},
    {"stride": 2, "bias": False},
    {"padding": "same", "dilation": 2},
    {"padding": 2, "dilation": 2, "stride": 3},
    {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
]


def with_dead_stripes(conv: nn.Conv2d, seed: int = 0) -> nn.Conv2d:
    """Zero about half of a convolution's stripes, and one filter whole, in place."""
    alive = torch.rand(living_stripes(conv).shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    alive[0] = False
    with torch.no_grad():
        conv.weight.mul_(alive[:, None])
    return conv


class TestStripeConv:
    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_the_dense_convolution(self, kind):
        torch.manual_seed(0)
        conv = with_dead_stripes(nn.Conv2d(**{"in_channels": 5, "out_channels": 7, "kernel_size": 3, **kind}).double())
        image = torch.randn(2, 5, 11, 14, dtype=torch.float64)
        assert not living_stripes(conv).all()
        torch.testing.assert_close(StripeConv(conv)(image), conv(image), rtol=0, atol=1e-12)

    def test_with_no_stripe_left_it_is_the_bias(self):
        conv = nn.Conv2d(3, 4, 3, padding=1)
        nn.init.zeros_(conv.weight)
        assert torch.equal(StripeConv(conv)(torch.rand(1, 3, 5, 5)), conv.bias[None, :, None, None].expand(1, 4, 5, 5))

    @pytest.mark.parametrize("kind", [{"groups": 2}, {"padding": 1, "padding_mode": "reflect"}])
    def test_other_convolutions_are_refused(self, kind):
        with pytest.raises(ConfigError, match="one group, padded with zeros"):
            StripeConv(nn.Conv2d(4, 4, 3, **kind))

    def test_macs_by_hand(self):
        """3 inputs, 8x8 outputs of stride 2 on 16x16: a stripe costs 3 * 64."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.Conv2d(4, 2, 1, bias=False))
        image = torch.zeros(1, 3, 16, 16)
        assert macs_per_stripe(model, image) == {"0": 3 * 64}
        model[0].weight.data[0, :, 0, 0] = model[0].weight.data[2, :, 1, 2] = 0.0
        assert counted_macs(with_stripe_convs(model), image) == (4 * 9 - 2) * 3 * 64 + 4 * 2 * 64

    @pytest.mark.parametrize("name", ["yolov5n", "yolov8n", "yolo11n"])
    def test_a_whole_network(self, name):
        """What inference of the detector says, and what it costs: kept stripes * inputs * height * width."""
        model: Any = lively(name).double().fuse(verbose=False)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.groups == 1:
                with_dead_stripes(module)
        image, striped = torch.rand(1, 3, 64, 64, dtype=torch.float64), with_stripe_convs(model)
        assert sum(isinstance(module, StripeConv) for module in striped.modules()) > 25
        with torch.no_grad():
            expected, found = model(image)[0], striped(image)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        costs = macs_per_stripe(model, image)
        dead = {path: int((~living_stripes(model.get_submodule(path))).sum()) for path in costs}
        saved = sum(dead[path] * cost for path, cost in costs.items())
        small = image.float()
        assert counted_macs(striped.float(), small) == counted_macs(model.float(), small) - saved


def layer(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> StripedLayer:
    """A convolution from 3 to 4 channels, of kernel 3, with a batch norm and a skeleton."""
    torch.manual_seed(seed)
    conv, norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    grow_skeleton(conv.to(dtype))
    return StripedLayer(conv=conv, norm=norm.to(dtype))


def optimizer_of(layer: StripedLayer, **more: Any) -> torch.optim.Optimizer:
    groups = [{"params": [layer.conv.weight, *layer.norm.parameters()], "weight_decay": 0.05}]
    groups.append({"params": [layer.skeleton], "weight_decay": 0.0})
    return torch.optim.SGD(groups, **{"lr": 0.1, "momentum": 0.9, "nesterov": True, **more})


class Plain(nn.Module):
    """The paper's layer, by autograd: conv(x, W * FS)."""

    def __init__(self, layer: StripedLayer) -> None:
        super().__init__()
        self.weight, self.skeleton = (nn.Parameter(t.detach().clone()) for t in (layer.conv.weight, layer.skeleton))
        self.norm = copy.deepcopy(layer.norm)

    def product(self) -> torch.Tensor:
        return self.weight * self.skeleton[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(functional.conv2d(x, self.product(), padding=1))


class TestSkeletons:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
    @pytest.mark.parametrize("nesterov", [True, False])
    def test_a_step_is_that_of_autograd(self, dtype, tolerance, nesterov):
        """With momentum, with weight decay on W and none on the skeleton, over twelve steps in which stripes die."""
        ours, strength, threshold = layer(dtype=dtype), 1.0, 0.3
        plain = Plain(ours)
        steps = SkeletonSteps({"a": ours}, threshold=threshold)
        optimizer = optimizer_of(ours, nesterov=nesterov, lr=0.02)
        steps.attach(optimizer)
        steps.strength = strength
        groups = [{"params": [plain.weight, *plain.norm.parameters()], "weight_decay": 0.05}]
        groups.append({"params": [plain.skeleton], "weight_decay": 0.0})
        reference = torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=nesterov)
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            image, wish = (torch.randn(2, n, 6, 6, dtype=dtype, generator=generator) for n in (3, 4))
            for model, own in ((lambda x: ours.norm(ours.conv(x)), optimizer), (plain, reference)):
                own.zero_grad()
                loss = (model(image) - wish).square().mean()
                if own is reference:
                    penalised = ~strongest_stripes(plain.product())
                    loss = loss + strength * plain.skeleton[penalised].abs().sum()
                loss.backward()
                if own is reference:  # the dead get no gradient
                    plain.skeleton.grad.mul_(plain.skeleton > 0)
                own.step()
            with torch.no_grad():
                alive = plain.skeleton > threshold
                for tensor, mask in ((plain.skeleton, alive), (plain.weight, alive[:, None])):
                    tensor.mul_(mask)
                    reference.state[tensor]["momentum_buffer"].mul_(mask)
            torch.testing.assert_close(ours.conv.weight, plain.product(), rtol=0, atol=tolerance)
            torch.testing.assert_close(ours.skeleton, plain.skeleton, rtol=0, atol=tolerance)
        assert 0 < int(ours.alive().sum()) < ours.skeleton.numel()

    def test_a_dead_stripe_never_revives_whatever_pulls(self):
        ours = layer()
        steps, optimizer = SkeletonSteps({"a": ours}, threshold=0.01), optimizer_of(ours)
        steps.attach(optimizer)
        for step in range(6):
            for tensor in (ours.conv.weight, *ours.norm.parameters()):
                tensor.grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            if step == 2:
                dying = torch.zeros_like(ours.alive())
                dying[0], dying[1, 0] = True, True
                steps.kill({"a": dying}, optimizer)
                assert not optimizer.state[ours.skeleton]["momentum_buffer"][dying].any()
            if step >= 2:
                assert not ours.skeleton[dying].any()
                assert not ours.conv.weight.transpose(0, 1)[:, dying].any()
                assert not ours.norm.weight[0].any()
                assert not ours.norm.bias[0].any()
                assert ours.norm.weight[1:].all()
        ours.norm.eval()
        assert not functional.silu(ours.norm(ours.conv(torch.rand(1, 3, 5, 5))))[:, 0].any()

    def test_the_penalty_leaves_each_filter_its_strongest_stripe(self):
        """Behind a batch norm nothing opposes a filter that shrinks: on all stripes the penalty would empty it."""
        ours = layer()
        strongest = strongest_stripes(ours.conv.weight)
        steps, optimizer = SkeletonSteps({"a": ours}, threshold=0.01), optimizer_of(ours, momentum=0.0, nesterov=False)
        steps.attach(optimizer)
        steps.strength = 1.0
        for _ in range(20):
            ours.conv.weight.grad = torch.zeros_like(ours.conv.weight)
            optimizer.step()
        assert torch.equal(ours.alive(), strongest)
        assert (ours.skeleton[strongest] == 1.0).all()

    def test_a_step_that_amp_skips_changes_nothing(self):
        ours = layer()
        steps, optimizer = SkeletonSteps({"a": ours}, threshold=0.01), optimizer_of(ours)
        steps.attach(optimizer)
        steps.strength = 1.0
        ours.conv.weight.grad = torch.full_like(ours.conv.weight, float("nan"))
        before = ours.conv.weight.detach().clone()
        optimizer.found_inf = torch.ones(())
        optimizer.step = lambda: [hook(optimizer, (), {}) for hook in hooks]  # a fused kernel that does nothing
        hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
        optimizer.step()
        assert torch.equal(ours.conv.weight, before)
        assert ours.skeleton.grad is None
        assert ours.alive().all()

    def test_an_average_takes_over_the_dead(self):
        ours, average = layer(), layer(seed=1)
        steps = SkeletonSteps({"a": ours}, threshold=0.01)
        dying = torch.zeros_like(ours.alive())
        dying[0], dying[2, 1, 1] = True, True
        steps.kill({"a": dying}, optimizer_of(ours))
        steps.carry({"a": average})
        assert torch.equal(average.alive(), ~dying)
        assert torch.equal(living_stripes(average.conv), ~dying)
        assert not average.norm.weight[0].any()
        assert average.norm.weight[1:].all()

    def test_adaptive_optimizers_are_refused(self):
        ours = layer()
        with pytest.raises(ConfigError, match="method=stripes with AdamW"):
            SkeletonSteps({"a": ours}, threshold=0.01).attach(torch.optim.AdamW([ours.skeleton]))

    def test_stripes_that_are_zero_already_stay_dead(self):
        conv = with_dead_stripes(nn.Conv2d(3, 4, 3))
        before = living_stripes(conv)
        grow_skeleton(conv)
        assert torch.equal(conv.get_parameter(SKELETON) > 0, before)


class TestRanking:
    def test_worth_does_not_depend_on_what_a_batch_norm_undoes(self):
        """By hand: gamma^2 times the stripe's part of the filter's squared norm, as a part of the layer."""
        ours = layer(dtype=torch.float64)
        worth = stripe_worth(ours)
        energy, gamma = ours.conv.weight.detach().square().sum(1), ours.norm.weight.detach().square()
        expected = gamma[1] * energy[1, 0, 2] / energy[1].sum() / gamma.sum()
        assert float(worth[1, 0, 2]) == pytest.approx(float(expected))
        assert float(worth.sum()) == pytest.approx(1.0)
        with torch.no_grad():
            ours.conv.weight[2] *= 7.0
            ours.conv.weight *= 0.3
        torch.testing.assert_close(stripe_worth(ours), worth, rtol=1e-12, atol=0)

    def test_floors(self):
        ours = layer()
        kept = protected_stripes(ours, StripeFloors(min_channels=3, max_fraction=0.75))
        best = stripe_worth(ours).flatten(1).max(dim=1).values.topk(3).indices
        assert kept.flatten(1).any(dim=1)[best].all()
        assert 9 <= int(kept.sum()) <= 9 + 3
        assert int(protected_stripes(ours, StripeFloors(min_channels=1, max_fraction=0.99)).sum()) == 1

    def test_the_fewest_go_that_meet_a_budget_the_worthless_first(self):
        layers = {"a": layer(seed=0, dtype=torch.float64), "b": layer(seed=1, dtype=torch.float64)}
        costs = {"a": 2.0, "b": 1.0}
        ranking = StripeRanking(layers, costs, StripeFloors(min_channels=1, max_fraction=0.9))

        def price(dying: dict[str, torch.Tensor]) -> float:
            return 108.0 - sum(float(stripes.sum()) * costs[path] for path, stripes in dying.items())

        dying = ranking.within(80.0, price)
        assert 79.0 <= price(dying) <= 80.0
        worth = {path: stripe_worth(one) / costs[path] for path, one in layers.items()}
        highest = max(float(worth[path][stripes].max()) for path, stripes in dying.items())
        free = {
            path: ~protected_stripes(one, StripeFloors(min_channels=1, max_fraction=0.9))
            for path, one in layers.items()
        }
        lowest = min(float(worth[path][free[path] & ~dying[path]].min()) for path in layers)
        assert highest < lowest
        assert price(ranking.within(0.0, price)) == price(ranking.first(len(ranking)))

    @pytest.mark.parametrize(("epochs", "kept"), [(1, [0.4]), (2, [0.4, 0.4]), (4, [0.7, 0.4, 0.4, 0.4])])
    def test_as_much_goes_in_each_epoch_of_the_first_half(self, epochs, kept):
        options = StripeOptions(target=0.4)
        assert [options.kept_in(epoch, epochs) for epoch in range(epochs)] == pytest.approx(kept)
        assert falling_epochs(epochs) <= max(epochs // 2, 1)


class TestSilentChannels:
    def test_all_producers_have_to_be_silent_and_ties_lose_alike(self):
        """C2f's cv1: its halves are tied, so two silent channels of one and one of the other lose one each."""
        network = lively("yolov8n")
        graph, norm = trace_model(network), network.model[2].cv1.bn
        half = len(norm.weight) // 2
        with torch.no_grad():
            for index in (0, 1, half + 3):
                norm.weight[index], norm.bias[index] = 0.0, 0.0
            norm.weight[half + 5] = 0.0  # its shift is heard
        silent = silent_channels(named_tensors(network), graph)
        channels = graph.axes["model.2.cv1.conv.weight", 0].channels
        found = set(np.flatnonzero(silent[channels]))
        assert found <= {0, 1, half + 3}  # one that a shortcut adds to others is heard there
        keep = without_silent(graph, silent)
        lost = ~keep[channels]
        assert lost[:half].sum() == lost[half:].sum() <= 1

    def test_one_channel_of_a_group_stays(self):
        from toys import build

        model = build("Chain")
        graph = trace(model, torch.zeros(1, 3, 8, 8))
        with torch.no_grad():
            model.norm.weight.zero_()
            model.norm.bias.zero_()
        keep = without_silent(graph, silent_channels(named_tensors(model), graph))
        assert keep[graph.axes["norm.weight", 0].channels].sum() == 1
        assert keep[graph.axes["b.weight", 0].channels].all()
