"""ResRep's rule, masks and schedule: what a masked row does is known before the first epoch."""

from __future__ import annotations

import copy
import json
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from resrep_cases import FLOORS, course, forgetting_of, record_of, small_network, weights_of, with_compactors
from torch import nn

from yolo_prune.allocation import Constraints
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.slim import MARKER, mark
from yolo_prune.hosts.ultralytics.resrep import ResRepTraining
from yolo_prune.methods.resrep.forgetting import (
    KEPT_STRENGTH,
    PARAM_GROUP,
    Forgetting,
    apply_rule,
    give_own_group,
    masked_channels,
    row_norms,
)
from yolo_prune.methods.resrep.options import ResRepOptions
from yolo_prune.methods.resrep.schedule import (
    EPS,
    GONE,
    Pull,
    choose,
    forgetting_rates,
    is_enough,
    simulate,
    travel,
)


class TestRule:
    def weight(self, rows: int = 6) -> nn.Parameter:
        torch.manual_seed(0)
        return nn.Parameter(torch.randn(rows, rows, 1, 1, dtype=torch.float64))

    def test_kept_rows_hear_the_loss_and_masked_ones_do_not(self):
        weight, masked = self.weight(), torch.tensor([True, False, False, True, False, False])
        loss = torch.randn_like(weight)
        weight.grad = loss.clone()
        apply_rule(weight, masked, 1e-4)
        pull = 1e-4 * weight.detach() / (row_norms(weight) + EPS)[:, None, None, None]
        torch.testing.assert_close(weight.grad[~masked], (loss + pull)[~masked], rtol=1e-14, atol=0)
        torch.testing.assert_close(weight.grad[masked], pull[masked], rtol=1e-14, atol=0)

    def test_strength_that_few_steps_need_is_for_masked_rows_alone(self):
        weight, masked = self.weight(), torch.tensor([True, False, False, True, False, False])
        apply_rule(weight, masked, 5.0)
        pulled = row_norms(weight.grad)
        assert pulled[masked].tolist() == pytest.approx([5.0] * 2, rel=1e-5)
        assert pulled[~masked].tolist() == pytest.approx([KEPT_STRENGTH] * 4, rel=1e-5)

    def test_zeros_and_what_is_not_finite(self):
        weight, masked = self.weight(), torch.tensor([True, True, False, False, False, False])
        with torch.no_grad():
            weight[0] = weight[2] = 0.0
        weight.grad = torch.zeros_like(weight)
        weight.grad[:2] = torch.tensor([math.nan, math.inf], dtype=torch.float64)[:, None, None, None]
        apply_rule(weight, masked, 1e-4)
        assert weight.grad.isfinite().all()
        assert not weight.grad[[0, 2]].any()

    def test_a_masked_row_moves_the_same_whatever_the_batch(self):
        """Bitwise, from the moment in which it is masked: what momentum knew of the loss is gone too."""
        seen = []
        for seed in (1, 2):
            model = small_network()
            graph, targets = with_compactors(model)
            forgetting = forgetting_of(model, graph, targets)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
            give_own_group(optimizer, list(forgetting.weights.values()))
            forgetting.attach(optimizer)
            masked = graph.channel_count * [False]
            path = "model.0.conv"
            for step in range(4):
                if step == 2:  # two steps by other batches, then masked at the same place
                    masked = np.zeros(graph.channel_count, dtype=bool)
                    masked[targets[path][:3]] = True
                    with torch.no_grad():
                        forgetting.weights[path][:3] = torch.eye(8)[:3, :, None, None]
                    forgetting.mask(masked)
                image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(10 * seed + step))
                forgetting.iteration = 200  # before masks are built
                model.train()(image)["boxes"].square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            seen.append(forgetting.weights[path].detach().clone())
        assert torch.equal(seen[0][:3], seen[1][:3])
        assert not torch.equal(seen[0][3:], seen[1][3:])
        assert not torch.equal(seen[0][:3], torch.eye(8)[:3, :, None, None])

    def test_only_plain_sgd(self):
        model = small_network()
        weights = list(weights_of(model, with_compactors(model)[1]).values())
        with pytest.raises(ConfigError, match="method=resrep with AdamW"):
            give_own_group(torch.optim.AdamW(model.parameters()), weights)


