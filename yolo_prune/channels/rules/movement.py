"""Data movement: the same operator runs on the companions; sizes that hide in Python tie or lock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from yolo_prune.channels.facts import Facts
from yolo_prune.channels.labels import NONE, cuts_channel_axis, varies, varying_dims
from yolo_prune.channels.rules.registry import aten, pass_on, per_channel, rule


@rule(
    aten.new_full, aten.new_zeros, aten.new_ones, aten.new_empty, aten.zeros_like, aten.ones_like, aten.full_like,
    aten.empty_like, aten.sym_size, aten.sym_stride,
)  # fmt: skip
def metadata(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ARG001
    """Reads shape and type only; the result belongs to no channel."""
    facts.weight(args[0])


@rule(
    aten.permute, aten.transpose, aten.t, aten.slice, aten.select, aten.unbind, aten.expand, aten.squeeze,
    aten.unsqueeze, aten.detach, aten.alias, aten.cat, aten.repeat, aten.flip, aten.roll, aten.unfold,
    aten.index_select, aten.gather, aten.index, aten.pixel_shuffle, aten.pixel_unshuffle, aten.lift_fresh,
)  # fmt: skip
def movement(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Run the same operator on the companions."""
    if func.overloadpacket in (aten.t, aten.transpose) and facts.is_matrix(args[0]):
        facts.set_transposed(out, args[0])  # a linear layer's weight, on its way to the product
        return
    _lock_picked_channels(facts, func, args, kwargs, out)
    _note_crop(facts, func, args, kwargs, out)
    moved = func(*tree_map(lambda leaf: _companion(facts, leaf), list(args)), **kwargs)
    for value, label in zip(tree_leaves(out), tree_leaves(moved), strict=True):
        facts.set_label(value, label)


_PICKS = frozenset(
    (
        aten.slice,
        aten.select,
        aten.unbind,
        aten.index,
        aten.index_select,
        aten.gather,
        aten.roll,
        aten.flip,
        aten.unfold,
    )
)


