"""Elementwise operators: two labelled operands name the same channels; activations keep silence or end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from yolo_prune.channels.facts import Facts
from yolo_prune.channels.labels import LOUD, extends_along_channels, ids, loud, made_loud, varies
from yolo_prune.channels.rules.registry import aten, pass_on, rule, without_rule


@rule(
    aten.silu, aten.relu, aten.relu6, aten.leaky_relu, aten.hardswish, aten.gelu, aten.tanh, aten.elu, aten.celu,
    aten.mish, aten.silu_, aten.relu_, aten.leaky_relu_, aten.hardswish_, aten.elu_, aten.celu_, aten.mish_,
    aten.tanh_, aten.neg, aten.abs, aten.sqrt, aten.sin, aten.erf, aten.expm1, aten.softshrink, aten.hardshrink,
)  # fmt: skip
def zero_preserving(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:  # noqa: ARG001
    """f(0) = 0: a silent channel stays silent."""
    pass_on(facts, args[0], out)


@rule(
    aten.sigmoid, aten.hardsigmoid, aten.sigmoid_, aten.hardsigmoid_, aten.exp, aten.exp_, aten.cos, aten.softplus,
    aten.log_sigmoid_forward,
)  # fmt: skip
def zero_moving(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ARG001
    """f(0) is another number, the same at every position: a silenced channel carries it on."""
    label = facts.label(args[0])
    if label is not None:
        facts.set_label(out[0] if isinstance(out, (tuple, list)) else out, made_loud(label))


@rule(aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_min_, aten.clamp_max, aten.clamp_max_,
      aten.hardtanh, aten.hardtanh_)  # fmt: skip
def clamp(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """Zero stays zero if it lies within the bounds."""
    label = facts.label(args[0])
    names = {
        aten.clamp_min: ("min",), aten.clamp_min_: ("min",), aten.clamp_max: ("max",), aten.clamp_max_: ("max",),
        aten.hardtanh: ("min_val", "max_val"), aten.hardtanh_: ("min_val", "max_val"),
    }.get(func.overloadpacket, ("min", "max"))  # fmt: skip
    defaults = {"min_val": -1.0, "max_val": 1.0}
    bounds = {name: kwargs.get(name, defaults.get(name)) for name in names} | dict(zip(names, args[1:], strict=False))
    if label is None or any(isinstance(bound, Tensor) for bound in bounds.values()):
        without_rule(facts, func, args, kwargs, out)
        return
    low, high = ([bound for name, bound in bounds.items() if kind in name] for kind in ("min", "max"))
    kept = all(bound is None or bound <= 0 for bound in low) and all(bound is None or bound >= 0 for bound in high)
    facts.set_label(out, label if kept else made_loud(label))


@rule(aten.pow)
def power(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """A positive power of zero is zero."""
    label = facts.label(args[0])
    if label is None or not isinstance(args[1], (int, float)) or args[1] <= 0:
        without_rule(facts, func, args, kwargs, out)
    else:
        facts.set_label(out, label)


@rule(aten._prelu_kernel)
def prelu(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:  # noqa: ARG001
    """One slope a channel lives with its channel; one slope for all belongs to none."""
    label, slopes = facts.label(args[0]), facts.label(args[1])
    if label is None:
        return
    if slopes is not None and args[1].numel() > 1:
        facts.equate(label, slopes.expand(label.shape))
    facts.set_label(out, label)


_MULTIPLIES = frozenset({aten.mul, aten.mul_})
_DIVIDES = frozenset({aten.div, aten.div_})


@rule(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.maximum, aten.minimum,
      aten.add_, aten.sub_, aten.mul_, aten.div_)  # fmt: skip
def binary(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:  # noqa: ARG001
    """Two labelled operands name the same channels, entry by entry; one with a single entry for all of them none."""
    first, second = (_operand(facts, operand, out) for operand in args[:2])
    if first is not None and second is not None and args[0].shape != args[1].shape:
        first, second = _without_gates(facts, args, (first, second), out)
    if first is not None and second is not None:
        _two_labelled(facts, func, first, second, out)
    elif first is not None:
        _one_labelled(facts, func, first, args[1], out, divides=False)
    elif second is not None:
        _one_labelled(facts, func, second, args[0], out, divides=func.overloadpacket in _DIVIDES)


def _operand(facts: Facts, operand: Any, out: Tensor) -> Tensor | None:
    """Return an operand's labels, shaped like the result; one number for all channels belongs to none of them."""
    label = facts.label(operand) if getattr(operand, "ndim", 0) and operand.numel() > 1 else None
    return label if label is None or label.shape == out.shape else label.expand(out.shape)


