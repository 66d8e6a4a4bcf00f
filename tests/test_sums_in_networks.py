"""Sums that leave a layer: carried to convolutions, or left as they are where something else reads them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import image, lively
from torch import nn
from torch.utils._pytree import tree_leaves
from ultralytics.nn.modules.block import RepBottleneck
from ultralytics.nn.tasks import DetectionModel

from yolo_prune.errors import CheckpointError
from yolo_prune.hosts.ultralytics.blocks import host_for
from yolo_prune.hosts.ultralytics.shortcuts import remove_shortcuts
from yolo_prune.hosts.ultralytics.shortcuts.blocks import adds_its_input


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