class TestMasks:
    @pytest.fixture
    def forgetting(self):
        model = small_network()
        graph, targets = with_compactors(model)
        found = forgetting_of(model, graph, targets, target=0.4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        give_own_group(optimizer, list(found.weights.values()))
        found.attach(optimizer)
        with torch.no_grad():
            for weight in found.weights.values():
                weight.mul_(torch.rand(len(weight), 1, 1, 1, generator=torch.Generator().manual_seed(len(weight))))
        return found

    def step(self, forgetting: Forgetting, iteration: int) -> None:
        forgetting.iteration = iteration
        forgetting._optimizer.step()

    def test_a_state_that_the_host_reads_back_keeps_their_learning_rate(self, forgetting):
        """NaN recovery loads the optimizer's state, which replaces its groups."""
        optimizer = forgetting._optimizer
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        self.step(forgetting, last := len(forgetting._rates) - 1)
        (group,) = (group for group in optimizer.param_groups if group.get("param_group") == PARAM_GROUP)
        assert group["lr"] == pytest.approx(float(forgetting._rates[last]))
        assert group["lr"] < 0.01

    def test_nan_is_left_to_the_host(self, forgetting):
        """It goes back to its last checkpoint after the epoch; until then there is nothing to choose by."""
        weight = next(iter(forgetting.weights.values()))
        before = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(torch.nan)
        self.step(forgetting, forgetting.course.mask_until)
        assert not forgetting.settled
        with torch.no_grad():
            weight.copy_(before)
        self.step(forgetting, forgetting.course.mask_until)
        assert forgetting.settled

    def test_they_grow_to_the_target_and_settle(self, forgetting):
        where = forgetting.course
        self.step(forgetting, where.mask_from - 1)
        assert not forgetting.masked.any()
        middle = (where.mask_from + where.mask_until) // 2
        self.step(forgetting, middle)
        assert 0.6 < forgetting.macs() <= where.kept(middle, 0.4) == pytest.approx(0.7, abs=1e-3)
        self.step(forgetting, where.mask_until)
        assert forgetting.settled
        assert 0.3 < forgetting.macs() <= 0.4
        before = forgetting.masked.copy()
        with torch.no_grad():
            for weight in forgetting.weights.values():
                weight.copy_(torch.eye(len(weight))[:, :, None, None].flip(0))
        self.step(forgetting, where.mask_until + 1)
        assert np.array_equal(before, forgetting.masked)

    def test_they_hold_the_smallest_rows_and_leave_the_floors(self, forgetting):
        self.step(forgetting, forgetting.course.mask_until)
        forgetting.graph.check_keep(~forgetting.masked)
        norms = forgetting.norms()
        for path, rows in forgetting.masked_rows().items():
            kept = np.delete(norms[path], rows)
            assert len(kept) >= 4
            assert len(kept) % 4 == 0
            if rows and len(set(np.diff(forgetting.targets[path]))) == 1 and not path.endswith("cv1.conv"):
                assert norms[path][rows].max() <= kept.min()

    def test_rows_that_grew_are_pulled_as_much_harder(self, forgetting):
        with torch.no_grad():
            for weight in forgetting.weights.values():
                weight.mul_(3.0 / row_norms(weight)[:, None, None, None])
        self.step(forgetting, forgetting.course.mask_until)
        assert forgetting.strength == pytest.approx(3.0 * forgetting.pull.strength, rel=1e-4)

    def test_what_is_gone_stays_gone_in_the_average_too(self, forgetting):
        self.step(forgetting, forgetting.course.mask_until)
        average = {path: torch.ones_like(weight) for path, weight in forgetting.weights.items()}
        path = next(path for path, rows in forgetting.masked_rows().items() if len(rows) > 1)
        small, other = forgetting.masked_rows()[path][:2]
        with torch.no_grad():
            forgetting.weights[path][small] = 0.1 * GONE / 8
        forgetting.end()
        forgetting.carry(average)
        assert not forgetting.weights[path][small].any()
        assert not average[path][small].any()
        assert torch.equal(average[path][other], forgetting.weights[path][other])
        kept = np.delete(np.arange(len(average[path])), forgetting.masked_rows()[path])
        assert (average[path][kept] == 1).all()
        self.step(forgetting, forgetting.course.mask_until + 1)
        assert not forgetting.weights[path][small].any()
        assert not forgetting.gone

    def test_masks_go_through_a_checkpoint_as_plain_numbers(self, forgetting):
        self.step(forgetting, forgetting.course.mask_until)
        rows = json.loads(json.dumps(forgetting.masked_rows()))
        assert np.array_equal(masked_channels(forgetting.graph, forgetting.targets, rows), forgetting.masked)


class TestEpochs:
    """What the callbacks do at the borders of epochs, on a stand-in for the host's trainer."""

    @pytest.fixture
    def training(self, tmp_path):
        model = small_network()
        graph, targets = with_compactors(model)
        mark(model, unfinished="resrep")
        found = ResRepTraining(ResRepOptions(target=0.6, constraints=Constraints(**FLOORS)))
        found._graph, found._targets, found._imgsz_px = graph, targets, 64
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        give_own_group(optimizer, list(weights_of(model, targets).values()))
        trainer = SimpleNamespace(model=model, ema=SimpleNamespace(ema=copy.deepcopy(model)), optimizer=optimizer)
        vars(trainer).update(resume=False, save_dir=tmp_path, epochs=10, start_epoch=0, epoch=0, accumulate=1)
        vars(trainer).update(train_loader=range(100), lf=course(10).factor, args=SimpleNamespace(warmup_epochs=0.0))
        vars(trainer).update(best_fitness=0.9, stopper=SimpleNamespace(best_fitness=0.9, best_epoch=0))
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # which notes the initial learning rates
        found.begin(trainer)
        return found, trainer

    def run_to(self, training: Any, trainer: Any, epoch: int, iteration: int) -> None:
        trainer.epoch = epoch
        training.begin_epoch(trainer)
        training._batch = iteration - epoch * 100
        training.count(trainer)
        trainer.optimizer.step()

    def test_the_best_begins_anew_until_masked_rows_are_gone(self, training):
        training, trainer = training
        self.run_to(training, trainer, 3, 300)
        training.end_epoch(trainer)
        assert training._forgetting.settled
        assert (trainer.best_fitness, vars(trainer.stopper)) == (None, {"best_fitness": 0.0, "best_epoch": 3})
        with torch.no_grad():
            for path, rows in training._forgetting.masked_rows().items():
                training._forgetting.weights[path][rows] = 0.0
        training._forgetting.end()  # they stand still
        for epoch, best in ((4, None), (5, 0.7)):  # the first epoch at whose end they are gone is the first that counts
            self.run_to(training, trainer, epoch, 100 * epoch)
            trainer.best_fitness = 0.7
            training.end_epoch(trainer)
            assert trainer.best_fitness == best
            assert getattr(trainer.ema.ema, MARKER)["resrep"]["gone"]
        assert [row["epoch"] for row in record_of(trainer.save_dir)["epochs"]] == [4, 5, 6]

    def test_an_epoch_that_the_host_repeats_begins_with_its_masks(self, training):
        """After NaN the host goes back to the last checkpoint and runs the epoch again."""
        training, trainer = training
        self.run_to(training, trainer, 1, 150)
        before = training._forgetting.masked.copy()
        self.run_to(training, trainer, 2, 299)
        training.end_epoch(trainer)
        assert training._forgetting.settled
        training.begin_epoch(trainer)
        assert not training._forgetting.settled
        assert np.array_equal(training._forgetting.masked, before)

    def test_a_batch_that_the_host_halved_gives_other_steps(self, training):
        training, trainer = training
        first = training._forgetting.pull
        trainer.train_loader = range(200)
        training.begin_epoch(trainer)
        assert training._forgetting.course.iterations == 2000
        assert training._forgetting.pull.strength < first.strength
        assert record_of(trainer.save_dir)["batches"] == 200

    def test_resumed_with_other_steps_or_frozen_compactors_is_refused(self, training):
        training, trainer = training
        training.end_epoch(trainer)
        trainer.resume = True
        training.begin(trainer)
        trainer.train_loader = range(50)
        with pytest.raises(ConfigError, match="resumed with 50 batches an epoch"):
            training.begin(trainer)
        trainer.train_loader = range(100)
        next(iter(training._forgetting.weights.values())).requires_grad = False
        with pytest.raises(ConfigError, match="freeze= reaches 1 compactors"):
            training.begin(trainer)


class TestSimulation:
    @pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
    def test_is_what_the_optimizer_does_to_a_masked_row(self, momentum):
        where, pull = course(20, 20), Pull(strength=0.5, momentum=momentum)
        rates = forgetting_rates(where, pull)
        weight = nn.Parameter(torch.randn(3, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        starts = row_norms(weight).numpy().copy()
        optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum)
        for done, rate in enumerate(rates):
            weight.grad = torch.full_like(weight, 1e3)  # unheard
            apply_rule(weight, torch.ones(3, dtype=torch.bool), pull.strength)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            if done in (5, 100, len(rates) - 1):  # on the way, about zero, and at the end
                expected = simulate(rates[: done + 1], pull, starts)
                assert row_norms(weight).numpy() == pytest.approx(expected, rel=1e-6, abs=1e-11)

    @pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
    def test_travel_is_how_far_a_row_comes(self, momentum):
        rates = np.linspace(0.01, 0.001, 50)
        left = simulate(rates, Pull(strength=0.01, momentum=momentum), np.array([10.0]))
        assert 10.0 - left[0] == pytest.approx(0.01 * travel(rates, momentum), rel=1e-5)

    @pytest.mark.parametrize("epochs", [2, 8, 60])
    def test_the_chosen_strength_is_the_least_that_arrives_before_the_tail(self, epochs):
        where = course(epochs)
        pull = choose(where, strength=None, momentum=None)
        assert is_enough(where, pull)
        assert not is_enough(where, Pull(strength=0.99 * pull.strength / 1.5, momentum=pull.momentum))
        left = simulate(forgetting_rates(where, pull), pull, np.random.default_rng(0).uniform(0.0, 1.0, 1000))
        assert left.max() < GONE  # whatever the norms: a tail that is too steep stops some rows only

    @pytest.mark.parametrize("epochs", range(5, 16))
    def test_what_is_promised_of_few_steps_holds_for_every_row(self, epochs):
        """So few that the tail is steep: it stops a row or not, as the moment happens to be."""
        where = course(epochs, 16, warmup_epochs=0.5)
        try:
            pull = choose(where, strength=None, momentum=None)
        except ConfigError:
            assert epochs < 8
            return
        starts = np.random.default_rng(0).uniform(0.0, 1.0, 1000)
        assert simulate(forgetting_rates(where, pull), pull, starts).max() < GONE

    def test_momentum_is_the_papers_where_there_are_steps_for_it(self):
        momenta = [choose(course(epochs), strength=None, momentum=None).momentum for epochs in (1, 2, 5, 12, 60)]
        assert momenta == sorted(momenta)
        assert momenta[-1] == 0.99
        assert momenta[0] < 0.9
        assert choose(course(60), strength=1e-3, momentum=0.99) == Pull(strength=1e-3, momentum=0.99)

    @pytest.mark.parametrize(
        "given", [{"strength": 1e-4, "momentum": 0.99}, {"strength": None, "momentum": 0.99}, {"strength": 1e-3}]
    )
    def test_a_training_that_is_too_short_is_refused_with_the_epochs_that_would_do(self, given):
        given = {"momentum": None, **given}
        with pytest.raises(ConfigError, match="are too few") as error:
            choose(course(4, lr=0.03), **given)
        needed = int(re.search(r"epochs=(\d+) or more", str(error.value))[1])
        choose(course(needed, lr=0.03), **given)
        with pytest.raises(ConfigError):
            choose(course(round(0.9 * needed), lr=0.03), **given)

    def test_no_training_would_do(self):
        with pytest.raises(ConfigError, match="more than"):
            choose(course(1, lr=1e-9), strength=1e-4, momentum=0.9)

    def test_the_last_ripple_is_far_below_what_counts_as_zero(self):
        where, pull = course(30), choose(course(30), strength=None, momentum=None)
        assert (where.rates * where.tail(pull))[-1] * pull.strength / (1 - pull.momentum) == pytest.approx(1e-7)
        assert (where.tail(pull)[: where.tail_from] == 1.0).all()

    def test_masks_wait_for_the_warmup(self):
        assert (course().mask_from, course().mask_until, course().tail_from) == (500, 2500, 8000)
        short = course(10)  # three of ten epochs warm up
        assert (short.mask_from, short.mask_until) == (300, 500)
        assert course(5).mask_until == 250  # three of five: that would be too late to forget
