"""The table of rules, what happens to operators that are not in it, and what several kinds of rules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from yolo_prune.channels.facts import IMAGE, Facts, Slices
from yolo_prune.channels.graph import Role
from yolo_prune.channels.labels import NONE, loud

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
    labels = [label for leaf in tree_leaves((list(args), kwargs)) if (label := facts.label(leaf)) is not None]
    if labels:
        facts.lock_without_rule(labels, str(func.overloadpacket))


def pass_on(facts: Facts, source: Any, target: Tensor) -> None:
    """Give a value the labels of the value of the same shape that it was made from."""
    label = facts.label(source)
    if label is not None:
        facts.set_label(target, label)


def per_channel(facts: Facts, label: Tensor, operator: str) -> Tensor:
    """Return the labels along dim 1, shape (C,); labels that vary inside a plane are locked and forgotten."""
    known = facts.planes(label)
    if known is not None:
        return known
    planes = label.movedim(1, 0).reshape(label.shape[1], -1)
    channels = planes[:, 0]
    if (planes == channels[:, None]).all():
        return channels
    facts.lock(label, f"channels are mixed inside a plane before {operator} in {facts.place()}")
    return torch.full_like(channels, NONE)


def read(facts: Facts, axis: Slices, x: Tensor, inputs: Tensor) -> None:
    """Tie an input axis to the channels that it reads; entries that read no channel, or a constant, cannot be cut.

    Args:
        facts: The facts.
        axis: The input axis.
        x: What is read.
        inputs: Its channels, shape (size of the axis,).
    """
    facts.equate_axes([axis], inputs, IMAGE if facts.is_image(x) else "reads what no rule could follow")
    noisy = loud(inputs)
    if noisy.any():
        facts.lock(inputs[noisy], f"would carry a constant into {facts.place()} if it were silent")


def follow(facts: Facts, axes: Iterable[Slices], inputs: Tensor) -> None:
    """Depthwise: each entry lives with the channel that it scales, and is silent whatever that carries."""
    facts.equate_axes(axes, inputs, "filters, channel by channel, what no rule could follow")


def tie_vectors(facts: Facts, vectors: Iterable[tuple[Tensor, Role]], channels: Tensor) -> None:
    """Tie per-channel vectors of the model to their channels, shape (channels,)."""
    axes = []
    for vector, role in vectors:
        name = facts.names.get(id(vector))
        if name is None:
            label = facts.label(vector)
            for locked in (channels, label) if label is not None else (channels,):
                facts.lock(locked, f"has a vector of its own that is computed, not stored, in {facts.place()}")
        else:
            axes.append(facts.axis(name, 0, len(channels), role))
    follow(facts, axes, channels)
