"""The penalty of sparsity training: exactly once per step, behind clip and AMP, on prunable scales only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_prune.channels import trace
from yolo_prune.errors import ConfigError
from yolo_prune.methods.slimming.course import PenaltyCourse
from yolo_prune.methods.slimming.penalty import (
    FADE,
    ScalePenalty,
    carry_zeros,
    channel_scales,
    penalised_channels,
)
from yolo_prune.methods.slimming.strength import AutoStrength, Sparsity, schedule_factor

LR, STRENGTH = 0.125, 0.25
"""Powers of two: products of them are exact in every float type."""


class Shortcut(nn.Module):
    """A stem, a shortcut around one block, and a head without a norm: four batch norms, two of them on one sum."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_bn = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.outer, self.outer_bn = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.last, self.last_bn = nn.Conv2d(8, 5, 1, bias=False), nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.stem_bn(self.stem(x)))
        x = x + self.activation(self.outer_bn(self.outer(self.activation(self.inner_bn(self.inner(x))))))
        return self.last_bn(self.last(x))


def network(activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> nn.Module:
    torch.manual_seed(0)
    model = Shortcut(activation)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1.0, 1.0)
    return model


def penalty_on(model: nn.Module, mode: str = "proximal") -> ScalePenalty:
    graph = trace(model.eval(), torch.zeros(1, 3, 8, 8))
    return ScalePenalty(graph, dict(model.named_parameters()), penalised_channels(graph), mode=mode)


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, mode: str = "proximal") -> ScalePenalty:
    """Hook an optimizer of the toy by a penalty of the usual strength."""
    penalty = penalty_on(model, mode)
    penalty.strength = STRENGTH
    penalty.attach(optimizer)
    return penalty


def scales_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bn.weight")}


