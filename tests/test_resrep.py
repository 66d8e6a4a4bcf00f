"""ResRep: what is merged is exact, what is masked forgets as was foretold, and a training ends with a slim network."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import globals_named_in, save_as_host
from model_cases import enliven
from models import lively
from shapes import draw_dataset
from test_training import KILLED, epochs_in
from torch import nn
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.tasks import DetectionModel

from yolo_prune.allocation import Constraints
from yolo_prune.channels import ChannelGraph
from yolo_prune.channels.forward import forward_unchanged, output_tensors
from yolo_prune.cli import main
from yolo_prune.errors import ConfigError, VerificationError
from yolo_prune.hosts.slim import MARKER, is_slim, mark, unfinished, widths
from yolo_prune.hosts.ultralytics.blocks import host_for
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint, unpickle
from yolo_prune.hosts.ultralytics.compactors import frozen_names, suitable, without_compactors
from yolo_prune.hosts.ultralytics.resrep import ResRepTraining
from yolo_prune.hosts.ultralytics.resrep_conversion import Conversion
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.hosts.ultralytics.trainer import train
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
    Course,
    Pull,
    choose,
    forgetting_rates,
    is_enough,
    simulate,
    travel,
)
from yolo_prune.methods.resrep.targets import maskable, prunable, sole_producers
from yolo_prune.surgery.compactor import compactor_of, insert_compactor, merge_compactor

FLOORS = {"min_channels": 4, "round_to": 4}


def block(seed: int, *, eps: float = 1e-3) -> Conv:
    """A stock block whose norm is far from the identity, with scales of both signs."""
    torch.manual_seed(seed)
    made = Conv(5, 7, 3)
    norm = made.bn
    norm.eps = eps
    for tensor, (low, high) in ((norm.running_mean, (-1, 1)), (norm.running_var, (0.01, 3)), (norm.weight, (-2, 2))):
        nn.init.uniform_(tensor, low, high)
    nn.init.normal_(norm.bias)
    return made.double().eval()


IMAGE = torch.rand(2, 5, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class TestMerging:
    def test_a_new_compactor_changes_nothing(self):
        plain = block(0)
        with_one = copy.deepcopy(plain)
        compactor = insert_compactor(with_one)
        assert compactor_of(with_one) is compactor
        assert compactor_of(plain) is None
        assert torch.equal(with_one(IMAGE), plain(IMAGE))

    @pytest.mark.parametrize("eps", [1e-3, 1e-5])
    @pytest.mark.parametrize("seed", range(3))
    def test_what_is_merged_computes_the_same(self, seed, eps):
        found = block(seed, eps=eps)
        nn.init.normal_(insert_compactor(found).weight)
        with torch.no_grad():
            found.bn[1].weight[2] = 0.0  # silent
            found.bn[1].weight[3] *= 1e-7  # as good as
        expected = found(IMAGE)
        merge_compactor(found)
        assert isinstance(found.bn, nn.BatchNorm2d)
        assert found.bn.eps == eps
        torch.testing.assert_close(found(IMAGE), expected, rtol=0, atol=1e-12)
        assert not found(IMAGE)[:, 2].any()
        assert found.conv.weight[3].abs().max() > 1e-3  # its size is in the norm, so half precision has its filters

    def test_an_identity_gives_the_block_back(self):
        """And with it the statistics that further training goes on from."""
        plain = block(0)
        nn.init.uniform_(plain.bn.weight, 0.5, 1.5)
        found = copy.deepcopy(plain)
        insert_compactor(found)
        merge_compactor(found)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], value)

    def test_scales_that_are_all_zero(self):
        found = block(0)
        insert_compactor(found)
        nn.init.zeros_(found.bn[0].weight)
        expected = found(IMAGE)
        merge_compactor(found)
        torch.testing.assert_close(found(IMAGE), expected, rtol=0, atol=1e-12)

    def test_statistics_are_those_of_the_data(self):
        """Where channels are uncorrelated, what batches would show is what the merged norm says they show."""
        torch.manual_seed(0)
        found = Conv(64, 4, 1).double()
        nn.init.orthogonal_(found.conv.weight)  # uncorrelated outputs of uncorrelated inputs
        data = torch.randn(64, 64, 32, 32, dtype=torch.float64)
        found.bn.momentum = None
        with torch.no_grad():
            found.train()(data)
        nn.init.normal_(insert_compactor(found.eval()).weight)
        merge_compactor(found)
        with torch.no_grad():
            variance, mean = torch.var_mean(found.conv(data), dim=(0, 2, 3))
        torch.testing.assert_close(found.bn.running_mean, mean, rtol=0, atol=1e-2)
        torch.testing.assert_close(found.bn.running_var, variance, rtol=0.03, atol=0)


def with_compactors(model: Any) -> tuple[ChannelGraph, dict[str, Any]]:
    """Give a model compactors; return the graph that it had before and the channels of their rows."""
    graph = trace_model(model)
    found = {path: channels for path, channels in sole_producers(graph).items() if path in suitable(model, [])}
    targets = prunable(graph, found, Constraints(**FLOORS))
    for path in targets:
        insert_compactor(model.get_submodule(path.removesuffix(".conv")))
    return graph, targets


def weights_of(model: nn.Module, targets: Any) -> dict[str, nn.Parameter]:
    return {path: model.get_submodule(path.removesuffix(".conv")).bn[1].weight for path in targets}


def course(epochs: int = 100, batches: int = 100, **more: Any) -> Course:
    settings = {"warmup_epochs": 3.0, "accumulate": 1, "lr": 0.01}
    lf = lambda epoch: max(1 - epoch / epochs, 0) * 0.99 + 0.01  # noqa: E731  # the host's
    return Course(epochs=epochs, batches=batches, factor=lf, **{**settings, **more})


def forgetting_of(model: nn.Module, graph: ChannelGraph, targets: Any, **more: Any) -> Forgetting:
    settings = {"course": course(), "pull": Pull(strength=1e-3, momentum=0.9), "target": 0.5, "imgsz_px": 64}
    settings |= {"constraints": Constraints(**FLOORS), "interval": 1, **more}
    return Forgetting(graph, targets, weights_of(model, targets), **settings)


def outputs(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    return output_tensors(host_for(model).outputs(forward_unchanged(model, image, training=False)))


SMALL_IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
RECORD = {"options": {"target": 0.5, "constraints": {}}, "strength": 1e-4, "momentum": 0.99, "imgsz_px": 64}


class TestConversion:
    @pytest.fixture(scope="class", params=["yolov5n", "yolov8n", "yolo11n", "yolo26n"])
    def trained(self, request):
        """A network as training leaves it: compactors of any numbers, masked rows of zeros; and what was masked."""
        model = lively(request.param)
        graph, targets = with_compactors(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in weights_of(model, targets).values():
                rows = torch.randn(weight.shape, generator=generator) / math.sqrt(len(weight))
                weight.add_(0.3 * rows).mul_(torch.rand(len(weight), 1, 1, 1, generator=generator) + 0.1)
        forgetting = forgetting_of(model, graph, targets)
        forgetting.masked = forgetting._chosen(0.6)
        rows = forgetting.masked_rows()
        with torch.no_grad():
            for path, weight in weights_of(model, targets).items():
                weight[rows[path]] = 0.0
        mark(model, unfinished="resrep", resrep={"masked": rows, "gone": True, "settled": True, "strength": 1.0})
        return model, graph

    def test_the_slim_network_is_the_one_with_compactors(self, trained, tmp_path):
        model, graph = trained
        (tmp_path / "source.pt").write_bytes(b"the last checkpoint")
        conversion = Conversion(RECORD, tmp_path / "source.pt")
        slim = conversion.convert({"ema": copy.deepcopy(model), "epoch": 3, "optimizer": {}})["ema"]
        figures = conversion.figures
        assert figures["difference"] < 1e-9  # fp64, at outputs of hundreds
        assert figures["max_abs_error"] < 1e-9
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
        for before, after in zip(outputs(model, image), outputs(slim, image), strict=True):
            assert (before - after).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))
        plan = conversion.plan
        assert plan.before.macs == round(float(graph.cost.macs(graph.widths(), imgsz_px=64)))
        slim_graph = trace_model(slim)
        assert plan.after.macs == round(float(slim_graph.cost.macs(slim_graph.widths(), imgsz_px=64)))
        assert 0.5 < plan.after.macs / plan.before.macs <= 0.6
        assert is_slim(slim)
        assert unfinished(slim) is None
        assert not [module for module in slim.modules() if compactor_of(module) is not None]

    def test_rows_that_still_make_something_are_no_ones_to_cut(self, trained, tmp_path):
        model = copy.deepcopy(trained[0])
        state = getattr(model, MARKER)["resrep"]["masked"]
        path = next(path for path, rows in state.items() if rows)
        with torch.no_grad():
            model.get_submodule(path.removesuffix(".conv")).bn[1].weight[state[path][0], 0] = 2 * GONE
        (tmp_path / "source.pt").write_bytes(b"")
        with pytest.raises(VerificationError, match=r"largest masked row has norm 2\.0e-05"):
            Conversion(RECORD, tmp_path / "source.pt").convert({"ema": model})


def test_of_a_distilled_network_the_student_is_converted(tmp_path):
    """The host's wrapper goes with its teacher: what is deployed is the student."""
    model = small_network()
    targets = with_compactors(model)[1]
    path, rows = "model.0.conv", [1, 2, 5, 6]
    with torch.no_grad():
        weights_of(model, targets)[path][rows] = 0.0
    mark(model, unfinished="resrep", resrep={"masked": {path: rows}, "gone": True})
    model.args = SimpleNamespace(imgsz=64, dis=6.0)
    wrapper = DistillationModel(teacher_model=small_network(), student_model=copy.deepcopy(model))
    (tmp_path / "source.pt").write_bytes(b"")
    found = Conversion(RECORD, tmp_path / "source.pt").convert({"ema": wrapper, "model": None})["ema"]
    assert type(found) is DetectionModel
    assert found.model[0].conv.out_channels == 4
    for expected, slim in zip(outputs(model, SMALL_IMAGE), outputs(found, SMALL_IMAGE), strict=True):
        torch.testing.assert_close(slim, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


class TestTargets:
    def test_shared_channels_have_no_compactor(self):
        """By hand: C2f's halves and what its shortcut adds; attention's keys and values; layers before depthwise."""
        model = lively("yolov8n")
        graph, targets = with_compactors(model)
        blocks = {path.removesuffix(".conv") for path in targets}
        assert {"model.0", "model.2.m.0.cv1", "model.3", "model.12.cv1", "model.12.cv2", "model.22.cv2.0.0"} <= blocks
        assert not {"model.2.cv1", "model.2.m.0.cv2", "model.4.m.1.cv2"} & blocks
        writers = np.zeros(graph.channel_count, dtype=int)
        for (name, _), axis in graph.axes.items():
            if name.endswith("conv.weight") and axis.role.value == "producer":
                np.add.at(writers, axis.channels, 1)
        assert all((writers[channels] == 1).all() for channels in targets.values())
        locked = maskable(graph, targets)
        made = set(np.concatenate(list(targets.values())))
        assert all(set(locked.groups[index].channels) <= made for index in locked.free_groups())

    @pytest.mark.parametrize("name", ["yolo11n", "yolov10n"])
    def test_a_row_of_zeros_silences_its_channel(self, name):
        """Whatever the weights that read it: every consumer of a masked channel is spoilt, and nothing changes."""
        model = lively(name).double()
        graph, targets = with_compactors(model)
        spoilt = copy.deepcopy(model)
        rng = np.random.default_rng(0)
        masked = np.zeros(graph.channel_count, dtype=bool)
        for channels in targets.values():
            masked[rng.choice(channels, len(channels) // 3, replace=False)] = True
        for network in (model, spoilt):
            with torch.no_grad():
                for path, weight in weights_of(network, targets).items():
                    weight[torch.from_numpy(masked[targets[path]])] = 0.0
        parameters = dict(spoilt.named_parameters())
        with torch.no_grad():
            for (tensor, dim), axis in graph.axes.items():
                if axis.role.value == "consumer" and dim == 1 and axis.groups == 1:
                    parameters[tensor][:, torch.from_numpy(masked[axis.channels])] += 1.0
        image = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        pairs = zip(outputs(model, image), outputs(spoilt, image), strict=True)
        assert all((one - other).abs().max() < 1e-9 for one, other in pairs)


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


SMALL = {
    "nc": 4,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C2f", [16, True]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, False]],
        [-1, 1, "Conv", [32, 3, 2]],
    ],
    "head": [[[5], 1, "Detect", ["nc"]]],
}
"""A detector of one level that trains fast: free layers, a shortcut, a block without one."""


def small_network() -> DetectionModel:
    torch.manual_seed(0)
    model = DetectionModel(copy.deepcopy(SMALL), verbose=False)
    enliven(model)
    return model.eval()


@pytest.fixture(scope="module")
def dense_small(tmp_path_factory) -> Path:
    return save_as_host(small_network(), tmp_path_factory.mktemp("small") / "dense.pt")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """The data yaml of 32 images: as many steps an epoch, so that four epochs are enough to forget in."""
    return draw_dataset(tmp_path_factory.mktemp("drawn") / "shapes", seed=0, train=32, val=4, test=1, imgsz_px=64)


QUICK = {"imgsz": 64, "batch": 1, "nbs": 1, "workers": 0, "plots": False, "device": "cpu", "verbose": False, "seed": 0}
QUICK |= {"warmup_epochs": 0.5, "optimizer": "SGD", "lr0": 0.01, "epochs": 4}


def words_for(model: Path, data: Path, folder: Path, **more: Any) -> list[str]:
    settings = {**QUICK, **FLOORS, "method": "resrep", "target_macs": 0.6, "project": folder, "name": "a", **more}
    return ["train", f"model={model}", f"data={data}", *(f"{key}={value}" for key, value in settings.items())]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "resrep.json").read_text())


