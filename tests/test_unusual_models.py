"""Models that are not as expected: the engine is right about them, or refuses them clearly."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoint_files import save_as_host
from models import lively
from random_plans import random_keep
from torch import Tensor, nn
from toys import act, build, conv

from yolo_prune.channels import ChannelGraph, trace
from yolo_prune.errors import CheckpointError, TraceError, VerificationError
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.surgery import TOLERANCE, Verifier, apply, counted_macs

IMAGE = torch.zeros(1, 3, 8, 8)


class Chosen(nn.Sequential):
    """Another branch for bright images."""

    def __init__(self, condition) -> None:
        super().__init__(conv(3, 4), conv(4, 4), conv(4, 2))
        self.condition = condition

    def forward(self, x: Tensor) -> Tensor:
        x = act(self[0](x))
        return self[2](act(self[1](x)) if self.condition(x) else x)


CONDITIONS = {
    "if tensor": lambda x: x.mean() > 0.5,
    "item": lambda x: x.max().item() > 0.5,
    "float": lambda x: float(x.sum()) > 0.5,
    "int": lambda x: int(x.argmax()) > 3,
    "any": lambda x: (x > 0).any(),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_control_flow_that_depends_on_the_image_is_refused(name: str) -> None:
    with pytest.raises(TraceError, match="reads a value of an activation into Python") as error:
        trace(Chosen(CONDITIONS[name]), IMAGE)
    assert "torch.where" in str(error.value) or "tensor operators" in str(error.value)


@pytest.mark.parametrize("condition", [lambda image: image.shape[1] == 4, lambda _: torch.ones(1).item() > 0])
def test_control_flow_that_does_not_is_not(condition) -> None:
    graph = trace(Chosen(condition), IMAGE)
    assert len(graph.free_groups()) == 2


def test_a_branch_that_did_not_run_locks_what_could_feed_it() -> None:
    graph = trace(Chosen(lambda _: False), IMAGE)
    assert graph.report.untraced_parameters == ("1.weight",)
    assert not graph.free_groups()


def test_a_forward_that_fails_is_refused_with_its_own_words() -> None:
    with pytest.raises(TraceError, match=r"forward failed on an input of shape \(1, 3, 8, 8\).*expected input"):
        trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(5, 2, 1)), IMAGE)


def proven(model: nn.Module) -> tuple[ChannelGraph, nn.Module]:
    graph = trace(model, IMAGE)
    keep = random_keep(graph, 0, low=0.3, high=0.5)
    assert not keep.all()
    slim = apply(model, graph, keep)
    assert Verifier(model, graph).verify(slim, keep).require().max_abs_error <= TOLERANCE
    return graph, slim


def test_a_layer_that_runs_twice_and_a_weight_that_two_layers_hold() -> None:
    _, slim = proven(build("Shared"))
    assert slim.c.weight is slim.d.weight


def test_a_module_that_is_registered_twice() -> None:
    model = build("Residual")
    model.alias = model.b
    _, slim = proven(model)
    assert slim.alias is slim.b


def test_buffers_that_hold_no_floats_stay_as_they_are() -> None:
    model = build("Picked")
    model.register_buffer("seen", torch.tensor(7))
    model.register_buffer("flags", torch.tensor([True, False]))
    _, slim = proven(model)
    assert slim.order.dtype == torch.int64
    assert torch.equal(slim.order, model.order)
    assert slim.seen == 7
    assert slim.flags.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type_give_the_same_groups(dtype: torch.dtype) -> None:
    model = build("Chain")
    expected = trace(model, IMAGE)
    graph = trace(copy.deepcopy(model).to(dtype), IMAGE)
    assert [(group.name, group.width, group.lock) for group in graph.groups] == [
        (group.name, group.width, group.lock) for group in expected.groups
    ]
    keep = np.ones(graph.channel_count, dtype=bool)
    keep[graph.groups[graph.group_names()["b"]].channels[0]] = False
    assert {tensor.dtype for tensor in apply(model.to(dtype), graph, keep).parameters()} == {dtype}


def test_a_model_that_is_not_in_memory_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(TraceError, match="lives on device 'meta'") as error:
        trace(model, IMAGE)
    assert "model.cpu()" in str(error.value)


def test_a_checkpoint_saved_on_a_gpu_is_read_without_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _storage: "cuda:0")
    path = save_as_host(lively("yolov8n"), tmp_path / "gpu.pt")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):  # the file does claim a GPU
            torch.load(path, weights_only=False)
    assert trace_model(read_checkpoint(path).model).free_groups()


def test_an_image_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(TraceError, match="forward failed"):
        trace(build("Chain"), torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("name", ["Chain", "Shared", "SelfAttention", "Excited"])
def test_a_trace_leaves_the_model_bit_identical(name: str) -> None:
    model = build(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, IMAGE)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Constants(nn.Module):
    """Tensors that are neither parameters nor buffers scale the features: a (4) and b (4) are groups of their own."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, widths[0]), conv(3, widths[1]), conv(sum(widths), 2)
        self.halves, self.doubles = torch.full((1, 1, 8, 8), 0.5), torch.full((1, 1, 8, 8), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        a, b = act(self.a(x) * self.halves.to(x)), act(self.b(x) * self.doubles.to(x))
        return self.out(torch.cat([a, b], 1))


@pytest.mark.parametrize("widths", [(4, 5), (4, 4)])
def test_tensors_that_the_model_does_not_register_are_told_apart(widths: tuple[int, int]) -> None:
    """The second forward repeats the first one's calls; calls on unknown tensors are no repetition."""
    graph = trace(Constants(widths), IMAGE)
    assert {graph.groups[index].name: graph.groups[index].width for index in graph.free_groups()} == {
        "a": widths[0],
        "b": widths[1],
    }
    assert len(graph.axes["out.weight", 1].channels) == len(set(graph.axes["out.weight", 1].channels.tolist()))


class FixedSize(nn.Module):
    """Positions have a table of their own, so another image size cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.hidden, self.out = conv(3, 4), nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("table", torch.rand(1, 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.hidden(act(self.a(x)).flatten(2).transpose(1, 2) * self.table)))


def test_a_model_for_one_image_size_is_refused_where_its_cost_must_be_known_at_others() -> None:
    with pytest.raises(TraceError, match=r"forward failed on an input of shape \(1, 3, 16, 16\)"):
        trace(FixedSize(), IMAGE)


def test_a_linear_layer_of_one_feature_is_a_linear_layer() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.squeeze, self.widen, self.out = conv(3, 4), nn.Linear(4, 1), nn.Linear(1, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = act(self.a(x)).mean((2, 3))
            return self.out(act(self.widen(act(self.squeeze(x)))))

    graph = trace(Narrow(), IMAGE)
    assert graph.report.operators_without_rule == {}
    assert {graph.groups[index].name: graph.groups[index].width for index in graph.free_groups()} == {
        "a": 4,
        "widen": 5,
    }


class Coordinates(nn.Module):
    """Rows and columns of the image are pooled, put side by side and gate the features (coordinate attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.squeeze, self.norm = conv(3, 8), conv(8, 4), nn.BatchNorm2d(4)
        self.rows, self.columns, self.out = conv(4, 8), conv(4, 8), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = act(self.a(x))
        height, width = x.shape[2:]
        pooled = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        rows, columns = act(self.norm(self.squeeze(pooled))).split([height, width], 2)
        return self.out(x * self.rows(rows).sigmoid() * self.columns(columns).transpose(2, 3).sigmoid())


class Pyramid(nn.Module):
    """A convolution on a plane of 2 x 2 cells, whatever the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool, self.b, self.out = conv(3, 8), nn.AdaptiveAvgPool2d(2), conv(8, 5), conv(13, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = act(self.a(x))
        pooled = nn.functional.interpolate(act(self.b(self.pool(x))), size=x.shape[2:])
        return self.out(torch.cat([x, pooled], 1))


class Neighbours(nn.Module):
    """A convolution along the channels, which must all stay (ECA), and one that may go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.along, self.b, self.out = conv(3, 8), nn.Conv1d(1, 1, 3, padding=1), conv(8, 6), conv(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = act(self.a(x))
        gate = self.along(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self.out(act(self.b(x * gate[:, :, None, None].sigmoid())))


class ByParameter(nn.Module):
    """A product with a parameter that is no layer's weight: what it reads and gives must stay, a may not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.mix, self.out = conv(3, 6), conv(6, 8), nn.Parameter(torch.rand(6, 8)), conv(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(torch.einsum("bchw,oc->bohw", act(self.a(act(self.first(x)))), self.mix)))


@pytest.mark.parametrize("kind", [Coordinates, Pyramid, Neighbours, ByParameter])
def test_what_a_call_costs_is_known_however_its_plane_grows(kind: type[nn.Module]) -> None:
    """With the image's side, not at all, with the number of channels, by a product without a channel."""
    torch.manual_seed(0)
    model = kind().eval()
    graph, _ = proven(model)
    for side in (8, 16, 32, 64):
        image = torch.zeros(1, 3, side, side)
        assert float(graph.cost.macs(graph.widths(), imgsz_px=side)) == counted_macs(model, image)


def test_a_cost_that_follows_no_law_is_refused_by_its_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = conv(3, 4), conv(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = act(self.a(x))
            return self.out(nn.functional.adaptive_avg_pool2d(x, (2, x.shape[3] // 3)))

    with pytest.raises(TraceError, match="a call in out costs"):
        trace(Odd(), IMAGE)


def test_a_model_that_takes_one_image_at_a_time_is_refused_by_the_proof() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = conv(3, 4), conv(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(act(self.a(x)).view(1, 4, *x.shape[2:]))

    with pytest.raises(VerificationError, match="the model's forward failed on two images"):
        Verifier(Alone(), trace(Alone(), IMAGE))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    """The weights of the older `weight_norm` are computed, and torch copies no computed tensor."""
    model = nn.Sequential(nn.utils.weight_norm(conv(3, 8)), nn.SiLU(), conv(8, 6), nn.SiLU(), conv(6, 2))
    graph = trace(model, IMAGE)
    with pytest.raises(CheckpointError, match="cannot be copied"):
        apply(model, graph, random_keep(graph, 0))


def test_reasons_do_not_depend_on_the_order_of_sets() -> None:
    """Names of parameters that no forward ran come from a set, whose order changes with every process."""
    code = (
        "import torch; from torch import nn; from yolo_prune.channels import trace\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)\n"
        "        for name in 'pqrstuvw': setattr(self, name, nn.Conv2d(8, 8, 1))\n"
        "    def forward(self, x): return self.out(self.a(x))\n"
        "print([group.lock for group in trace(Two(), torch.zeros(1, 3, 8, 8)).groups])"
    )
    told = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
                       check=True, text=True).stdout
        for seed in ("1", "2", "3")
    ]  # fmt: skip
    assert told[0] == told[1] == told[2]
