"""Shortcut removal: an equal network of stock rows, proven, whose terms lose channels independently."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import image, lively
from random_plans import random_keep
from test_checkpoints import random_image
from torch import nn
from torch.utils._pytree import tree_leaves
from ultralytics.nn.modules import SPPF, Bottleneck, C2f, Conv
from ultralytics.nn.tasks import DetectionModel

from yolo_prune.channels import Role
from yolo_prune.errors import CheckpointError, VerificationError
from yolo_prune.hosts.slim import widths
from yolo_prune.hosts.ultralytics.blocks import host_for
from yolo_prune.hosts.ultralytics.shortcuts import remove_shortcuts, walk
from yolo_prune.hosts.ultralytics.shortcuts.blocks import adds_its_input
from yolo_prune.hosts.ultralytics.sparsity import groups_in
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, verifier
from yolo_prune.surgery import counted_macs
from yolo_prune.surgery.equivalence import Equivalence, prove_equivalence


def outputs(model: nn.Module, *, structure: str) -> list[torch.Tensor]:
    """Run a copy of a model in fp64: `eval`, the twin heads of `train` with norms at rest, or batch statistics."""
    model = copy.deepcopy(model).double().train(structure != "eval")
    for module in model.modules():
        if structure == "train" and isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        result = model(image(batch=2))
    named = {name: buffer for name, buffer in model.named_buffers() if "running" in name}
    moved = [sorted(float(value.double().sum()) for value in named.values())] if structure == "batch" else []
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return [*leaves, *(torch.tensor(sums, dtype=torch.float64) for sums in moved)]


@pytest.fixture(scope="module")
def v8():
    return lively("yolov8n")


@pytest.fixture(scope="module")
def plain_v8(v8):
    return remove_shortcuts(v8).model


EXACT = ["yolov5n", "yolov5s", "yolov8n", "yolov8s", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"]


@pytest.mark.parametrize("name", [*EXACT, "yolov8n-pose"])
def test_nothing_changes_in_fp64(name):
    model = lively(name)
    before = copy.deepcopy(model.state_dict())
    exact = remove_shortcuts(copy.deepcopy(model).double())
    for structure in ("eval", "train"):
        expected, found = outputs(model, structure=structure), outputs(exact.model, structure=structure)
        assert len(expected) == len(found)
        for one, other in zip(expected, found, strict=True):
            assert one.std() > 0 or one.numel() == 1
            assert (one - other).abs().max() <= 1e-9
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_twin_heads_of_26_run_in_training():
    """The comparison above reaches both."""
    result = lively("yolo26n").train()(image().float())
    assert set(result) == {"one2many", "one2one"}


def test_batch_statistics_are_the_same_too(v8):
    """The norms of widened convolutions see what they saw before."""
    exact = remove_shortcuts(copy.deepcopy(v8).double()).model
    expected, found = outputs(v8, structure="batch"), outputs(exact, structure="batch")
    for one, other in zip(expected[:-1], found[:-1], strict=True):
        assert (one - other).abs().max() <= 1e-9
    assert float(expected[-1].sum()) == pytest.approx(float(found[-1].sum()), rel=1e-12)  # cv1's norm is split in two


class TestNorms:
    def test_widened_convolutions_keep_theirs(self, v8, plain_v8):
        """Layers of the first C2f with n=2, 4: halves, two bottlenecks, cv2."""
        first, second, *_ = [layer for layer in plain_v8.model if isinstance(layer, Bottleneck)][1:3]
        for block, old in ((first, v8.model[4].m[0]), (second, v8.model[4].m[1])):
            for name, value in old.cv1.bn.state_dict().items():
                assert torch.equal(block.cv1.bn.state_dict()[name], value)
        assert second.cv1.conv.in_channels == 2 * first.cv1.conv.in_channels
        assert torch.equal(second.cv1.conv.weight, torch.cat([v8.model[4].m[1].cv1.conv.weight] * 2, 1))

    def test_halves_share_it_out(self, v8, plain_v8):
        old, half = v8.model[2].cv1, v8.model[2].c
        for part, rows in ((plain_v8.model[2], slice(0, half)), (plain_v8.model[3], slice(half, None))):
            assert torch.equal(part.conv.weight, old.conv.weight[rows])
            for name in ("weight", "bias", "running_mean", "running_var"):
                assert torch.equal(getattr(part.bn, name), getattr(old.bn, name)[rows])
            assert (part.bn.eps, part.bn.momentum) == (old.bn.eps, old.bn.momentum)


class TestTable:
    @pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
    def test_is_the_host_s(self, name):
        model = remove_shortcuts(lively(name)).model
        for number, layer in enumerate(model.model):
            assert layer.i == number
            assert layer.type.rpartition(".")[2] == type(layer).__name__
            assert layer.np == sum(parameter.numel() for parameter in layer.parameters())
            read = [layer.f] if isinstance(layer.f, int) else layer.f
            assert all(at == -1 or at in model.save for at in read)
        assert model.save == sorted(set(model.save))
        assert min(model.model[-1].f) > 0  # distillation looks these layers up

    def test_yaml_tells_backbone_from_neck(self, plain_v8, v8):
        backbone = len(plain_v8.yaml["backbone"])
        assert isinstance(plain_v8.model[backbone - 1], SPPF)
        assert isinstance(plain_v8.model[backbone], nn.Upsample)
        assert backbone + len(plain_v8.yaml["head"]) == len(plain_v8.model)
        assert len(v8.yaml["backbone"]) == 10  # the source's is not touched
        graph = trace_model(plain_v8)
        parts = [set(groups_in(graph, plain_v8, (part,))) for part in ("backbone", "neck", "head")]
        assert all(parts)
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(graph.free_groups())

    def test_yaml_of_stock_widths_builds_the_network(self, plain_v8):
        built = DetectionModel(copy.deepcopy(plain_v8.yaml), nc=4, verbose=False)
        assert widths(built) == widths(plain_v8)
        with torch.no_grad():
            built.load_state_dict(plain_v8.state_dict())
            assert torch.equal(built.eval()(random_image())[0], plain_v8(random_image())[0])

    def test_blocks_without_a_shortcut_stay(self, v8, plain_v8):
        """v8's neck adds nothing: its C2f stay C2f."""
        kept = [layer for layer in plain_v8.model if type(layer) is C2f]
        assert len(kept) == sum(not layer.m[0].add for layer in v8.model if type(layer) is C2f) == 4
        assert not any(adds_its_input(module) for module in plain_v8.modules())


