"""The laws on random networks: silenced equals sliced, and what is found depends neither on order nor on image size."""

from __future__ import annotations

import torch
from generated_networks import SIDE, Generated, Program, programs
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from random_plans import random_keep
from torch import nn

from yolo_prune.channels import ChannelGraph, trace
from yolo_prune.surgery import TOLERANCE, Verifier, apply

EXAMPLES = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def traced(program: Program, *, reverse: bool = False, side: int = SIDE) -> tuple[nn.Module, ChannelGraph]:
    note("\n".join(f"{number + 1} = {what}" for number, (_, what) in enumerate(program.steps)))
    model = Generated(program, reverse=reverse).eval()
    return model, trace(model, torch.zeros(1, 3, side, side))


def partition(graph: ChannelGraph) -> set[tuple[frozenset[tuple[str, int, int]], bool]]:
    """Return every channel as the entries that it takes, and whether it is locked: numbers and names left out."""
    entries: dict[int, set[tuple[str, int, int]]] = {}
    for (name, dim), axis in graph.axes.items():
        for entry, channel in enumerate(axis.channels):
            entries.setdefault(int(channel), set()).add((name, dim, entry))
    locked = {int(channel): bool(group.lock) for group in graph.groups for channel in group.channels}
    return {(frozenset(found), locked[channel]) for channel, found in entries.items()}


@EXAMPLES
@given(programs(), st.integers(0, 2**16))
def test_silenced_equals_sliced_on_any_network(program: Program, seed: int) -> None:
    torch.manual_seed(seed)
    for layer in program.layers.values():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    model, graph = traced(program)
    keep = random_keep(graph, seed)
    proof = Verifier(model, graph).verify(apply(model, graph, keep), keep)
    # Multiplied often enough, random numbers grow: the error counts against what the outputs are.
    assert proof.max_abs_error <= TOLERANCE * max(1.0, proof.response)
    assert proof.macs_counted == proof.macs_predicted
    assert proof.params_counted == proof.params_predicted


@EXAMPLES
@given(programs())
def test_channels_depend_neither_on_module_order_nor_on_image_size(program: Program) -> None:
    found = partition(traced(program)[1])
    assert partition(traced(program, reverse=True)[1]) == found
    assert partition(traced(program, side=2 * SIDE)[1]) == found