class TestWhatIsPenalised:
    def test_the_scales_of_prunable_groups_only(self):
        """The last norm reaches the output, so its channels are locked and its scales left alone."""
        model = network()
        before = scales_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        attached(model, optimizer)
        optimizer.step()
        after = scales_of(model)
        assert torch.equal(before["last_bn.weight"], after["last_bn.weight"])
        for name in ("stem_bn.weight", "inner_bn.weight", "outer_bn.weight"):
            assert not torch.equal(before[name], after[name])

    def test_nothing_else_moves(self):
        model = network()
        others = {name: p.detach().clone() for name, p in model.named_parameters() if not name.endswith("bn.weight")}
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        attached(model, optimizer)
        optimizer.step()
        assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in others.items())

    def test_a_model_without_such_scales_is_refused(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
        graph = trace(model, torch.zeros(1, 3, 8, 8))
        with pytest.raises(ConfigError, match="no batch-norm scale"):
            ScalePenalty(graph, dict(model.named_parameters()), penalised_channels(graph))

    def test_frozen_scales_are_left_alone(self):
        model = network()
        model.inner_bn.weight.requires_grad = False
        before = model.inner_bn.weight.clone()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
        penalty = attached(model, optimizer)
        optimizer.step()
        assert torch.equal(model.inner_bn.weight, before)
        channels = penalty.graph.axes["inner_bn.weight", 0].channels
        assert not penalty.chosen[channels].any()  # nor do they count in what `auto` wishes and health shows
        assert penalty.chosen.any()


class TestProximal:
    def test_by_hand(self):
        """|gamma| - lr s for one scale; for a shortcut's two the norm loses lr s sqrt(2)."""
        model = network()
        before = scales_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        attached(model, optimizer)
        optimizer.step()
        after, shrink = scales_of(model), LR * STRENGTH
        inner = before["inner_bn.weight"]
        torch.testing.assert_close(
            after["inner_bn.weight"], inner.sign() * (inner.abs() - shrink).clamp_min(0), rtol=0, atol=1e-7
        )
        pair = torch.stack([before["stem_bn.weight"], before["outer_bn.weight"]])
        norm = pair.norm(dim=0)
        expected = pair * (norm - shrink * 2**0.5).clamp_min(0) / norm
        found = torch.stack([after["stem_bn.weight"], after["outer_bn.weight"]])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)

    def test_zeros_are_true_and_stay(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        penalty = penalty_on(model)
        penalty.strength = 100.0
        penalty.attach(optimizer)
        for _ in range(2):
            optimizer.step()
        for name in ("stem_bn.weight", "inner_bn.weight", "outer_bn.weight"):
            assert not scales_of(model)[name].any()

    @pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
    def test_moves_alike_under_every_optimizer(self, optimizer):
        """L1 does not move gamma under Adam (ZJU-lishuang/yolov5_prune#10, midasklr#39): this does."""
        model = network()
        before = scales_of(model)["inner_bn.weight"].abs()
        steps = optimizer(model.parameters(), lr=LR, weight_decay=0.0)
        attached(model, steps)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        steps.step()
        moved = before - scales_of(model)["inner_bn.weight"].abs()
        torch.testing.assert_close(moved, torch.minimum(before, torch.tensor(LR * STRENGTH)), rtol=0, atol=1e-7)

    def test_each_scale_by_the_rate_of_its_own_parameter_group(self):
        model = network()
        before = scales_of(model)["inner_bn.weight"].abs()
        rest = [p for p in model.parameters() if p is not model.inner_bn.weight]
        optimizer = torch.optim.SGD([{"params": rest, "lr": 1.0}, {"params": [model.inner_bn.weight], "lr": LR}])
        attached(model, optimizer)
        optimizer.step()
        moved = before - scales_of(model)["inner_bn.weight"].abs()
        torch.testing.assert_close(moved, torch.minimum(before, torch.tensor(LR * STRENGTH)), rtol=0, atol=1e-7)


class MicroBatches:
    """A step as the host's trainer takes it: micro-batches scaled for AMP, unscale, clip, step, EMA.

    Where the penalty goes is a parameter, so that the test can show that the wrong places fail it.
    """

    ACCUMULATE, SCALE, CLIP = 4, 1024.0, 10.0

    def __init__(self, model: nn.Module, *, place: str = "hook", dtype: torch.dtype = torch.bfloat16) -> None:
        self.model, self.place, self.dtype = model, place, dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        self.ema = copy.deepcopy(model)

    def penalise(self, strength: float) -> None:
        for name, parameter in self.model.named_parameters():
            if name == "inner_bn.weight":
                parameter.grad += strength * parameter.detach().sign()

    def step(self, loss_weight: float) -> None:
        for _ in range(self.ACCUMULATE):
            with torch.autocast("cpu", dtype=self.dtype):
                loss = loss_weight * self.model.train()(torch.rand(2, 3, 8, 8)).float().square().sum()
            (loss * self.SCALE).backward()
            if self.place == "every micro-batch":
                self.penalise(STRENGTH)
        for parameter in self.model.parameters():
            parameter.grad /= self.SCALE
        if self.place == "before the clip":
            self.penalise(STRENGTH)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average, value in zip(self.ema.state_dict().values(), self.model.state_dict().values(), strict=True):
            average.copy_(value)


def movement(place: str, *, loss_weight: float = 0.0, strength: float = STRENGTH) -> torch.Tensor:
    """Return by how much one step moved each scale towards zero."""
    model = network()
    before = scales_of(model)["inner_bn.weight"]
    training = MicroBatches(model, place=place)
    penalty = penalty_on(model, "subgradient")
    if place == "hook":
        penalty.strength = strength
        penalty.attach(training.optimizer)
    training.step(loss_weight)
    return (before - scales_of(model)["inner_bn.weight"]) * before.sign()


class TestSubgradient:
    def test_one_step_moves_each_scale_by_exactly_lr_s_once(self):
        """METHODS B: AMP, four micro-batches, zero loss, no momentum: -lr s sign(gamma), to the last bit."""
        model = network()
        before = scales_of(model)
        training = MicroBatches(model)
        penalty = attached(model, training.optimizer, "subgradient")
        training.step(0.0)
        inner = before["inner_bn.weight"]
        assert torch.equal(scales_of(model)["inner_bn.weight"], inner - LR * STRENGTH * inner.sign())
        assert torch.equal(training.ema.inner_bn.weight, model.inner_bn.weight)
        assert penalty.steps == 1

    @pytest.mark.parametrize("place", ["every micro-batch", "before the clip"])
    def test_elsewhere_it_would_be_wrong(self, place):
        """The mutations: the same penalty where community code puts it fails what holds at the hook."""
        expected = torch.full((6,), LR * STRENGTH)
        large_loss = 1e6  # so that the clip is active
        with_hook = movement("hook", loss_weight=large_loss) - movement("hook", loss_weight=large_loss, strength=0.0)
        torch.testing.assert_close(with_hook, expected, rtol=0, atol=1e-6)
        weight = large_loss if place == "before the clip" else 0.0
        without = movement("hook", loss_weight=weight, strength=0.0)
        wrong = movement(place, loss_weight=weight) - without
        assert not torch.isclose(wrong, expected, rtol=0.01, atol=0).any()

    def test_adaptive_optimizers_are_refused(self):
        model = network()
        penalty = penalty_on(model, "subgradient")
        with pytest.raises(ConfigError, match="sparsity_mode=subgradient with AdamW") as error:
            penalty.attach(torch.optim.AdamW(model.parameters()))
        assert "optimizer=SGD" in str(error.value)

    @pytest.mark.parametrize("mode", ["subgradient", "proximal"])
    def test_a_step_that_amp_skips_is_none(self, mode):
        """A fused optimizer is called even if gradients overflowed: its kernel looks at `found_inf` itself."""
        model = network()
        before = scales_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=True)
        penalty = attached(model, optimizer, mode)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("inf"))
        optimizer.found_inf = torch.ones(1)
        optimizer.step()
        assert penalty.steps == 0
        assert all(torch.equal(before[name], value) for name, value in scales_of(model).items())

    def test_a_zero_scale_is_not_pushed(self):
        model = network()
        with torch.no_grad():
            model.inner_bn.weight[0] = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        attached(model, optimizer, "subgradient")
        optimizer.step()
        assert model.inner_bn.weight[0] == 0.0
        assert model.inner_bn.weight.isfinite().all()