class TestGrowth:
    """MACs before pruning; METHODS: v5 s/m/l 1.04/1.09/1.15, v8 n/s/m/l 1.03/1.03/1.18/1.39, 11 n/m 1.02/1.07."""

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("yolov5s", 1.04),
            ("yolov8n", 1.03),
            ("yolov8m", 1.18),
            ("yolo11n", 1.02),
        ],
    )
    def test_of_macs(self, name, expected):
        model = DetectionModel(f"{name}.yaml", verbose=False).eval()
        macs = [counted_macs(one, image().float()) for one in (remove_shortcuts(model).model, model)]
        assert macs[0] / macs[1] == pytest.approx(expected, abs=0.006)

    def test_of_a_c2f(self, v8, plain_v8):
        """9c^2 (n + n(n+1)/2) weights in the bottlenecks instead of 18nc^2, and none more in cv2."""
        added = [block for block in v8.model if type(block) is C2f and block.m[0].add]
        rows = [layer for layer in plain_v8.model if type(layer) is Bottleneck]
        for block in added:
            n, own = len(block.m), [rows.pop(0) for _ in block.m]
            found = sum(layer.weight.numel() for one in own for layer in one.modules() if isinstance(layer, nn.Conv2d))
            assert found == 9 * block.c**2 * (n + n * (n + 1) // 2)
        inputs = {module.conv.in_channels for module in plain_v8.model if type(module) is Conv}
        assert {block.cv2.conv.in_channels for block in added} <= inputs


class TestIndependence:
    """What was added had to lose the same channels; now nothing has to."""

    def producers(self, model: Any) -> list[list[str]]:
        graph = trace_model(model)
        norms = set(graph.norms.values())
        return [
            [name for name, dim in group.axes if dim == 0 and name.endswith("conv.weight")
             and graph.axes[name, dim].role is Role.PRODUCER and name.rpartition(".")[0] not in norms]
            for group in graph.groups
        ]  # fmt: skip

    def test_no_group_has_two_producers(self, v8, plain_v8):
        assert max(map(len, self.producers(v8))) == 3  # y1, s1, s2
        assert max(map(len, self.producers(plain_v8))) == 1

    def test_terms_of_a_sum_are_cut_apart_and_proven(self, plain_v8):
        graph = trace_model(plain_v8)
        keep = random_keep(graph, 0)
        slim = slim_copy(plain_v8, graph, keep)
        assert verifier(plain_v8, graph).verify(slim, keep).require().max_abs_error <= 1e-9
        names = ["model.3.conv.weight", "model.4.cv2.conv.weight"]  # y1 and s1 of the first C2f
        kept = [keep[graph.axes[name, 0].channels].tolist() for name in names]
        assert kept[0] != kept[1]
        assert sum(kept[0]) != sum(kept[1])


class TestRefused:
    def test_shared_weights(self, v8):
        model = copy.deepcopy(v8)
        model.model[4].m[1].cv1.conv.weight = model.model[4].m[0].cv1.conv.weight
        with pytest.raises(CheckpointError, match=r"model\.4\.m\.1\.cv1\.conv\.weight' is shared"):
            remove_shortcuts(model)

    def test_a_forward_of_its_own(self, v8):
        class Other(DetectionModel):
            def predict(self, x, **_):
                return super().predict(x)

        model = copy.deepcopy(v8)
        model.__class__ = Other
        with pytest.raises(CheckpointError, match="Other runs its layers in a way of its own"):
            remove_shortcuts(model)

    def test_nothing_to_remove(self, plain_v8):
        with pytest.raises(CheckpointError, match="no layer adds its input"):
            remove_shortcuts(plain_v8)


class TestProof:
    def proof(self, model: nn.Module, rewritten: nn.Module) -> Equivalence:
        def again(one: nn.Module) -> nn.Module:
            return remove_shortcuts(one).model

        return prove_equivalence(model, rewritten, again, host=host_for(model), side_px=64)

    def test_holds(self, v8, plain_v8):
        proof = self.proof(v8, plain_v8).require()
        assert proof.max_abs_error <= 1e-11
        assert proof.own_max_abs_error <= 1e-11
        assert proof.rounded_max_abs_error <= 1e-3
        assert proof.response > 1.0

    def test_notices_a_weight_that_is_not_the_rewritten_one(self, v8, plain_v8):
        wrong = copy.deepcopy(plain_v8)
        wrong.model[4].cv1.conv.weight.data[0, 0, 0, 0] += 1e-6
        with pytest.raises(VerificationError, match=r"model\.4\.cv1\.conv\.weight' is not what rewriting gives"):
            self.proof(v8, wrong)

    def test_notices_a_wrong_rule(self, v8, monkeypatch):
        right = walk.widened
        monkeypatch.setattr(walk, "widened", lambda weight, value: right(weight, value).flip(1))
        with pytest.raises(VerificationError, match="original - rewritten"):
            self.proof(v8, remove_shortcuts(v8).model).require()

    def test_notices_that_a_layer_reads_the_wrong_one(self, v8):
        def twisted(one: nn.Module) -> nn.Module:
            model: Any = remove_shortcuts(one).model
            model.model[3].f = -1  # y1 from y0: the same shape
            model.model[3] = copy.deepcopy(model.model[3])
            model.model[3].conv.weight = nn.Parameter(model.model[3].conv.weight[:, :16].clone())
            model.model[3].conv.in_channels = 16
            return model

        with pytest.raises(VerificationError, match="original - rewritten"):
            prove_equivalence(v8, twisted(v8), twisted, host=host_for(v8), side_px=64).require()

    def test_weak_weights_prove_nothing(self):
        proof = Equivalence(
            max_abs_error=0.0, response=1e-9, own_max_abs_error=0.0, own_response=0.0, rounded_max_abs_error=0.0
        )
        with pytest.raises(VerificationError, match="hardly depend"):
            proof.require()

    @pytest.mark.parametrize("name", ["max_abs_error", "own_max_abs_error"])
    @pytest.mark.parametrize("error", [2e-9, float("nan")])
    def test_tolerance(self, name, error):
        values = dict.fromkeys(("max_abs_error", "own_max_abs_error", "rounded_max_abs_error"), 0.0) | {name: error}
        with pytest.raises(VerificationError, match="original - rewritten"):
            Equivalence(response=1.0, own_response=1.0, **values).require()
