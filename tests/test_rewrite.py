"""Shortcut removal: equal networks of stock layers whose channels may be cut apart."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TRAIN_ARGS, globals_named_in, save_as_host
from models import lively
from random_plans import random_keep
from test_checkpoints import in_stock_process, random_image
from test_training import WORDS
from torch import nn
from torch.utils._pytree import tree_leaves
from ultralytics.nn.modules import SPPF, Bottleneck, C2f, Conv
from ultralytics.nn.modules.block import RepBottleneck
from ultralytics.nn.tasks import DetectionModel

from yolo_prune.channels import Role
from yolo_prune.errors import CheckpointError, VerificationError
from yolo_prune.files import sha256
from yolo_prune.hosts.slim import MARKER, widths
from yolo_prune.hosts.ultralytics.blocks import host_for
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.shortcuts import LayerNote, remove_shortcuts, walk
from yolo_prune.hosts.ultralytics.shortcuts.blocks import adds_its_input
from yolo_prune.hosts.ultralytics.sparsity import groups_in
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, verifier
from yolo_prune.pipeline.rewrite import RewriteConfig, rewrite
from yolo_prune.surgery import counted_macs
from yolo_prune.surgery.equivalence import Equivalence, prove_equivalence

PARTS = {"Conv", "Concat", "Bottleneck", "SPPF"}
"""Stock classes of new rows."""


def image(side: int = 64, seed: int = 0, *, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, side, side, generator=generator, dtype=torch.float64)


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


EXACT = ["yolov5n", "yolov8n", "yolo11n", "yolov5s", "yolov8s", "yolo26n", "yolov9t", "yolov8n-pose"]


@pytest.mark.parametrize("name", EXACT)
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


def network(*head: list[Any], backbone: list[list[Any]] | None = None) -> DetectionModel:
    """Build a lively detector: a stem, a Bottleneck that adds, and what follows; the last row is the head's level."""
    rows = backbone or [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Bottleneck", [16]]]
    count = len(rows) + len(head)
    torch.manual_seed(0)
    config = {"nc": 4, "backbone": rows, "head": [*head, [[count - 1], 1, "Detect", ["nc"]]]}
    model = DetectionModel(config, verbose=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
    return model.eval()


def error_of(model: DetectionModel, rewritten: nn.Module) -> float:
    """Compare raw predictions in fp64; what the head reads is as wide as it is."""
    raw = []
    for one in (copy.deepcopy(model).double(), rewritten):
        with torch.no_grad():
            raw.append(tree_leaves(host_for(model).outputs(one(image()))))
    assert all(leaf.std() > 0 for leaf in raw[0])
    return max(float((one - other).abs().max()) for one, other in zip(*raw, strict=True))


def notes(found: Any) -> tuple[list[int], list[int]]:
    return [note.number for note in found.expanded], [note.number for note in found.left]


POOL = [-1, 1, "nn.MaxPool2d", [2, 2]]
ADDS = [-1, 1, "C2f", [16, True]]


class TestSumsThatLeaveALayer:
    @pytest.mark.parametrize(
        "rows",
        [
            ([-1, 1, "Conv", [24, 3, 2]],),
            ([-1, 1, "Bottleneck", [16]], [-1, 1, "Conv", [24, 1, 1]]),
            ([-1, 3, "Bottleneck", [16]], [-1, 1, "C3", [24]]),
            ([-1, 1, "C2f", [24, True]],),
            ([-1, 1, "C2f", [24]],),
            ([-1, 1, "SPPF", [16, 5, 3, True]], [-1, 1, "Conv", [24, 1, 1]]),
            ([-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [[-1, 0], 1, "Concat", [1]], [-1, 1, "C3", [24]]),
            ([[-1, 1], 1, "Concat", [1]], [-1, 1, "Bottleneck", [32]], [-1, 1, "Conv", [24, 1, 1]]),
            ([-1, 1, "RepNCSPELAN4", [32, 32, 16, 1]],),
        ],
        ids=["conv", "twice", "four times", "C2f", "C2f without", "SPPF", "upsampled", "concatenated", "ELAN"],
    )
    def test_are_carried_to_their_reader(self, rows):
        model = network(*rows)
        found = remove_shortcuts(copy.deepcopy(model).double())
        assert notes(found)[0][0] == 2
        assert not found.left
        assert not any(adds_its_input(module) for module in found.model.modules())
        assert error_of(model, found.model) <= 1e-12

    def test_reach_the_head(self):
        model = network()
        found = remove_shortcuts(copy.deepcopy(model).double())
        assert notes(found) == ([2], [])
        assert found.model.model[-1].cv2[0][0].conv.in_channels == 32
        assert error_of(model, found.model) <= 1e-12

    @pytest.mark.parametrize(
        ("row", "reader"),
        [
            (POOL, "MaxPool2d"),
            ([-1, 1, "DWConv", [16, 3, 1]], "DWConv"),
            ([-1, 1, "nn.SiLU", []], "SiLU"),
            ([-1, 1, "nn.Upsample", ["None", 2, "bilinear"]], "Upsample"),
        ],
        ids=["pool", "depthwise", "activation", "bilinear"],
    )
    def test_that_reach_something_else_stay(self, row, reader):
        model = network(row, ADDS)
        found = remove_shortcuts(copy.deepcopy(model).double())
        assert notes(found) == ([4], [2])
        assert f"layer 3 ({reader})" in found.left[0].reason
        assert error_of(model, found.model) <= 1e-12

    def test_stay_however_far_they_are_carried(self):
        """The sum of layer 2 goes on into the one of layer 3, and both through a concatenation to a pool."""
        model = network([-1, 1, "Bottleneck", [16]], [[-1, 1], 1, "Concat", [1]], POOL, ADDS)
        found = remove_shortcuts(copy.deepcopy(model).double())
        assert notes(found) == ([6], [2, 3])
        assert error_of(model, found.model) <= 1e-12

    def test_that_reach_a_block_which_keeps_its_own_stay(self):
        """Such a block adds its whole input to what it makes of it."""
        model = network([-1, 1, "A2C2f", [16, True, 1, True, 2.0, 2.0]], ADDS)
        found = remove_shortcuts(copy.deepcopy(model).double())
        assert notes(found) == ([4], [2, 3])
        assert "layer 3 (A2C2f)" in found.left[0].reason
        assert error_of(model, found.model) <= 1e-12

    def test_nothing_else_is_refused_with_the_reason(self):
        with pytest.raises(CheckpointError, match=r"nothing to remove.*layer 2 \(Bottleneck\).*layer 3 \(MaxPool2d\)"):
            remove_shortcuts(network(POOL))

    def test_that_begin_with_the_image_stay(self):
        """Only one layer of a table can read it."""
        model = network(ADDS, backbone=[[-1, 1, "C2f", [8, True]], [-1, 1, "Conv", [16, 3, 2]]])
        found = remove_shortcuts(copy.deepcopy(model).double())
        assert notes(found) == ([2], [0])
        assert "reads the image" in found.left[0].reason


class TestLeft:
    def test_attention_keeps_its_sums(self):
        found = remove_shortcuts(lively("yolo26n"))
        assert [(note.number, note.block) for note in found.left] == [(10, "C2PSA"), (22, "C3k2")]
        assert all("attention" in note.reason for note in found.left)
        assert 9 in notes(found)[0]  # SPPF's sum goes into C2PSA's first convolution
        psa = next(layer for layer in found.model.model if type(layer).__name__ == "C2PSA")
        assert psa.cv1.conv.in_channels == 2 * lively("yolo26n").model[10].cv1.conv.in_channels

    def test_depthwise_blocks_keep_theirs(self):
        left = remove_shortcuts(lively("yolov10n")).left
        assert [(note.block, "depthwise" in note.reason) for note in left] == [("PSA", False), ("C2fCIB", True)]

    def test_v9_keeps_its_two_branches(self):
        model = remove_shortcuts(lively("yolov9t")).model
        inner = [module.cv1 for module in model.modules() if isinstance(module, RepBottleneck)]
        assert any(branches.c1 == 2 * branches.c2 for branches in inner)  # the second of a sequence
        for branches in inner:
            assert branches.conv1.conv.in_channels == branches.conv2.conv.in_channels == branches.c1


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


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory, dense_checkpoint):
    """`dense_checkpoint` without shortcuts, and what was told of it."""
    return rewrite(RewriteConfig(model=str(dense_checkpoint), out=str(tmp_path_factory.mktemp("plain") / "plain.pt")))


@pytest.fixture
def plain(desk, plain_checkpoint):
    return Path(shutil.copy(plain_checkpoint.out, desk / "plain.pt"))


class TestCheckpoint:
    def test_names_torch_and_host_classes_only(self, plain):
        homes = {name.partition(".")[0] for name in globals_named_in(plain)}
        assert homes <= {"torch", "ultralytics", "collections", "__builtin__", "builtins"}

    def test_holds_what_the_host_expects(self, plain):
        content = torch.load(plain, weights_only=False)
        assert content["epoch"] == -1
        assert content["train_args"] == TRAIN_ARGS
        # Sums of weights are new numbers: half precision would round them.
        assert {parameter.dtype for parameter in content["model"].parameters()} == {torch.float32}

    def test_marker_says_where_it_comes_from(self, plain, plain_checkpoint, dense_checkpoint):
        model = read_checkpoint(plain).model
        marker = getattr(model, MARKER)
        assert marker["source_sha256"] == sha256(dense_checkpoint)
        assert marker["rewriting"] == "shortcuts=remove"
        assert marker["lineage"] == []
        assert marker["widths"] == widths(model)
        assert marker["after"]["params"] == sum(parameter.numel() for parameter in model.parameters())
        assert marker["after"]["macs"] == plain_checkpoint.after.macs > marker["before"]["macs"]

    def test_a_slim_source(self, slim_checkpoint, dense_checkpoint, tmp_path):
        done = rewrite(RewriteConfig(model=str(slim_checkpoint), out=str(tmp_path / "plain.pt")))
        marker = getattr(read_checkpoint(done.out).model, MARKER)
        assert marker["lineage"] == [sha256(dense_checkpoint)]
        assert "plan" not in marker
        assert done.proof.max_abs_error <= 1e-9

    @pytest.mark.slow
    def test_stock_ultralytics_gives_the_same_bits(self, plain, tmp_path_factory, dense_checkpoint):
        folder = in_stock_process(plain, tmp_path_factory.mktemp("stock"), safe_load="1")
        decoded, raw = torch.load(folder / "raw.pth")
        with torch.no_grad():
            expected, expected_raw = remove_shortcuts(read_checkpoint(dense_checkpoint).model).model(random_image())
        assert torch.equal(decoded, expected)
        assert torch.equal(raw["scores"], expected_raw["scores"])
        assert len(torch.load(folder / "boxes.pth")) > 0


class TestCommand:
    def test_tells_growth_and_proof(self, command, dense):
        outcome = command("rewrite", "shortcuts=remove", f"model={dense}", "out=plain.pt", "json=told.json")
        assert outcome.code == 0, outcome.err
        assert "shortcuts removed from layers 2 (C2f), 4 (C2f), 6 (C2f), 8 (C2f)" in outcome.out
        assert "1.029x" in outcome.out
        told = json.loads(Path("told.json").read_text())
        assert told["proof"]["max_abs_error"] <= 1e-9
        assert told["after"]["macs"] / told["before"]["macs"] == pytest.approx(1.029, abs=5e-4)
        assert told["left"] == []
        assert Path("plain.pt").is_file()

    def test_names_what_stays(self, plain_checkpoint):
        left = (LayerNote(number=10, block="C2PSA", reason="attention"),)
        table = dataclasses.replace(plain_checkpoint, left=left).table()
        assert "left as it is: layer 10 (C2PSA): attention\n" in table
        assert table.count("left as it is") == 1

    def test_bad_input_is_refused(self, refused, dense, plain):
        assert "unknown shortcuts 'keep'" in refused("rewrite", f"model={dense}", "out=new.pt", "shortcuts=keep")
        assert "already exists" in refused("rewrite", f"model={dense}", "out=plain.pt")
        assert "imgsz=70" in refused("rewrite", f"model={dense}", "out=new.pt", "imgsz=70")
        assert "same path" in refused("rewrite", f"model={dense}", "out=new.pt", "json=new.pt")
        assert "nothing to remove" in refused("rewrite", f"model={plain}", "out=new.pt")

    def test_fused_is_refused(self, refused, desk):
        fused = save_as_host(copy.deepcopy(lively("yolov8n")).fuse(verbose=False), desk / "fused.pt")
        assert "is fused" in refused("rewrite", f"model={fused}", "out=new.pt")

    def test_nothing_is_written_where_the_proof_fails(self, command, dense, monkeypatch):
        right = walk.widened
        monkeypatch.setattr(walk, "widened", lambda weight, value: right(weight, value).flip(1))
        assert command("rewrite", f"model={dense}", "out=new.pt").code == 1
        assert not Path("new.pt").exists()


class TestGoesOn:
    """Every other command works on the result."""

    @pytest.mark.slow
    def test_prune_inspect_and_export(self, command, plain):
        assert command("prune", f"model={plain}", "out=slim.pt", "target_macs=0.6").code == 0
        before, after = (read_checkpoint(path).model for path in (plain, Path("slim.pt")))
        assert sum(size[0] for size in widths(after).values()) < sum(size[0] for size in widths(before).values())
        assert "can be pruned" in command("inspect", "model=slim.pt", "picture=picture.html").out
        outcome = command("export", "model=slim.pt", "out=artefacts", "imgsz=64", "json=parity.json")
        assert outcome.code == 0, outcome.err

    @pytest.mark.slow
    def test_finetune_and_evaluate(self, command, plain, data, desk):
        words = [f"data={data}", "epochs=1", f"project={desk / 'runs'}", "name=tuned", *WORDS]
        outcome = command("finetune", f"model={plain}", *words)
        assert outcome.code == 0, outcome.err
        best = desk / "runs" / "tuned" / "weights" / "best.pt"
        tuned, before = (read_checkpoint(path).model for path in (best, plain))
        assert widths(tuned) == widths(before)
        assert not any(adds_its_input(module) for module in tuned.modules())
        assert not torch.equal(tuned.model[4].cv1.conv.weight, before.model[4].cv1.conv.weight)  # it was trained
        assert getattr(tuned, MARKER)["rewriting"] == "shortcuts=remove"
        assert command("evaluate", f"model={best}", f"data={data}", "imgsz=64").code == 0