def _lock_picked_channels(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Lock channels that are picked or moved by positions that live in Python."""
    label = facts.label(args[0]) if isinstance(args[0], Tensor) else None
    if label is None or func.overloadpacket not in _PICKS:
        return
    if func.overloadpacket is aten.index:
        dims = [dim for dim, index in enumerate(args[1]) if index is not None]
    elif func.overloadpacket in (aten.roll, aten.flip):
        dims = list(args[-1]) or list(range(label.dim()))
    else:
        dims = [args[1] if len(args) > 1 else kwargs.get("dim", 0)]
    whole = func.overloadpacket is aten.slice and out.shape == args[0].shape
    if not whole and any(varies(label, dim) for dim in dims):
        facts.lock(label, f"channels are picked by position ({func.overloadpacket}) in {facts.place()}")


def _note_crop(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Note a plane of which a piece is left: its size may be a written one. Every second row is half of any plane."""
    if func.overloadpacket is aten.slice and out.dim() == 4 and out.shape[2:] != args[0].shape[2:]:
        step = args[4] if len(args) > 4 else kwargs.get("step", 1)
        facts.fixed_planes = facts.fixed_planes or step == 1


def _companion(facts: Facts, leaf: Any) -> Any:
    """Return the companion of a value; floats without one become 'no channel', indices stay themselves."""
    if not isinstance(leaf, Tensor):
        return leaf
    label = facts.label(leaf)
    if label is not None:
        return label
    return torch.full(leaf.shape, NONE) if leaf.is_floating_point() else leaf


@rule(aten.stack)
def stack(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """Only values of one shape can be stacked: they are rows, which need equal counts."""
    movement(facts, func, args, kwargs, out)
    label = facts.label(out)
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    if label is not None and varies(label, dim):
        _tie_rows(facts, [label.movedim(dim, 0)], "stack")


@rule(aten.clone, aten._to_copy, aten.contiguous, aten.dropout, aten.native_dropout)
def same(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ARG001
    """The result is the argument, value by value, in another memory format or type."""
    pass_on(facts, args[0], tree_leaves(out)[0])


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias)
def reshape(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:  # noqa: ARG001
    """Reshape the companion; a channel axis that is cut into rows needs equal counts in each, or is locked."""
    label = facts.label(args[0])
    if label is None:
        return
    moved = label.reshape(out.shape)
    if cuts_channel_axis(label, out.shape):
        if not facts.sizes_follow_weights():
            facts.lock(label, f"view with fixed sizes in {facts.place()}")
        elif len(varying_dims(moved)) > len(varying_dims(label)):
            _tie_rows(facts, [moved], "view")
        elif len(varying_dims(moved)) < len(varying_dims(label)):
            _keep_order(facts, label)
    facts.set_label(out, moved)


def _keep_order(facts: Facts, label: Tensor) -> None:
    """Note what the order of channels asks for where rows become one axis again.

    Rows one after the other keep their order, whatever goes from each. Rows that are interleaved, as a channel shuffle
    does, keep it only where the same places go from all: those channels live together.
    """
    dims = varying_dims(label)
    if len(dims) != 2:
        return
    rectangle = label.movedim(dims, (0, 1)).flatten(2)[:, :, 0]
    if not facts.are_rows(rectangle) and facts.are_rows(rectangle.T):
        for place in rectangle.T[1:]:
            facts.equate(rectangle[:, 0], place)


@rule(aten.constant_pad_nd)
def pad(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:  # noqa: ARG001
    """Zeros around a plane belong to its channel; other values, or more channels, cannot be followed."""
    label = facts.label(args[0])
    if label is None:
        return
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    if len(args[1]) > 2 * (out.dim() - 2) or value:
        facts.lock(label, f"padding with {value} in {facts.place()}")
    else:
        facts.set_planes(out, per_channel(facts, label, "padding"))


@rule(aten.split)
def split(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Sequence[Tensor]) -> None:
    """`chunk` arrives here: the parts are cut anew at every width, so they need equal counts.

    So do splits into parts of a size that is written in Python, which does not follow the width by itself.
    """
    movement(facts, func, args, kwargs, out)
    label = facts.label(args[0])
    if label is None or not varies(label, _dim(args, kwargs, label)):
        return
    if facts.written_split and not facts.sizes_follow_weights():
        facts.lock(label, f"split with fixed sizes in {facts.place()}")
    else:
        _tie_parts(facts, args, kwargs, out)


@rule(aten.split_with_sizes)
def split_with_sizes(
    facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Sequence[Tensor]
) -> None:
    """Explicit sizes live in Python: parts of one size tie in modules whose sizes are re-read, all others are locked.

    Where rows of channels are split (the queries, keys and values of every head), each part is a rectangle again.
    """
    movement(facts, func, args, kwargs, out)
    label = facts.label(args[0])
    if label is None or not varies(label, _dim(args, kwargs, label)):
        return
    if not facts.sizes_follow_weights():
        facts.lock(label, f"split with fixed sizes in {facts.place()}")
    elif len(varying_dims(label)) > 1:
        by_size: dict[int, list[Tensor]] = defaultdict(list)
        for part, size in zip(out, args[1], strict=True):
            by_size[size].append(_known(facts, part))
        for parts in by_size.values():
            _tie_rows(facts, parts, "split of rows")
    elif len(set(args[1])) == 1:
        _tie_parts(facts, args, kwargs, out)


def _known(facts: Facts, value: Tensor) -> Tensor:
    """Return the label of a value that just got one."""
    label = facts.label(value)
    assert label is not None  # narrows the type
    return label


def _dim(args: Sequence[Any], kwargs: dict[str, Any], label: Tensor) -> int:
    dim: int = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    return dim % label.dim()


def _tie_parts(facts: Facts, args: Sequence[Any], kwargs: dict[str, Any], out: Sequence[Tensor]) -> None:
    """Tie the parts of a split if it cuts the channel axis."""
    label = facts.label(args[0])
    if label is not None and varies(label, _dim(args, kwargs, label)):
        dim = _dim(args, kwargs, label)
        planes = [_known(facts, part).movedim(dim, 0).reshape(part.shape[dim], -1) for part in out]
        if all((plane == plane[:, :1]).all() for plane in planes):
            facts.tie([plane[:, 0] for plane in planes], "equal split")
        else:
            facts.lock(label, f"an equal split of mixed channels in {facts.place()}")


def _tie_rows(facts: Facts, rectangles: Sequence[Tensor], operator: str) -> None:
    """Tie the rows of tensors whose labels vary along two dimensions: a tensor holds no rows of different lengths."""
    rows: list[Tensor] = []
    for label in rectangles:
        dims = varying_dims(label)
        if len(dims) > 2:
            facts.lock(label, f"{operator} cuts channels into more than rows in {facts.place()}")
            return
        if len(dims) < 2:  # a single row, or rows of one channel
            continue
        rows += label.movedim(dims, (0, 1)).flatten(2)[:, :, 0].unbind()
    count = len(rows) // len(rectangles)
    if count > 1:
        facts.note_rows(rows)
        facts.tie(rows, operator, rows=count if facts.rows_may_go() else 0)