def _without_gates(
    facts: Facts, args: Sequence[Any], labels: tuple[Tensor, Tensor], out: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Lock what has one entry for all channels of the other operand, as a gate has, and forget its labels here."""
    ungated: list[Tensor | None] = []
    for operand, label, other in zip(args[:2], labels, reversed(labels), strict=True):
        sizes = [1] * (out.dim() - operand.dim()) + list(operand.shape)
        planes = facts.planes(other) is not None  # then its labels vary along dim 1 alone
        spread = [dim for dim, size in enumerate(sizes) if size == 1 < out.shape[dim] and (dim == 1 or not planes)]
        gates = any(varies(other, dim) for dim in spread)
        if gates:
            facts.lock(label, f"meets all channels alike in {facts.place()}")
        ungated.append(None if gates else label)
    return ungated[0], ungated[1]


def _two_labelled(facts: Facts, func: Any, first: Tensor, second: Tensor, out: Tensor) -> None:
    one, other = facts.planes(first), facts.planes(second)
    if one is None or other is None:
        facts.set_label(out, _merged(facts, func, first, second))
    else:  # one entry a plane says it all
        facts.set_planes(out, _merged(facts, func, one, other))


def _merged(facts: Facts, func: Any, first: Tensor, second: Tensor) -> Tensor:
    """Equate two labels and return that of the result."""
    facts.equate(first, second)
    multiplies, divides = func.overloadpacket in _MULTIPLIES, func.overloadpacket in _DIVIDES
    if not multiplies:
        mixed = (first < 0) != (second < 0)
        for partly in (first[mixed], second[mixed]):
            facts.lock(partly, f"meets unlabelled values in {func.overloadpacket} in {facts.place()}")
    if divides:
        facts.lock(second[~loud(second)], f"divides in {facts.place()}, so it may not be silent")
    merged = torch.where(first >= 0, ids(first), ids(second))
    # A product is silent where one factor is; a sum, where both summands are; a quotient, where its numerator is.
    noisy = _noisy(first) & _noisy(second) if multiplies else loud(first) if divides else loud(first) | loud(second)
    return torch.where(noisy & (merged >= 0), merged | LOUD, merged)


def _noisy(label: Tensor) -> Tensor:
    """Return where a factor does not silence a product: loud, or of no channel."""
    return loud(label) | (label < 0)


def _one_labelled(facts: Facts, func: Any, label: Tensor, other: Any, out: Tensor, *, divides: bool) -> None:
    """An unlabelled operand of its own for every channel locks; any other scales silence, or ends it."""
    if isinstance(other, Tensor) and extends_along_channels(label, other):
        facts.lock(label, f"meets an unlabelled tensor in {func.overloadpacket} in {facts.place()}")
    if divides:
        facts.lock(label[~loud(label)], f"divides in {facts.place()}, so it may not be silent")
    scales = divides or func.overloadpacket in _MULTIPLIES | _DIVIDES
    facts.set_label(out, label if scales or _is_zero(other) else made_loud(label))


def _is_zero(operand: Any) -> bool:
    """Return whether an operand is the plain number 0 (the absent branch of a re-parameterised convolution)."""
    return isinstance(operand, (int, float)) and operand == 0
