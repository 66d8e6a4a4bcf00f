"""Forwards that plain layers do not have: random numbers, values read into Python, gates, written sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_plans import random_keep
from torch import Tensor, nn
from torch.nn import functional
from toys import act, conv

from yolo_prune.channels import ChannelGraph, trace
from yolo_prune.errors import TraceError
from yolo_prune.surgery import TOLERANCE, Verifier, apply, counted_macs

IMAGE = torch.zeros(1, 3, 16, 16)


class Model(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def free(graph: ChannelGraph) -> dict[str, int]:
    return {graph.groups[index].name: graph.groups[index].width for index in graph.free_groups()}


def proven(model: nn.Module, image: Tensor = IMAGE) -> ChannelGraph:
    graph = trace(model, image)
    for seed in range(3):
        keep = random_keep(graph, seed, low=0.3, high=0.6)
        assert not keep.all()
        assert Verifier(model, graph).verify(apply(model, graph, keep), keep).require().max_abs_error <= TOLERANCE
    return graph


def test_a_linear_layer_behind_what_differs_in_training_stays_one() -> None:
    """The transpose of its weight is the same call in both forwards, what it multiplies is not."""

    def forward(model: Any, x: Tensor) -> Tensor:
        y = act(model.a(x)).flatten(2).transpose(1, 2)
        return model.out(act(model.hidden(y * 0.5 if model.training else y)))

    graph = proven(Model(forward, a=conv(3, 8), hidden=nn.Linear(8, 6), out=nn.Linear(6, 2)))
    assert free(graph) == {"a": 8, "hidden": 6}
    assert graph.report.operators_without_rule == {}


@pytest.mark.parametrize("first", ["out", "a"])
def test_the_image_is_known_by_the_trace_and_not_by_who_was_registered_first(first: str) -> None:
    layers = {"out": conv(8, 2), "a": conv(3, 8)}
    ordered = {first: layers.pop(first), **layers}
    assert free(proven(Model(lambda model, x: model.out(act(model.a(x))), **ordered))) == {"a": 8}


def test_a_model_without_a_plain_convolution() -> None:
    model = Model(
        lambda model, x: model.out(act(model.a(x.flatten(2).transpose(1, 2)))), a=nn.Linear(3, 8), out=nn.Linear(8, 2)
    )
    assert free(proven(model)) == {"a": 8}


READS = {
    "numpy": lambda x: x.numpy().mean() > 0.5,
    "asarray": lambda x: np.asarray(x).mean() > 0.5,
    "tolist": lambda x: x.flatten().tolist()[0] > 0.5,
    "storage": lambda x: x.untyped_storage()[0] > 1,
    "equal": lambda x: torch.equal(x, torch.zeros_like(x)),
    "allclose": lambda x: torch.allclose(x, torch.zeros_like(x)),
    "nonzero": lambda x: len((x > 0.5).nonzero()) > 0,
    "mask": lambda x: x[x > 0.5].numel() > 0,
    "masked_select": lambda x: x.masked_select(x > 0.5).numel() > 0,
    "unique": lambda x: len(torch.unique(x)) > 1,
    "where": lambda x: torch.where(x > 0.5)[0].shape[0] > 0,
}
"""Ways to take another branch for another image, or features, that need no `if tensor:`."""


@pytest.mark.parametrize("of", ["image", "features"])
@pytest.mark.parametrize("name", READS)
def test_a_branch_by_what_the_image_shows_is_refused(name: str, of: str) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        y = act(model.a(x))
        return model.out(act(model.b(y)) if READS[name](x if of == "image" else y) else y)

    with pytest.raises(TraceError, match="reads a value of an activation into Python"):
        trace(Model(forward, a=conv(3, 4), b=conv(4, 4), out=conv(4, 2)), IMAGE)


def test_values_that_are_no_activations_may_be_read() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        order = torch.arange(3)
        assert order.tolist() == [0, 1, 2]
        assert len(order[order > 0]) == len(order.nonzero()) == 2
        return model.out(act(model.a(x[:, order])))

    assert free(proven(Model(forward, a=conv(3, 8), out=conv(8, 2)))) == {"a": 8}


def test_layers_are_dropped_at_random_in_training() -> None:
    """Drop path: both sides of the proof have to drop the same."""

    def forward(model: Any, x: Tensor) -> Tensor:
        y = act(model.a(x))
        kept = torch.bernoulli(torch.full((y.shape[0], 1, 1, 1), 0.5)) if model.training else 1.0
        return model.out(y + act(model.b(y)) * kept)

    proven(Model(forward, a=conv(3, 8), b=conv(8, 8), out=conv(8, 2)))


def test_a_proof_leaves_the_random_numbers_of_its_caller_alone() -> None:
    model = Model(lambda model, x: model.out(act(model.a(x))), a=conv(3, 8), out=conv(8, 2))
    graph = trace(model, IMAGE)
    keep = random_keep(graph, 0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Verifier(model, graph).verify(apply(model, graph, keep), keep)
    assert torch.equal(torch.rand(3), expected)


def test_a_weight_that_is_used_both_ways_stays() -> None:
    """An autoencoder's tied weight: what one layer produces the other one reads, along the same axis."""

    def forward(model: Any, x: Tensor) -> Tensor:
        h = act(model.encode(act(model.a(x))))
        return model.out(act(functional.conv_transpose2d(h, model.encode.weight)))

    model = Model(forward, a=conv(3, 8), encode=conv(8, 6), out=conv(8, 2))
    graph = trace(model, IMAGE)
    assert free(graph) == {}
    locks = {group.name: group.lock for group in graph.groups}
    assert "reads channels and produces some" in locks["encode"]


