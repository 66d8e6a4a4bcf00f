"""Turn the facts of a trace into a `ChannelGraph`: solve the equalities, then group, lock, tie and price."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array, hstack
from scipy.sparse.csgraph import connected_components

from yolo_prune.channels.cost import CostModel, CostTerm, params_terms
from yolo_prune.channels.facts import OUTPUT, Facts
from yolo_prune.channels.graph import (
    Axis,
    AxisKey,
    ChannelGraph,
    ChannelGroup,
    IntArray,
    Rescale,
    Role,
    Tie,
    TraceReport,
)


def assemble(facts: Facts, *, image_shape: Sequence[int], powers: Mapping[int, float]) -> ChannelGraph:
    """Solve the facts of a trace.

    Args:
        facts: What the trace collected.
        image_shape: Of the traced image: (1, channels, side, side).
        powers: Growth with the image's area, by call, of the prices whose rule could not know it.
    """
    count, channel_of = _solve(facts)
    axes = {
        key: Axis(role=axis.role, channels=channel_of[axis.start : axis.start + axis.size], groups=axis.groups)
        for key, axis in facts.axes.items()
    }
    ties = _solved_ties(facts, channel_of)
    locks = _lock_reasons(facts, channel_of, count)
    _spread_locks(locks, ties)
    incidence = _incidence([axis.channels for axis in axes.values()], count)
    groups = _groups(axes, incidence, locks, ties)
    return ChannelGraph(
        axes=axes,
        groups=groups,
        ties=_group_ties(ties, groups, count),
        cost=_cost(facts, axes, channel_of, groups, image_shape[-1], powers),
        rescales=tuple(Rescale(axes=keys, entries=entries) for keys, entries in facts.rescales if keys),
        norms=dict(facts.norms),
        report=TraceReport(
            operators_without_rule={operator: len(calls) for operator, calls in facts.without_rule.items()},
            operators_at_outputs=_operators_at_outputs(facts, channel_of),
            untraced_parameters=tuple(name for name in facts.parameters if name not in facts.touched),
        ),
        channel_count=count,
        image_channels=image_shape[1],
    )


def _solve(facts: Facts) -> tuple[int, IntArray]:
    """Return the number of channels and the channel of every id."""
    first, second = (_joined([pair[side] for pair in facts.equalities]) for side in (0, 1))
    size = facts.id_count
    edges = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(size, size))
    count, channel_of = connected_components(edges, directed=False)
    return int(count), channel_of.astype(np.int64)


@dataclass(frozen=True)
class SolvedTie:
    """A tie over channels.

    Attributes:
        parts: For each part, its channels and how many entries each takes.
        where: Operator and module path.
        rows: See `Tie`.
        blocks: See `Tie`.
    """

    parts: tuple[tuple[IntArray, IntArray], ...]
    where: str
    rows: int
    blocks: int


def _solved_ties(facts: Facts, channel_of: IntArray) -> list[SolvedTie]:
    """Return the ties over channels, once each; one whose parts are all the same channels says nothing."""
    solved: dict[tuple[tuple[bytes, bytes], ...], SolvedTie] = {}
    for tie in facts.ties:
        parts = [np.unique(channel_of[ids], return_counts=True) for ids in tie.parts]
        distinct = {(channels.tobytes(), counts.tobytes()): (channels, counts) for channels, counts in parts}
        if len(distinct) > 1:
            solved.setdefault(
                tuple(sorted(distinct)), SolvedTie(tuple(distinct.values()), tie.where, tie.rows, tie.blocks)
            )
    return list(solved.values())


def _lock_reasons(facts: Facts, channel_of: IntArray, count: int) -> list[str]:
    """Return why each channel is locked; empty where it is free. The plainest reason is kept, else the first found."""
    reasons = [""] * count
    for ids, reason in sorted(facts.locks, key=lambda lock: lock[1] != OUTPUT):
        for channel in np.unique(channel_of[ids]):
            reasons[channel] = reasons[channel] or reason
    return reasons


def _operators_at_outputs(facts: Facts, channel_of: IntArray) -> tuple[str, ...]:
    """Return the operators without a rule that touched nothing but channels which leave the model.

    Other locks prove nothing: that a layer reads what no rule could follow may be the doing of such an operator.
    """
    empty = np.zeros(0, dtype=np.int64)
    outputs = channel_of[np.concatenate([empty, *(ids for ids, reason in facts.locks if reason == OUTPUT)])]
    touched = {operator: np.concatenate(calls) for operator, calls in facts.without_rule.items()}
    return tuple(op for op, ids in touched.items() if np.isin(channel_of[ids[ids >= 0]], outputs).all())


def _spread_locks(reasons: list[str], ties: Sequence[SolvedTie]) -> None:
    """Lock, in place, what is tied to a part that can lose nothing."""
    changed = True
    while changed:  # ends: every round locks another channel
        changed = False
        for tie in ties:
            locked = [channels for channels, _ in tie.parts if all(reasons[channel] for channel in channels)]
            free = [c for channels, _ in tie.parts for c in channels if not reasons[c]] if locked else []
            for channel in free:
                reasons[channel] = f"{tie.where}: as many as of others, which are locked: {reasons[locked[0][0]]}"
                changed = True


def _incidence(sizes: Sequence[IntArray], count: int) -> csr_array:
    """Return how many entries of each list of channels a channel takes, shape (channels, lists)."""
    rows = _joined(sizes)
    columns = np.repeat(np.arange(len(sizes), dtype=np.int32), [len(channels) for channels in sizes])
    return csr_array(coo_array((np.ones_like(rows), (rows, columns)), shape=(count, len(sizes))))


def _joined(parts: Sequence[IntArray]) -> npt.NDArray[np.int32]:
    """Return all entries in one array, in half the memory: no model has as many channels as int32 has numbers."""
    return np.concatenate([np.zeros(0, dtype=np.int32), *parts], dtype=np.int32, casting="same_kind")


def _groups(
    axes: dict[AxisKey, Axis], incidence: csr_array, locks: Sequence[str], ties: Sequence[SolvedTie]
) -> tuple[ChannelGroup, ...]:
    """Partition the channels: same axes, same lock, same parts of ties."""
    keys, signature = list(axes), csr_array(hstack([incidence, _membership(ties, len(locks))], format="csr"))
    rows = np.stack([signature.indices, signature.data], axis=1, dtype=np.int32, casting="same_kind")
    raw = rows.tobytes()  # slices of bytes, unlike those of arrays, are cheap
    ends = (signature.indptr * rows[:1].nbytes).tolist()
    partition: dict[tuple[bytes, str], list[int]] = defaultdict(list)
    for channel, lock in enumerate(locks):
        partition[raw[ends[channel] : ends[channel + 1]], lock].append(channel)
    cut = [
        tuple(keys[axis] for axis in incidence.indices[incidence.indptr[part[0]] : incidence.indptr[part[0] + 1]])
        for part in partition.values()
    ]
    names = _unique([_producer(axes, keys) for keys in cut])
    tied = {int(channel) for tie in ties for part, _ in tie.parts for channel in part}
    return tuple(
        ChannelGroup(
            name=name,
            channels=np.array(channels, dtype=np.int64),
            axes=group_axes,
            lock=lock or ("is the only channel of its group" if len(channels) == 1 and channels[0] not in tied else ""),
        )
        for ((_, lock), channels), group_axes, name in zip(partition.items(), cut, names, strict=True)
    )


def _membership(ties: Sequence[SolvedTie], count: int) -> csr_array:
    """Return how many entries each channel takes of each part of a tie, shape (channels, parts)."""
    parts = [part for tie in ties for part in tie.parts]
    rows, entries = (_joined([part[side] for part in parts]) for side in (0, 1))
    columns = np.repeat(np.arange(len(parts), dtype=np.int32), [len(channels) for channels, _ in parts])
    return csr_array(coo_array((entries, (rows, columns)), shape=(count, len(parts))))


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
    """Express ties over groups: every part is a union of whole groups, each of equal entries."""
    group_of = np.zeros(count, dtype=np.int64)
    for index, group in enumerate(groups):
        group_of[group.channels] = index
    return tuple(
        Tie(
            sets=tuple(
                tuple(sorted({(int(group_of[c]), int(n)) for c, n in zip(channels, counts, strict=True)}))
                for channels, counts in tie.parts
            ),
            where=tie.where,
            rows=tie.rows,
            blocks=tie.blocks,
        )
        for tie in ties
    )


def _cost(
    facts: Facts,
    axes: Mapping[AxisKey, Axis],
    channel_of: IntArray,
    groups: Sequence[ChannelGroup],
    imgsz_px: int,
    powers: Mapping[int, float],
) -> CostModel:
    """Number the sizes that the recorded prices multiply, and count the entries that one channel takes of each.

    The size of a dimension that is shared by the groups of a convolution is that of any of them: the first.
    """
    sizes = [axis.channels[: len(axis.channels) // axis.groups] for axis in axes.values()]
    index = {key: position for position, key in enumerate(axes)}
    terms = []
    for price in facts.prices:
        positions = []
        for size in price.sizes:
            if isinstance(size, tuple):
                positions.append(index[size])
            else:
                positions.append(len(sizes))
                sizes.append(channel_of[size])
        power = powers[price.call] if price.area_power is None else price.area_power
        terms.append(CostTerm(coef=price.coef, axes=tuple(positions), area_power=power))
    shapes = {name: tuple(parameter.shape) for name, parameter in facts.parameters.items()}
    representatives = [int(group.channels[0]) for group in groups]
    count = sum(group.width for group in groups)
    return CostModel(
        incidence=_incidence(sizes, count)[representatives].toarray().T.astype(np.float64),
        macs_terms=tuple(terms),
        params_terms=tuple(params_terms(shapes, index)),
        imgsz_px=imgsz_px,
    )