class Steps:
    """Notes at each optimizer step the iteration and the settings of two parameter groups, as the step sees them."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Any], dict[str, Any]]] = []
        self.callbacks = {"on_train_batch_start": self.count, "on_pretrain_routine_end": self.hook}
        self.iteration = -1

    def count(self, _: Any) -> None:
        self.iteration += 1

    def hook(self, trainer: Any) -> None:
        trainer.optimizer.register_step_post_hook(self.note)

    def note(self, optimizer: Any, *_: Any) -> None:
        groups = {group["param_group"]: {**group, "params": None} for group in optimizer.param_groups}
        self.seen.append((self.iteration, groups["weight"], groups.get("compactor", {})))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dense_small, drawn):
    """A training that nobody killed, with the command line's words; its folder."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(words_for(dense_small, drawn, folder)) == 0
    return folder / "a"


def macs_in(path: Path) -> float:
    graph = trace_model(read_checkpoint(path).model)
    return float(graph.cost.macs(graph.widths(), imgsz_px=64))


@pytest.mark.slow
class TestTraining:
    def test_ends_with_slim_stock_checkpoints_of_the_target(self, whole, dense_small):
        assert epochs_in(whole) == [1, 2, 3, 4]
        record, dense = record_of(whole), macs_in(dense_small)
        for name in ("best.pt", "last.pt"):
            path = whole / "weights" / name
            assert 0.5 < macs_in(path) / dense <= 0.6
            model = read_checkpoint(path).model
            marker = getattr(model, MARKER)
            assert marker["after"]["macs"] == macs_in(path)
            assert marker["widths"] == widths(model)
            assert marker["plan"]["choice"]["method"] == "resrep"
            assert unfinished(model) is None
            assert not any("yolo_prune" in name for name in globals_named_in(path))
        assert record["converted"]["macs"] == macs_in(path) / dense == record["epochs"][-1]["macs"]
        assert record["converted"]["difference"] < 1e-9
        assert record["converted"]["max_abs_error"] < 1e-9

    def test_the_record_tells_how_rows_went(self, whole):
        rows = record_of(whole)["epochs"]
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
        assert [row["settled"] for row in rows] == [False, True, True, True]
        assert not rows[2]["gone"]
        assert rows[-1]["gone"]
        assert rows[-1]["largest_masked"] == 0.0
        assert rows[-1]["smallest_kept"] > 0.5
        masked = [row["masked"] for row in rows]
        assert masked == sorted(masked)

    def test_what_was_converted_is_kept_and_read_by_nobody_else(self, whole, command):
        left = whole / "weights" / "compactors.pt"
        content = unpickle(left)
        assert unfinished(content["ema"]) == "resrep"
        assert not any("yolo_prune" in name for name in globals_named_in(left))
        outcome = command("inspect", f"model={left}")
        assert outcome.code == 2
        assert "method=resrep" in outcome.err

    def test_the_group_of_the_compactors_and_the_foretold_rates(self, dense_small, drawn, tmp_path):
        """Through warm-up too, in which the host sets momentum and learning rate of every group; two batches a step."""
        steps = Steps()
        options = ResRepOptions(target=0.6, constraints=Constraints(**FLOORS))
        training = ResRepTraining(options)
        settings = {**QUICK, "nbs": 2, "epochs": 2, "lr0": 0.1, "warmup_epochs": 1.0, "momentum": 0.9}
        caught: list[Course] = []

        def catch(_: Any) -> None:
            caught.append(training._forgetting.course)

        # Too few steps to forget in, so what chooses is told that they were more.
        training._chosen = lambda _: Pull(strength=0.01, momentum=0.25)  # type: ignore[method-assign]
        callbacks = [training.callbacks(), steps.callbacks, {"on_train_start": catch}]
        with pytest.raises(VerificationError, match="largest masked row"):
            train(dense_small, callbacks=callbacks, data=str(drawn), project=str(tmp_path), name="a", **settings)
        (where,) = caught
        assert [iteration for iteration, _, _ in steps.seen] == where.steps.tolist()
        assert len(where.steps) < where.iterations == 64
        for iteration, host, ours in steps.seen:
            assert host["lr"] == pytest.approx(where.rates[iteration], rel=1e-12)
            tail = where.tail(Pull(strength=0.01, momentum=0.25))[iteration]
            assert ours["lr"] == pytest.approx(where.rates[iteration] * tail, rel=1e-12)
            assert (ours["momentum"], ours["weight_decay"], ours["nesterov"]) == (0.25, 0.0, False)
        assert steps.seen[0][1]["momentum"] == 0.8
        assert unfinished(unpickle(tmp_path / "a" / "weights" / "last.pt")["ema"]) == "resrep"  # nothing was converted

    def test_killed_and_resumed_it_ends_the_same(self, command, whole, dense_small, drawn, tmp_path):
        """Killed in the third epoch: masks have settled, no row is gone."""
        kill = [sys.executable, KILLED, "on_train_batch_end", "75", *words_for(dense_small, drawn, tmp_path)]
        done = subprocess.run(kill, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        folder = tmp_path / "a"
        assert command("prune", f"model={folder / 'weights' / 'last.pt'}", "target_macs=0.5", "out=x.pt").code == 2
        assert command("train", f"model={folder / 'weights' / 'last.pt'}", "resume=true").code == 0
        assert epochs_in(folder) == epochs_in(whole)
        assert [row["epoch"] for row in record_of(folder)["epochs"]] == [1, 2, 3, 4]
        for name in ("best.pt", "last.pt"):
            found, expected = (read_checkpoint(run / "weights" / name).model for run in (folder, whole))
            assert widths(found) == widths(expected)

    @pytest.mark.parametrize("converted", ["none", "best"])
    def test_killed_before_or_between_its_conversions_it_is_finished(self, command, whole, tmp_path, converted):
        folder = Path(shutil.copytree(whole, tmp_path / "a"))
        weights = folder / "weights"
        shutil.copy(weights / "compactors.pt", weights / "last.pt")
        if converted == "none":
            shutil.copy(weights / "compactors.pt", weights / "best.pt")
            (weights / "compactors.pt").unlink()
        outcome = command("train", f"model={weights / 'last.pt'}", "resume=true")
        assert outcome.code == 0
        assert str(weights / "best.pt") in outcome.out
        assert (weights / "compactors.pt").is_file()
        for name in ("best.pt", "last.pt"):
            found, expected = (read_checkpoint(run / "weights" / name).model for run in (folder, whole))
            assert widths(found) == widths(expected)
            assert unpickle(weights / name)["optimizer"] is None
        assert "no training to resume" in command("train", f"model={weights / 'last.pt'}", "resume=true").err

    def test_a_best_one_of_an_earlier_stage_becomes_the_last_one(self, command, whole, tmp_path):
        folder = Path(shutil.copytree(whole, tmp_path / "a"))
        weights = folder / "weights"
        shutil.copy(weights / "compactors.pt", weights / "last.pt")
        content = unpickle(weights / "compactors.pt")
        getattr(content["ema"], MARKER)["resrep"]["gone"] = False
        torch.save(content, weights / "best.pt")
        assert command("train", f"model={weights / 'last.pt'}", "resume=true").code == 0
        best, last = (read_checkpoint(weights / name).model.state_dict() for name in ("best.pt", "last.pt"))
        assert all(torch.equal(best[name], last[name]) for name in last)

    def test_without_the_record_of_its_folder_nothing_is_resumed(self, command, whole, tmp_path):
        folder = Path(shutil.copytree(whole, tmp_path / "a"))
        shutil.copy(folder / "weights" / "compactors.pt", folder / "weights" / "last.pt")
        (folder / "resrep.json").unlink()
        outcome = command("train", f"model={folder / 'weights' / 'last.pt'}", "resume=true")
        assert outcome.code == 2
        assert "resrep.json" in outcome.err


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["method=resrep"], "'target_macs=' is required"),
            (["method=resrp", "target_macs=0.5"], "unknown method 'resrp'"),
            (["method=resrep", "target_macs=1.5"], "target_macs=1.5"),
            (["method=resrep", "target_macs=0.5", "resrep.strength=weak"], "resrep.strength=weak"),
            (["method=resrep", "target_macs=0.5", "resrep.strength=0"], "resrep.strength=0"),
            (["method=resrep", "target_macs=0.5", "resrep.momentum=1"], "resrep.momentum=1"),
            (["method=resrep", "target_macs=0.5", "resrep.interval=0"], "resrep.interval=0"),
            (["method=resrep", "target_macs=0.5", "criterion=l1"], "criterion=l1 without"),
            (["method=resrep", "target_macs=0.5", "sparsity=auto"], "resrep alone"),
            (["method=resrep", "target_macs=0.5", "prune_every=1"], "resrep alone"),
            (["resrep.interval=3"], "resrep.interval=3 without method=resrep"),
            (["target_macs=0.5"], "'prune_every=' is required"),
        ],
    )
    def test_settings(self, command, dense_small, drawn, words, said):
        outcome = command("train", f"model={dense_small}", f"data={drawn}", *words)
        assert outcome.code == 2
        assert said in outcome.err

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"target_macs": 0.05}, "target_macs=0.05 cannot be reached with method=resrep"),
            ({"epochs": 1}, "are too few for resrep.strength=auto"),
            ({"resrep.strength": 0.1}, "are too few for resrep.strength=0.1"),
            ({"optimizer": "AdamW"}, "method=resrep with AdamW"),
            ({"compile": "true"}, "method=resrep with compile="),
            ({"time": 0.1}, "method=resrep with time="),
            ({"freeze": 6}, "cannot be reached"),
        ],
    )
    def test_trainings_before_their_first_epoch(self, command, dense_small, drawn, tmp_path, more, said):
        outcome = command(*words_for(dense_small, drawn, tmp_path, **more))
        assert outcome.code == 2
        assert said in outcome.err
        assert not list((tmp_path / "a").glob("results.csv"))
        assert not list((tmp_path / "a").glob("resrep*"))

    def test_the_reachable_target_is_named_and_reached(self, command, dense_small, drawn, tmp_path):
        said = command(*words_for(dense_small, drawn, tmp_path, target_macs=0.05)).err
        least = float(re.search(r"at least (0\.\d+)", said)[1])
        model = small_network()
        graph, targets = with_compactors(model)
        forgetting = forgetting_of(model, graph, targets)
        masked = forgetting._chosen(least)
        assert graph.cost.macs(graph.kept_widths(~masked)) <= least * graph.cost.macs(graph.widths())

    def test_frozen_layers_have_no_compactors(self):
        model = lively("yolov8n")
        paths = suitable(model, frozen_names([0, 2]))
        assert "model.0.conv" not in paths
        assert not [path for path in paths if path.startswith("model.2.")]
        assert "model.22.cv2.0.0.conv" in paths
        assert frozen_names(2) == ["model.0.", "model.1."]
        assert frozen_names(None) == []


def test_without_compactors_a_network_is_what_it_was():
    model = lively("yolov8n")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with_compactors(model)
    assert model.state_dict().keys() != before.keys()
    after = without_compactors(model).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
