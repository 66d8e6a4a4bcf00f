"""One short rule per ATen operator: what it says about the channels of its arguments.

A rule is called after its operator ran, with the facts, the operator, its arguments and its result. Operators that are
absent lock what they touch (`without_rule`): nothing is ever guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from yolo_prune.channels.facts import NONE, Facts
from yolo_prune.channels.graph import Role

Rule: TypeAlias = Callable[[Facts, Any, Sequence[Any], dict[str, Any], Any], None]

aten = torch.ops.aten
RULES: dict[Any, Rule] = {}


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators (all their overloads)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def without_rule(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ARG001
    """Lock what an operator without a rule touches; its results belong to no channel."""
    labels = [facts.label(leaf) for leaf in tree_leaves((list(args), kwargs))]
    if any(label is not None for label in labels):
        facts.without_rule[str(func.overloadpacket)] += 1
    for label in labels:
        if label is not None:
            facts.lock(label, f"enters {func.overloadpacket} in {facts.path() or 'the model'}")


@rule(
    aten.new_full, aten.new_zeros, aten.new_ones, aten.new_empty, aten.zeros_like, aten.ones_like, aten.full_like,
    aten.empty_like, aten.sym_size, aten.sym_stride,
)  # fmt: skip
def metadata(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Reads shape and type only; the result belongs to no channel."""


