"""Sums that are never formed: convolutions read their terms side by side instead.

A convolution is linear in its input, so W(x + s) = [W W][x; s]: whoever reads a sum may read the concatenation of its
terms with the weights repeated, and a term that arrives by several ways takes the sum of the weights. Nothing else may
stand between the sum and its reader but what is linear and works channel by channel: concatenation, up-sampling.

Source: the RM operation of Meng et al., "RMNet: Equivalently Removing Residual Connection from Networks" (2021), which
reserves the input through ReLU. This form needs no such thing, so it is exact for any activation before the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yolo_prune.errors import PlanError


@dataclass(frozen=True)
class Source:
    """A tensor that exists while a network runs.

    Attributes:
        number: What tells it from others; whoever runs the network knows it by this.
        width: Its channels.
    """

    number: int
    width: int


@dataclass(frozen=True)
class Value:
    """Channels that may be sums: each is the sum of the source channels that stand at its place.

    Attributes:
        width: Its channels.
        terms: Sources, each with the channel of the value at which its first channel stands.
    """

    width: int
    terms: tuple[tuple[Source, int], ...]

    def sources(self) -> tuple[Source, ...]:
        """Return every source once, in the order in which they first appear."""
        return tuple(dict.fromkeys(source for source, _ in self.terms))

    def wholes(self) -> tuple[Source, ...] | None:
        """Return the sources whose mere concatenation this is; None if some channel is a sum."""
        end = 0
        for source, start in self.terms:
            if start != end:
                return None
            end += source.width
        return tuple(source for source, _ in self.terms) if end == self.width else None


def whole(source: Source) -> Value:
    """Return the value of a tensor as it is."""
    return Value(source.width, ((source, 0),))


def concatenated(values: Sequence[Value]) -> Value:
    """Return the values side by side, as `torch.cat(values, 1)`."""
    terms: list[tuple[Source, int]] = []
    width = 0
    for value in values:
        terms += [(source, width + start) for source, start in value.terms]
        width += value.width
    return Value(width, tuple(terms))


def added(values: Sequence[Value]) -> Value:
    """Return the sum of values of one width.

    Raises:
        PlanError: Their widths differ.
    """
    widths = {value.width for value in values}
    if len(widths) != 1:
        raise PlanError(f"a sum of {sorted(widths)} channels", expected="terms of one width")
    return Value(widths.pop(), tuple(term for value in values for term in value.terms))


def widened(weight: Tensor, value: Value) -> Tensor:
    """Return the weight that gives, on the concatenated `value.sources()`, what `weight` gives on the value.

    Args:
        weight: Of shape (outputs, value.width, ...), of a convolution without groups.
        value: What the convolution reads.

    Returns:
        Of shape (outputs, channels of all sources, ...), added up in fp64 and rounded once to the weight's type.

    Raises:
        PlanError: The weight reads another number of channels.
    """
    if weight.shape[1] != value.width:
        raise PlanError(f"a weight of shape {tuple(weight.shape)}", expected=f"{value.width} inputs, as the value has")
    starts, width = {}, 0
    for source in value.sources():
        starts[source] = width
        width += source.width
    result = torch.zeros(len(weight), width, *weight.shape[2:], dtype=torch.float64, device=weight.device)
    for source, at in value.terms:
        result.narrow(1, starts[source], source.width).add_(weight.narrow(1, at, source.width))
    return result.to(weight.dtype)
