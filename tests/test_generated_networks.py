"""The laws on random networks: silenced equals sliced, and what is found depends neither on order nor on image size."""

from __future__ import annotations

import torch
from generated_networks import SIDE, Generated, Parted, Program, Shuffle, Stacked, programs
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from random_plans import random_keep
from torch import nn

from yolo_prune.channels import ChannelGraph, Host, trace
from yolo_prune.surgery import TOLERANCE, Verifier, apply
from yolo_prune.surgery.verify import WEAKEST_RESPONSE

EXAMPLES = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


KNOWING = Host(resizes=lambda module: isinstance(module, (Shuffle, Parted, Stacked)))
"""A host that knows which modules re-read their sizes: what would be a lock is a tie."""


def traced(
    program: Program, *, reverse: bool = False, side: int = SIDE, host: Host | None = None
) -> tuple[nn.Module, ChannelGraph]:
    note("\n".join(f"{number + 1} = {what}" for number, (_, what) in enumerate(program.steps)))
    model = Generated(program, reverse=reverse).eval()
    return model, trace(model, torch.zeros(1, 3, side, side), host=host)


def partition(graph: ChannelGraph) -> set[tuple[frozenset[tuple[str, int, int]], bool]]:
    """Return every channel as the entries that it takes, and whether it is locked: numbers and names left out."""
    entries: dict[int, set[tuple[str, int, int]]] = {}
    for (name, dim), axis in graph.axes.items():
        for entry, channel in enumerate(axis.channels):
            entries.setdefault(int(channel), set()).add((name, dim, entry))
    locked = {int(channel): bool(group.lock) for group in graph.groups for channel in group.channels}
    return {(frozenset(found), locked[channel]) for channel, found in entries.items()}


@EXAMPLES
@given(programs(), st.integers(0, 2**16), st.sampled_from([None, KNOWING]), st.booleans())
def test_silenced_equals_sliced_on_any_network(program: Program, seed: int, host: Host | None, reverse: bool) -> None:
    torch.manual_seed(seed)
    for layer in nn.ModuleDict(program.layers).modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    model, graph = traced(program, host=host, reverse=reverse)
    keep = random_keep(graph, seed)
    assume(not keep.all())
    proof = Verifier(model, graph).verify(apply(model, graph, keep), keep)
    assume(proof.response >= WEAKEST_RESPONSE)
    # Multiplied often enough, random numbers grow: the error counts against what the outputs are.
    assert proof.max_abs_error <= TOLERANCE * max(1.0, proof.response)
    assert proof.macs_counted == proof.macs_predicted
    assert proof.params_counted == proof.params_predicted


@EXAMPLES
@given(programs(), st.sampled_from([None, KNOWING]))
def test_channels_depend_neither_on_module_order_nor_on_image_size(program: Program, host: Host | None) -> None:
    found = partition(traced(program, host=host)[1])
    assert partition(traced(program, reverse=True, host=host)[1]) == found
    assert partition(traced(program, side=2 * SIDE, host=host)[1]) == found


def test_sizes_that_a_host_knows_are_ties_and_others_are_locks() -> None:
    """Or the networks above would show nothing about views and splits."""

    def found(middle: nn.Module, host: Host | None) -> dict[str, tuple[int, str]]:
        width = 4 if isinstance(middle, Parted) else 8
        model = nn.Sequential(nn.Conv2d(3, 8, 1), middle, nn.Conv2d(width, 2, 1))
        graph = trace(model, torch.zeros(1, 3, SIDE, SIDE), host=host)
        return {group.name: (group.width, group.lock) for group in graph.groups if group.name in ("0", "0#1", "0#2")}

    assert found(Shuffle(), None) == {"0": (8, "view with fixed sizes in 1")}
    assert found(Shuffle(), KNOWING) == {"0": (4, "")}  # interleaved rows keep their order if the same places go
    assert {lock for _, lock in found(Parted([3, 5], 2), None).values()} == {"split with fixed sizes in 1"}
    assert found(Parted([3, 5], 2), KNOWING) == {"0#1": (3, ""), "0#2": (5, "")}
