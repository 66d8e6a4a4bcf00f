"""Turn the facts of a trace into a `ChannelGraph`: solve the equalities, then group, lock, tie and price."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array, csr_array, hstack
from scipy.sparse.csgraph import connected_components

from yolo_prune.channels.cost import CostModel, CostTerm, params_terms
from yolo_prune.channels.facts import Facts
from yolo_prune.channels.graph import Axis, AxisKey, ChannelGraph, ChannelGroup, IntArray, Role, Tie, TraceReport


def assemble(facts: Facts, *, imgsz_px: int) -> ChannelGraph:
    """Solve the facts of a trace.

    Args:
        facts: What the trace collected.
        imgsz_px: Side of the traced image.
    """
    count, channel_of = _solve(facts)
    axes = {
        key: Axis(role=axis.role, channels=channel_of[axis.start : axis.start + axis.size])
        for key, axis in facts.axes.items()
    }
    ties, uneven = _solved_ties(facts, channel_of)
    locks = _lock_reasons(facts, channel_of, count, uneven)
    incidence = _incidence(axes, count)
    groups = _groups(axes, incidence, locks, ties)
    return ChannelGraph(
        axes=axes,
        groups=groups,
        ties=_group_ties(ties, groups, count),
        cost=_cost(facts, list(axes), incidence, groups, imgsz_px),
        norms=dict(facts.norms),
        report=TraceReport(
            operators_without_rule=dict(facts.without_rule),
            untraced_parameters=tuple(name for name in facts.parameters if name not in facts.touched),
        ),
        channel_count=count,
    )


def _solve(facts: Facts) -> tuple[int, IntArray]:
    """Return the number of channels and the channel of every id."""
    empty = np.zeros(0, dtype=np.int64)
    first = np.concatenate([empty, *(pair[0] for pair in facts.equalities)])
    second = np.concatenate([empty, *(pair[1] for pair in facts.equalities)])
    size = facts.id_count
    edges = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(size, size))
    count, channel_of = connected_components(edges, directed=False)
    return int(count), channel_of.astype(np.int64)


SolvedTie = tuple[tuple[IntArray, ...], str]


def _solved_ties(facts: Facts, channel_of: IntArray) -> tuple[list[SolvedTie], list[SolvedTie]]:
    """Return the ties over channels, once each, and those in which a part holds a channel more than once."""
    even: dict[tuple[bytes, ...], SolvedTie] = {}
    uneven: list[SolvedTie] = []
    for tie in facts.ties:
        parts = tuple(np.unique(channel_of[ids]) for ids in tie.parts)
        distinct = {part.tobytes(): part for part in parts}
        if any(len(part) != len(ids) for part, ids in zip(parts, tie.parts, strict=True)):
            uneven.append((parts, tie.where))
        elif len(distinct) > 1:
            even.setdefault(tuple(sorted(distinct)), (tuple(distinct.values()), tie.where))
    return list(even.values()), uneven


def _lock_reasons(facts: Facts, channel_of: IntArray, count: int, uneven: Sequence[SolvedTie]) -> list[str]:
    """Return why each channel is locked; empty where it is free. The first reason found is kept."""
    reasons = [""] * count
    for ids, reason in facts.locks:
        for channel in np.unique(channel_of[ids]):
            reasons[channel] = reasons[channel] or reason
    for parts, where in uneven:
        for channel in np.unique(np.concatenate(parts)):
            reasons[channel] = reasons[channel] or f"{where} of channels that repeat"
    return reasons


def _incidence(axes: dict[AxisKey, Axis], count: int) -> csr_array:
    """Return how many entries of each axis a channel takes, shape (channels, axes)."""
    rows = np.concatenate([axis.channels for axis in axes.values()]) if axes else np.zeros(0, dtype=np.int64)
    columns = np.repeat(np.arange(len(axes)), [len(axis.channels) for axis in axes.values()])
    ones = np.ones(len(rows), dtype=np.int64)
    return csr_array(coo_array((ones, (rows, columns)), shape=(count, len(axes))))


def _groups(
    axes: dict[AxisKey, Axis], incidence: csr_array, locks: Sequence[str], ties: Sequence[SolvedTie]
) -> tuple[ChannelGroup, ...]:
    """Partition the channels: same axes, same lock, same parts of ties."""
    keys, signature = list(axes), csr_array(hstack([incidence, _membership(ties, len(locks))], format="csr"))
    partition: dict[tuple[bytes, bytes, str], list[int]] = defaultdict(list)
    for channel, lock in enumerate(locks):
        row = slice(signature.indptr[channel], signature.indptr[channel + 1])
        partition[signature.indices[row].tobytes(), signature.data[row].tobytes(), lock].append(channel)
    cut = [
        tuple(keys[axis] for axis in incidence.indices[incidence.indptr[part[0]] : incidence.indptr[part[0] + 1]])
        for part in partition.values()
    ]
    names = _unique([_producer(axes, keys) for keys in cut])
    return tuple(
        ChannelGroup(name=name, channels=np.array(channels, dtype=np.int64), axes=group_axes, lock=lock)
        for (_, _, lock), channels, group_axes, name in zip(partition, partition.values(), cut, names, strict=True)
    )


def _membership(ties: Sequence[SolvedTie], count: int) -> csr_array:
    """Return which parts of ties each channel belongs to, shape (channels, parts)."""
    parts = [part for tie_parts, _ in ties for part in tie_parts]
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    columns = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return csr_array(coo_array((np.ones(len(rows), dtype=np.int64), (rows, columns)), shape=(count, len(parts))))


def _producer(axes: dict[AxisKey, Axis], keys: Sequence[AxisKey]) -> str:
    """Return the module path of the first producer; for channels that nothing produces, of the first reader."""
    producers = [name for name, dim in keys if axes[name, dim].role is Role.PRODUCER]
    if producers:
        return producers[0].rpartition(".")[0] or producers[0]
    return f"{keys[0][0].rpartition('.')[0]}:input"


def _unique(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once."""
    total, seen = Counter(names), Counter[str]()
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name}#{seen[name]}" if total[name] > 1 else name)
    return result


def _group_ties(ties: Sequence[SolvedTie], groups: Sequence[ChannelGroup], count: int) -> tuple[Tie, ...]:
    """Express ties over groups: every part is a union of whole groups."""
    group_of = np.zeros(count, dtype=np.int64)
    for index, group in enumerate(groups):
        group_of[group.channels] = index
    return tuple(
        Tie(sets=tuple(tuple(int(index) for index in np.unique(group_of[part])) for part in parts), where=where)
        for parts, where in ties
    )


def _cost(
    facts: Facts, keys: list[AxisKey], incidence: csr_array, groups: Sequence[ChannelGroup], imgsz_px: int
) -> CostModel:
    """Number the axes of the recorded prices and count, per group, the entries that one channel takes of each axis."""
    index = {key: position for position, key in enumerate(keys)}
    shapes = {name: tuple(parameter.shape) for name, parameter in facts.parameters.items()}
    representatives = [int(group.channels[0]) for group in groups]
    return CostModel(
        incidence=incidence[representatives].toarray().T.astype(np.float64),
        macs_terms=tuple(
            CostTerm(coef=price.coef, axes=tuple(index[key] for key in price.axes), area_power=price.area_power)
            for price in facts.prices
        ),
        params_terms=tuple(params_terms(shapes, index)),
        imgsz_px=imgsz_px,
    )