# Data movement ------------------------------------------------------------------------------------------------------
@rule(
    aten.permute, aten.transpose, aten.t, aten.slice, aten.select, aten.unbind, aten.expand, aten.squeeze,
    aten.unsqueeze, aten.detach, aten.alias, aten.cat, aten.stack, aten.repeat, aten.flip, aten.roll, aten.unfold,
    aten.index_select, aten.gather, aten.index, aten.pixel_shuffle, aten.pixel_unshuffle, aten.lift_fresh,
)  # fmt: skip
def movement(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Run the same operator on the companions."""
    _lock_picked_channels(facts, func, args, kwargs, out)
    moved = func(*tree_map(lambda leaf: _companion(facts, leaf), list(args)), **kwargs)
    for value, label in zip(tree_leaves(out), tree_leaves(moved), strict=True):
        facts.set_label(value, label)


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
    if not whole and any(_varies(label, dim) for dim in dims):
        facts.lock(label, f"channels are picked by position ({func.overloadpacket}) in {facts.path() or 'the model'}")


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


@rule(aten.clone, aten._to_copy, aten.contiguous, aten.dropout, aten.native_dropout)
def same(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ARG001
    """The result is the argument, value by value, in another memory format or type."""
    _pass_on(facts, args[0], tree_leaves(out)[0])


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias)
def reshape(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:  # noqa: ARG001
    """Reshape the companion; a channel axis that is cut up by sizes hidden in Python is locked."""
    label = facts.label(args[0])
    if label is None:
        return
    if _splits_channel_axis(label, out.shape):
        facts.lock(label, f"view with fixed sizes in {facts.path() or 'the model'}")
    facts.set_label(out, label.reshape(out.shape))


@rule(aten.constant_pad_nd)
def pad(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:  # noqa: ARG001
    """Zeros around a plane belong to its channel; other values, or more channels, cannot be followed."""
    label = facts.label(args[0])
    if label is None:
        return
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    if len(args[1]) > 2 * (out.dim() - 2) or value:
        facts.lock(label, f"padding with {value} in {facts.path() or 'the model'}")
    else:
        facts.set_label(out, _spread(_per_channel(facts, label, "padding"), out))


@rule(aten.split)
def split(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Sequence[Tensor]) -> None:
    """`chunk` arrives here: the parts are cut anew at every width, so they need equal counts."""
    movement(facts, func, args, kwargs, out)
    _tie_parts(facts, args, kwargs, out)


@rule(aten.split_with_sizes)
def split_with_sizes(
    facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Sequence[Tensor]
) -> None:
    """Explicit sizes live in Python: equal ones tie in modules whose sizes are re-read, all others are locked."""
    movement(facts, func, args, kwargs, out)
    if not facts.sizes_follow_weights():
        label = facts.label(args[0])
        if label is not None and _varies(label, _dim(args, kwargs, label)):
            facts.lock(label, f"split with fixed sizes in {facts.path() or 'the model'}")
    elif len(set(args[1])) == 1:
        _tie_parts(facts, args, kwargs, out)


# Convolutions and products ------------------------------------------------------------------------------------------
@rule(aten.convolution)
def convolution(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:  # noqa: ARG001
    """Outputs get the filters' names; inputs are tied to the weight's input axis, group by group."""
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    name, label = facts.names.get(id(weight)), facts.label(x)
    if name is None or (transposed and groups > 1):
        without_rule(facts, func, args, {}, out)
        return
    inputs = torch.full((x.shape[1],), NONE) if label is None else _per_channel(facts, label, "convolution")
    out_dim = 1 if transposed else 0
    outputs = facts.axis(name, out_dim, weight.shape[out_dim], Role.PRODUCER)
    if groups == 1:
        _read(facts, facts.axis(name, 1 - out_dim, weight.shape[1 - out_dim], Role.CONSUMER), inputs)
    elif groups == x.shape[1]:
        _follow(facts, outputs, inputs.repeat_interleave(len(outputs) // groups))
    else:
        _grouped(facts, name, outputs, inputs.view(groups, -1))
    if bias is not None:
        _vector(facts, bias, outputs, Role.PRODUCER)
    facts.set_label(out, _spread(outputs, out))
    positions = (x if transposed else out)[0, 0].numel()
    pooled = x[0, 0].numel() == 1  # a trace image spans at least two cells of the coarsest map
    fixed_inputs = 1 if (name, 1) in facts.axes else weight.shape[1]  # 1 for depthwise
    facts.price(weight[0, 0].numel() * positions * fixed_inputs, [(name, 0), (name, 1)], 0 if pooled else 1)


@rule(aten.bmm, aten.mm, aten.addmm, aten.baddbmm)
def product(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """Matrix products between activations keep their sizes; both sides are locked and priced."""
    without_rule(facts, func, args, kwargs, out)
    left = args[-2]
    # Batched products pair positions with positions; plain ones see single rows (a pooled image) or positions.
    area_power = 2 if left.dim() == 3 else int(left.shape[0] > 1)
    facts.price(out.numel() * left.shape[-1], (), area_power)


@rule(aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm, aten.batch_norm)
def batch_norm(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Scale, shift and statistics belong to the normalised channel."""
    x, scale, shift, mean, variance = args[:5]
    result = out[0] if isinstance(out, (tuple, list)) else out
    label = facts.label(x)
    if label is None or scale is None or mean is None:
        # Without a scale no parameter can silence the channel, without statistics none is left to prove it by.
        without_rule(facts, func, args, kwargs, out)
        return
    channels = _per_channel(facts, label, "batch norm")
    for vector, role in (
        (scale, Role.PRODUCER),
        (shift, Role.PRODUCER),
        (mean, Role.STATISTIC),
        (variance, Role.STATISTIC),
    ):
        _vector(facts, vector, channels, role)
    _note_norm(facts, channels, scale)
    facts.set_label(result, _spread(channels, result))


# Elementwise --------------------------------------------------------------------------------------------------------
@rule(
    aten.silu, aten.relu, aten.leaky_relu, aten.hardswish, aten.gelu, aten.tanh, aten.hardtanh, aten.elu, aten.mish,
    aten.silu_, aten.relu_, aten.leaky_relu_, aten.hardswish_, aten.hardtanh_, aten.elu_, aten.mish_,
    aten.neg, aten.abs,
)  # fmt: skip
def zero_preserving(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:  # noqa: ARG001
    """f(0) = 0: a silent channel stays silent."""
    _pass_on(facts, args[0], out)


@rule(aten.add, aten.sub, aten.mul, aten.div, aten.maximum, aten.minimum,
      aten.add_, aten.sub_, aten.mul_, aten.div_)  # fmt: skip
def binary(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:  # noqa: ARG001
    """Two labelled operands name the same channels, entry by entry."""
    # One number for all channels belongs to none of them.
    labels = [
        facts.label(operand) if getattr(operand, "ndim", 0) and operand.numel() > 1 else None for operand in args[:2]
    ]
    first, second = (_broadcast(label, out) for label in labels)
    if first is not None and second is not None:
        facts.equate(first, second)
        if func.overloadpacket not in _MULTIPLIES:
            mixed = (first < 0) != (second < 0)
            for partly in (first[mixed], second[mixed]):
                facts.lock(partly, f"meets unlabelled values in {func.overloadpacket} in {facts.path() or 'the model'}")
        if func.overloadpacket in _DIVIDES:
            facts.lock(second, f"divides in {facts.path() or 'the model'}, so it may not be silent")
        facts.set_label(out, torch.where(first >= 0, first, second))
        return
    label, other = (first, args[1]) if first is not None else (second, args[0])
    if label is None:
        return
    if isinstance(other, Tensor) and _extends_along_channels(label, other):
        facts.lock(label, f"meets an unlabelled tensor in {func.overloadpacket} in {facts.path() or 'the model'}")
    elif (func.overloadpacket in _MOVES_ZERO and not _is_zero(other)) or (
        label is second and func.overloadpacket in _DIVIDES
    ):
        facts.lock(
            label, f"a constant is added in {facts.path() or 'the model'}, so a silent channel would not be silent"
        )
    facts.set_label(out, label)


_MOVES_ZERO = frozenset({aten.add, aten.sub, aten.add_, aten.sub_, aten.maximum, aten.minimum})
_DIVIDES = frozenset({aten.div, aten.div_})
_MULTIPLIES = frozenset({aten.mul, aten.mul_})


# Pooling and resampling ---------------------------------------------------------------------------------------------
@rule(
    aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d,
    aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_nearest_exact2d,
)  # fmt: skip
def spatial(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ARG001
    """Works on each channel by itself."""
    label = facts.label(args[0])
    if label is not None:
        result = out[0] if isinstance(out, (tuple, list)) else out
        facts.set_label(result, _spread(_per_channel(facts, label, str(func.overloadpacket)), result))


@rule(aten.sum, aten.mean)
def reduction(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """What is summed together lives together: stacked features entry by entry, a plane as the one channel it is."""
    label = facts.label(args[0])
    dims = args[1] if len(args) > 1 else None
    if label is None:
        return
    if not dims:
        without_rule(facts, func, args, kwargs, out)
        return
    keepdim = bool(args[2]) if len(args) > 2 else bool(kwargs.get("keepdim", False))
    most = label.amax(dims, keepdim=True)
    reduced = {dim % label.dim() for dim in dims}
    varying = {dim for dim in range(label.dim()) if _varies(label, dim)}
    if (varying and varying <= reduced) or ((label < 0) != (most < 0)).any():
        facts.lock(label, f"channels are reduced into one another in {facts.path() or 'the model'}")
    facts.equate(label, most.expand_as(label))
    facts.set_label(out, most if keepdim else most.reshape(out.shape))


# Helpers ------------------------------------------------------------------------------------------------------------
def _companion(facts: Facts, leaf: Any) -> Any:
    """Return the companion of a value; floats without one become 'no channel', indices stay themselves."""
    if not isinstance(leaf, Tensor):
        return leaf
    label = facts.label(leaf)
    if label is not None:
        return label
    return torch.full(leaf.shape, NONE) if leaf.is_floating_point() else leaf


def _pass_on(facts: Facts, source: Any, target: Tensor) -> None:
    label = facts.label(source)
    if label is not None:
        facts.set_label(target, label)


def _spread(channels: Tensor, like: Tensor) -> Tensor:
    """Expand labels of shape (C,) along dim 1 of a tensor, without memory."""
    return channels.view(1, -1, *[1] * (like.dim() - 2)).expand(like.shape)


def _per_channel(facts: Facts, label: Tensor, operator: str) -> Tensor:
    """Return the labels along dim 1, shape (C,); labels that vary inside a plane are locked and forgotten."""
    planes = label.movedim(1, 0).reshape(label.shape[1], -1)
    channels = planes[:, 0]
    if (planes == channels[:, None]).all():
        return channels
    facts.lock(label, f"channels are mixed inside a plane before {operator} in {facts.path() or 'the model'}")
    return torch.full_like(channels, NONE)


def _read(facts: Facts, axis: Tensor, inputs: Tensor) -> None:
    """Tie an input axis to the channels that it reads; entries that read no channel cannot be cut."""
    facts.equate(axis, inputs)
    facts.lock(axis[inputs < 0], "reads the image or what no rule could follow")


def _follow(facts: Facts, outputs: Tensor, inputs: Tensor) -> None:
    """Depthwise: each output lives with the input that it filters."""
    facts.equate(outputs, inputs)
    facts.lock(outputs[inputs < 0], "filters, channel by channel, what no rule could follow")


def _grouped(facts: Facts, name: str, outputs: Tensor, inputs: Tensor) -> None:
    """Grouped: one slice of the weight's input axis serves all groups, and groups need equal output counts.

    Args:
        facts: The facts.
        name: The weight's name.
        outputs: Shape (O,).
        inputs: Shape (groups, I / groups).
    """
    axis = facts.axis(name, 1, inputs.shape[1], Role.CONSUMER)
    for row in inputs:
        _read(facts, axis, row)
    facts.tie(outputs.view(inputs.shape[0], -1).unbind(), "grouped convolution")


def _vector(facts: Facts, vector: Tensor, channels: Tensor, role: Role) -> None:
    """Tie a per-channel vector to its channels."""
    name = facts.names.get(id(vector))
    if name is None:
        facts.lock(channels, f"has a vector of its own that is computed, not stored, in {facts.path() or 'the model'}")
    else:
        _follow(facts, facts.axis(name, 0, len(vector), role), channels)


def _note_norm(facts: Facts, channels: Tensor, scale: Tensor) -> None:
    """Remember which convolution feeds a batch norm directly: its constants can be folded there."""
    producer, norm = facts.owner(int(channels[0])), facts.names.get(id(scale))
    whole = producer is not None and torch.equal(channels, facts.axes[producer, 0].ids())
    if producer is not None and norm is not None and whole:
        facts.norms[producer.rpartition(".")[0]] = norm.rpartition(".")[0]


def _dim(args: Sequence[Any], kwargs: dict[str, Any], label: Tensor) -> int:
    dim: int = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    return dim % label.dim()


def _tie_parts(facts: Facts, args: Sequence[Any], kwargs: dict[str, Any], out: Sequence[Tensor]) -> None:
    """Tie the parts of a split if it cuts the channel axis."""
    label = facts.label(args[0])
    if label is not None and _varies(label, _dim(args, kwargs, label)):
        dim = _dim(args, kwargs, label)
        parts = [part for part in (facts.label(value) for value in out) if part is not None]
        planes = [part.movedim(dim, 0).flatten(1) for part in parts]
        if all((plane == plane[:, :1]).all() for plane in planes):
            facts.tie([plane[:, 0] for plane in planes], "equal split")
        else:
            facts.lock(label, f"an equal split of mixed channels in {facts.path() or 'the model'}")


def _varies(label: Tensor, dim: int) -> bool:
    """Return whether labels differ along a dimension."""
    return bool((label != label.narrow(dim, 0, 1)).any())


def _splits_channel_axis(label: Tensor, shape: Sequence[int]) -> bool:
    """Return whether a reshape cuts up or merges an axis along which labels vary."""
    before = {(label.shape[:dim].numel(), label.shape[dim]) for dim in range(label.dim()) if _varies(label, dim)}
    after = {(torch.Size(shape[:dim]).numel(), shape[dim]) for dim in range(len(shape))}
    return not before <= after


def _is_zero(operand: Any) -> bool:
    """Return whether an operand is the plain number 0 (the absent branch of a re-parameterised convolution)."""
    return isinstance(operand, (int, float)) and operand == 0


def _broadcast(label: Tensor | None, out: Tensor) -> Tensor | None:
    return None if label is None else label.expand(out.shape)


def _extends_along_channels(label: Tensor, other: Tensor) -> bool:
    """Return whether an unlabelled operand has entries of its own along an axis on which the labels vary."""
    sizes = [1] * (label.dim() - other.dim()) + list(other.shape)
    return any(size > 1 and _varies(label, dim) for dim, size in enumerate(sizes))
