"""Products of two activations, as attention forms them, and the softmax between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from yolo_prune.channels.facts import Facts
from yolo_prune.channels.labels import loud, made_loud, varies
from yolo_prune.channels.rules.registry import aten, rule, without_rule


@rule(aten.bmm)
def batched_product(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """What is summed over pairs up (queries with keys); what is not keeps its channels (values).

    `out[b, n, m] = sum_k left[b, n, k] right[b, k, m]`: channels along k of both sides are the same channels, one of
    which has to be silent; channels along n (or m) of one side label the result.
    """
    left, right = args[:2]
    summed_left, rows = _sides(facts, left, summed=2, free=1)
    summed_right, columns = _sides(facts, right, summed=1, free=2)
    if summed_left is not None and summed_right is not None:
        facts.equate(summed_left, summed_right)
        facts.lock(summed_left[loud(summed_left) & loud(summed_right)], f"pairs constants in {facts.place()}")
        facts.price(out.shape[1] * out.shape[2], [summed_left], None)
        return
    for label in (summed_left, summed_right):
        if label is not None:
            facts.lock(label, f"is summed with fixed values in {facts.place()}")
    if rows is not None and columns is None:
        facts.set_label(out, rows[:, :, None].expand(out.shape))
        facts.price(left.shape[2] * out.shape[2], [rows], None)
    elif columns is not None and rows is None:
        facts.set_label(out, columns[:, None, :].expand(out.shape))
        facts.price(left.shape[2] * out.shape[1], [columns], None)
    elif rows is not None and columns is not None:
        without_rule(facts, func, args, kwargs, out)  # values that belong to two channels at once


def _sides(facts: Facts, operand: Tensor, *, summed: int, free: int) -> tuple[Tensor | None, Tensor | None]:
    """Return an operand's labels along the dimension that is summed over or along the free one, or neither.

    Args:
        facts: The facts.
        operand: Shape (batch, ., .).
        summed: The dimension that is summed over.
        free: The other one.
    """
    label = facts.label(operand)
    if label is None or (label < 0).all():
        return None, None
    if not varies(label, free) and (varies(label, summed) or operand.shape[summed] == 1):
        return label.select(free, 0), None
    if not varies(label, summed):
        return None, label.select(summed, 0)
    facts.lock(label, f"channels lie along both sides of a product in {facts.place()}")
    return None, None


@rule(aten._softmax)
def softmax(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """Over positions of a channel it turns zeros into a constant; over channels it mixes them."""
    label = facts.label(args[0])
    if label is None or varies(label, args[1] % label.dim()):
        without_rule(facts, func, args, kwargs, out)
    else:
        facts.set_label(out, made_loud(label))