class TestWhatItReports:
    def test_steps_rates_and_gradients(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        penalty = penalty_on(model)
        penalty.attach(optimizer)
        for gradient in (1.0, -3.0):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
        assert (penalty.steps, penalty.lr_sum) == (2, 2 * LR)
        found = penalty.mean_gradient()
        assert np.allclose(found[penalty.chosen], 2.0)
        assert np.isnan(found[~penalty.chosen]).all()
        penalty.forget()
        assert np.isnan(penalty.mean_gradient()).all()

    def test_root_mean_square_of_a_shortcut(self):
        model = network()
        graph = trace(model.eval(), torch.zeros(1, 3, 8, 8))
        found = channel_scales(graph, dict(model.named_parameters()))
        pair = torch.stack([model.stem_bn.weight, model.outer_bn.weight]).detach().double()
        channels = graph.axes["stem_bn.weight", 0].channels
        assert np.allclose(found[channels], pair.square().mean(dim=0).sqrt().numpy())

    def test_detached_it_is_gone(self):
        model = network()
        before = scales_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        penalty = attached(model, optimizer)
        penalty.attach(torch.optim.SGD(model.parameters(), lr=LR))  # as after surgery: the first is let go
        optimizer.step()
        assert all(torch.equal(before[name], value) for name, value in scales_of(model).items())


class TestSchedule:
    @given(st.floats(0, 1), st.floats(0, 1))
    def test_decays_fall_from_one_to_zero(self, early, late):
        early, late = sorted((early, late))
        for schedule in ("linear", "cosine"):
            assert schedule_factor(schedule, 0.0) == 1.0
            assert schedule_factor(schedule, 1.0) == pytest.approx(0.0, abs=1e-12)
            assert schedule_factor(schedule, early) >= schedule_factor(schedule, late)
        assert schedule_factor("constant", early) == 1.0


class TestAuto:
    @settings(max_examples=25, deadline=None)
    @given(st.floats(0.1, 0.9), st.floats(0.0, 0.8), st.integers(3, 12))
    def test_reaches_its_share_against_a_loss_that_resists(self, share, resistance, epochs):
        """A simulated training in which only part of every nominal movement arrives."""
        rng = np.random.default_rng(0)
        norms, auto, arrived = rng.uniform(0.2, 1.5, 400), AutoStrength(share=share), 1.0
        lr_sum = 0.3  # of one epoch
        for epoch in range(epochs):
            distance = auto.wish(norms)
            strength = auto.strength(distance, lr_sum * (epochs - epoch), arrived=arrived)
            nominal = strength * lr_sum
            norms = np.maximum(norms - nominal * (1.0 - resistance), 0.0)
            moved = distance - auto.wish(norms)
            arrived = moved / nominal if nominal else 1.0
        assert (norms < 0.02).mean() >= share - 0.02

    def test_does_not_explode_when_nothing_moves(self):
        assert AutoStrength().strength(1.0, 2.0, arrived=-5.0) == AutoStrength().strength(1.0, 2.0, arrived=0.1) == 5.0


class TestFading:
    """A silent channel is a constant, its shift, until that is gone too: padding does not go on with it."""

    @pytest.mark.parametrize("mode", ["proximal", "subgradient"])
    def test_shifts_of_silent_channels_by_hand(self, mode):
        """exp(-20 s lr / median) a step; the stem shares its channels with the shortcut's other norm, which is loud."""
        model = network()
        with torch.no_grad():
            for norm in (model.stem_bn, model.inner_bn, model.outer_bn):
                norm.bias.fill_(1.0)
            model.inner_bn.weight[:3] = 0.0
            model.stem_bn.weight[:2] = 0.0
            model.outer_bn.weight[1] = 0.0  # so that channel 1 of the sum is silent, channel 0 is not
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        penalty = attached(model, optimizer, mode)
        penalty.typical = 0.5
        for _ in range(3):
            optimizer.step()
        left = np.exp(-FADE * STRENGTH * LR / 0.5 * 3)
        assert model.inner_bn.bias.detach().numpy() == pytest.approx([left] * 3 + [1.0] * 3)
        sums = [1.0, left, *[1.0] * 6]
        assert model.stem_bn.bias.detach().numpy() == pytest.approx(sums)
        assert model.outer_bn.bias.detach().numpy() == pytest.approx(sums)

    def test_the_average_takes_them_over(self):
        model, average = network(), network()
        with torch.no_grad():
            model.inner_bn.weight[0] = 0.0
            model.inner_bn.bias.fill_(0.25)
            average.inner_bn.bias.fill_(1.0)
        graph = trace(model.eval(), torch.zeros(1, 3, 8, 8))
        carry_zeros(graph, *(dict(one.named_parameters()) for one in (model, average)))
        assert average.inner_bn.weight[0] == 0.0
        assert average.inner_bn.bias.tolist() == [0.25, *[1.0] * 5]
        assert torch.equal(average.inner_bn.weight[1:], network().inner_bn.weight[1:])

    def test_a_course_lets_them_fade_and_goes_on_doing_so_when_it_is_resumed(self, tmp_path):
        courses = TestCourse()
        model = network()
        with torch.no_grad():
            model.inner_bn.bias.fill_(1.0)
        courses.run(*courses.course(model, tmp_path), range(5))
        course, optimizer = courses.course(model, tmp_path, done=5)
        assert course.penalty.typical == pytest.approx(float(np.median(penalised_scales(network()))))
        courses.run(course, optimizer, range(5, 10))
        zero = model.inner_bn.weight == 0
        assert 0 < int(zero.sum()) < 6
        shifts = model.inner_bn.bias.detach()
        assert float(shifts[zero].max()) < 0.5
        assert torch.equal(shifts[~zero], torch.ones(int((~zero).sum())))


def penalised_scales(model: nn.Module) -> np.ndarray:
    """The scale of each penalised channel."""
    graph = trace(model.eval(), torch.zeros(1, 3, 8, 8))
    return channel_scales(graph, dict(model.named_parameters()))[penalised_channels(graph)]


class TestCourse:
    """The strength of each epoch, told what the host knows."""

    EPOCHS, STEPS = 10, 4

    def course(self, model: nn.Module, folder: Path, *, done: int = 0) -> tuple[PenaltyCourse, torch.optim.Optimizer]:
        graph = trace(model.eval(), torch.zeros(1, 3, 8, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        course = PenaltyCourse(Sparsity(), folder, imgsz_px=8, writes=True)
        course.attach(graph, dict(model.named_parameters()), penalised_channels(graph), optimizer)
        course.start(done)
        return course, optimizer

    def run(self, course: PenaltyCourse, optimizer: torch.optim.Optimizer, epochs: range) -> list[float]:
        """Run epochs without a task; return their strengths."""
        strengths = []
        for epoch in epochs:
            course.begin_epoch(epoch, np.full(self.EPOCHS, LR * self.STEPS))
            strengths.append(course.penalty.strength)
            for _ in range(self.STEPS):
                optimizer.step()
            course.end_epoch()
        return strengths

    def test_with_nothing_against_it_the_strength_stays_and_the_share_arrives(self, tmp_path):
        course, optimizer = self.course(network(), tmp_path)
        strengths = self.run(course, optimizer, range(self.EPOCHS))
        assert strengths == pytest.approx([strengths[0]] * self.EPOCHS, rel=1e-4)
        assert course.history[-1].silent == pytest.approx(0.5, abs=0.1)

    def test_resumed_from_weights_that_lag_behind_it_does_not_panic(self, tmp_path):
        """A host resumes from its moving average, whose scales are larger than those that the record saw."""
        model = network()
        before = self.run(*self.course(model, tmp_path), range(5))
        lagging = network()
        with torch.no_grad():
            for new, old, start in zip(*(one.parameters() for one in (lagging, model, network())), strict=True):
                new.copy_(0.6 * old + 0.4 * start)
        course, optimizer = self.course(lagging, tmp_path, done=5)
        assert [epoch.epoch for epoch in course.history] == [0, 1, 2, 3, 4, 5]
        after = self.run(course, optimizer, range(5, self.EPOCHS))
        assert max(after) < 3.0 * before[-1]
        assert [round(epoch.arrived, 2) for epoch in course.history[6:-1]] == [1.0] * 4  # the last meets zero

    def test_a_damaged_record_is_refused(self, tmp_path):
        self.run(*self.course(network(), tmp_path), range(1))
        (tmp_path / "sparsity.json").write_text('{"options": {}}')
        with pytest.raises(ConfigError, match=r"cannot read .*sparsity\.json"):
            self.course(network(), tmp_path, done=1)