def test_statistics_that_are_computed_lock_what_they_are_computed_from() -> None:
    model = Model(
        lambda model, x: model.out(act(model.norm(model.a(x)))),
        a=conv(3, 8), norm=nn.InstanceNorm2d(8, affine=True, track_running_stats=True), out=conv(8, 2),
    )  # fmt: skip
    assert free(trace(model, IMAGE)) == {}


@pytest.mark.parametrize("dims", [3, 4])
def test_attention_whose_scale_follows_its_width_keeps_queries_and_keys(dims: int) -> None:
    def forward(model: Any, x: Tensor, scale: float | None = None) -> Tensor:
        q, k, v = (layer(x).flatten(2).transpose(1, 2) for layer in (model.q, model.k, model.v))
        if dims == 4:
            q, k, v = (one.unsqueeze(1) for one in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, scale=scale)
        mixed = mixed.squeeze(1) if dims == 4 else mixed
        return model.out(mixed.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:]))

    layers = {"q": conv(3, 8), "k": conv(3, 8), "v": conv(3, 8), "out": conv(8, 2)}
    graph = trace(Model(forward, **layers), IMAGE)
    assert not {"q", "k"} & set(free(graph))
    if free(graph):
        proven(Model(forward, **layers))
    if dims == 3:
        fixed = proven(Model(lambda model, x: forward(model, x, 0.3), **layers))
        assert free(fixed) == {"q": 8, "v": 8}


def test_a_split_into_parts_of_a_written_size_is_no_chunk() -> None:
    layers = {"a": conv(3, 8), "out": conv(4, 2)}
    fixed = trace(Model(lambda model, x: model.out(torch.mul(*act(model.a(x)).split(4, 1))), **layers), IMAGE)
    assert free(fixed) == {}
    assert "split with fixed sizes" in next(group.lock for group in fixed.groups if group.name.startswith("a"))
    chunks = proven(Model(lambda model, x: model.out(torch.mul(*act(model.a(x)).chunk(2, 1))), **layers))
    assert sum(free(chunks).values()) in (4, 8)


@pytest.mark.parametrize("operator", ["mul", "add"])
def test_one_gate_for_all_channels_stays_and_they_may_go(operator: str) -> None:
    """The spatial gate of an attention block: one channel, broadcast over the features."""

    def forward(model: Any, x: Tensor) -> Tensor:
        y = act(model.a(x))
        return model.out(act(model.norm(getattr(torch, operator)(y, model.gate(y).sigmoid()))))

    model = Model(forward, a=conv(3, 8), gate=conv(8, 1), norm=nn.BatchNorm2d(8), out=conv(8, 2))
    assert free(proven(model)) == {"a": 8}


def test_a_sum_with_one_gate_that_nothing_silences_again_locks() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        y = act(model.a(x))
        return model.out(y + model.gate(y))

    assert free(trace(Model(forward, a=conv(3, 8), gate=conv(8, 1), out=conv(8, 2)), IMAGE)) == {}


