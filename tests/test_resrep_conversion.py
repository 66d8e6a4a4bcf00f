"""ResRep: which convolutions have a compactor, and that the converted network is the trained one."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import lively
from resrep_cases import forgetting_of, small_network, weights_of, with_compactors
from torch import nn
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.tasks import DetectionModel

from yolo_prune.channels.forward import forward_unchanged, output_tensors
from yolo_prune.errors import VerificationError
from yolo_prune.hosts.slim import MARKER, is_slim, mark, unfinished
from yolo_prune.hosts.ultralytics.blocks import host_for
from yolo_prune.hosts.ultralytics.compactors import without_compactors
from yolo_prune.hosts.ultralytics.resrep_conversion import Conversion
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.methods.resrep.schedule import (
    GONE,
)
from yolo_prune.methods.resrep.targets import maskable
from yolo_prune.surgery.compactor import compactor_of, insert_compactor, merge_compactor


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


def test_without_compactors_a_network_is_what_it_was():
    model = lively("yolov8n")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with_compactors(model)
    assert model.state_dict().keys() != before.keys()
    after = without_compactors(model).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
