"""Our count of multiply-adds against torch's own counter, operator by operator and on whole networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import SMALL, lively
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from toys import build

from yolo_prune.surgery import counted_macs


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def torchs(model: nn.Module, image: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


CALLS = {
    "convolution": nn.Conv2d(3, 8, 3, 2, 1),
    "1-D": Function(lambda x: functional.conv1d(x.flatten(2), torch.ones(5, 3, 3))),
    "grouped": nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 9, (3, 1), groups=3, dilation=2)),
    "depthwise": nn.Conv2d(3, 6, 3, groups=3),
    "transposed": nn.ConvTranspose2d(3, 8, 3, 2, 1, 1),
    "transposed and grouped": nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 2, 2, groups=2)),
    "linear": nn.Sequential(nn.Flatten(2), nn.Linear(64, 5)),
    "linear without bias": nn.Sequential(nn.Flatten(2), nn.Linear(64, 5, bias=False)),
    "mm": Function(lambda x: x.flatten(1) @ torch.ones(192, 7)),
    "addmm": Function(lambda x: torch.addmm(torch.ones(7), x.flatten(1), torch.ones(192, 7))),
    "bmm": Function(lambda x: rows(x) @ x.flatten(2)),
    "baddbmm": Function(lambda x: torch.baddbmm(torch.ones(1, 64, 64), rows(x), x.flatten(2))),
    "einsum": Function(lambda x: torch.einsum("bchw,bdhw->bcd", x, x)),
    "attention of heads": Function(
        lambda x: functional.scaled_dot_product_attention(*[rows(x)[:, None]] * 2, torch.ones(1, 1, 64, 5))
    ),
    "attention": Function(lambda x: functional.scaled_dot_product_attention(*[rows(x)] * 3)),
    "nothing": Function(torch.relu),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_costs_what_torch_counts(name: str) -> None:
    image = torch.rand(1, 3, 8, 8)
    assert counted_macs(CALLS[name].eval(), image) == torchs(CALLS[name], image)


@pytest.mark.parametrize("name", ["Chain", "Grouped", "GroupedUp", "SelfAttention", "Excited"])
def test_toys_cost_what_torch_counts(name: str) -> None:
    model, image = build(name).eval(), torch.rand(1, 3, 8, 8)
    assert counted_macs(model, image) == torchs(model, image)


@pytest.mark.parametrize("name", [*SMALL, "yolo26n-seg", "yolo26n-pose", "yolo26n-obb"])
def test_networks_cost_what_torch_counts(name: str) -> None:
    model, image = lively(name), torch.rand(1, 3, 96, 96)
    assert counted_macs(model, image) == torchs(model, image)