@pytest.mark.parametrize(
    "resized",
    [
        lambda y: functional.interpolate(y, size=(8, 8)),
        lambda y: functional.interpolate(y, size=(8, 8), mode="bilinear"),
        lambda y: y[:, :, :8, :8],
        lambda y: y.narrow(2, 0, 8).narrow(3, 0, 8),
    ],
)
def test_what_runs_on_a_plane_of_a_written_size_costs_the_same_at_every_image_size(resized) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.out(act(model.b(resized(act(model.a(x))))))

    model = Model(forward, a=conv(3, 8), b=conv(8, 6), out=conv(6, 2))
    graph = proven(model)
    assert free(graph) == {"a": 8, "b": 6}
    for side in (16, 32, 64):
        image = torch.zeros(1, 3, side, side)
        assert float(graph.cost.macs(graph.widths(), imgsz_px=side)) == counted_macs(model, image)


def test_a_model_for_one_image_size_is_proven_at_that_size() -> None:
    def positions(model: Any, x: Tensor) -> Tensor:
        return model.out(act(model.b(act(model.a(x)) + model.table.weight.view(1, 1, 16, 16))))

    model = Model(positions, a=conv(3, 8), table=nn.Embedding(16, 16), b=nn.BatchNorm2d(8), out=conv(8, 2))
    graph = trace(model, IMAGE)
    keep = random_keep(graph, 0, low=0.3, high=0.6)
    proof = Verifier(model, graph).verify(apply(model, graph, keep), keep).require()
    assert proof.imgsz_px == 16


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 3, 8, 16), (2, 3, 16, 16), (1, 3, 16)])
def test_an_example_that_is_no_square_image_is_refused(shape: tuple[int, ...]) -> None:
    model = Model(lambda model, x: model.out(act(model.a(x))), a=conv(3, 8), out=conv(8, 2))
    with pytest.raises(TraceError, match=r"(?s)an example of shape .*expected.*\(1, channels, side, side\)"):
        trace(model, torch.zeros(shape))


def test_a_compiled_model_is_refused() -> None:
    model = nn.Sequential(conv(3, 8), torch.jit.script(nn.Sequential(conv(8, 8), nn.ReLU())), conv(8, 2))
    with pytest.raises(TraceError, match="'1' is compiled by TorchScript"):
        trace(model, IMAGE)


def test_a_trace_under_inference_mode_sees_the_same() -> None:
    model = Model(lambda model, x: model.out(act(model.a(x))), a=conv(3, 8), out=conv(8, 2))
    with torch.inference_mode():
        graph = trace(model, torch.zeros(1, 3, 16, 16))
    assert free(graph) == {"a": 8}


def test_outputs_that_are_masks_or_empty_are_compared_too() -> None:
    def forward(model: Any, x: Tensor) -> Any:
        y = model.out(act(model.a(x)))
        return y, y > 0.0, y[:0]

    proven(Model(forward, a=conv(3, 8), out=conv(8, 2)))


def test_a_slope_for_every_channel_is_counted_anew() -> None:
    layers = {"a": conv(3, 8), "slopes": nn.PReLU(8), "out": conv(8, 2)}
    model = Model(lambda model, x: model.out(model.slopes(model.a(x))), **layers)
    graph = proven(model)
    keep = random_keep(graph, 0, low=0.3, high=0.6)
    slim: Any = apply(model, graph, keep)
    assert slim.slopes.num_parameters == len(slim.slopes.weight) < 8


def test_attention_along_one_side_costs_the_side_cubed() -> None:
    """Every row attends to every other, along the columns: side x side pairs of `side` products."""

    def forward(model: Any, x: Tensor) -> Tensor:
        q, v = model.q(x), model.v(x)
        return model.out(v @ (q.transpose(2, 3) @ q).softmax(-1))

    model = Model(forward, q=conv(3, 8), v=conv(3, 8), out=conv(8, 2))
    graph = trace(model, IMAGE)
    for side in (16, 32, 64):
        image = torch.zeros(1, 3, side, side)
        assert float(graph.cost.macs(graph.widths(), imgsz_px=side)) == counted_macs(model, image)


def test_what_reads_the_image_is_told_from_what_reads_the_unknown() -> None:
    """The image may be scaled and cut up before; group norms mix channels, which no rule follows."""

    def forward(model: Any, x: Tensor) -> Tensor:
        y = model.a(torch.cat([x[..., ::2, ::2] / 255.0, x[..., 1::2, 1::2] * 2.0], 1))
        return model.out(act(model.norm(y)))

    model = Model(forward, a=conv(6, 8), norm=nn.GroupNorm(2, 8), out=conv(8, 2))
    graph = trace(model, IMAGE)
    locks = {name: graph.groups[index].lock for name, index in graph.group_names().items()}
    assert locks["a:input"] == "reads the image"
    assert locks["out:input"] == "reads what no rule could follow"
