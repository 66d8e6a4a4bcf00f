"""What several methods have to know of an optimizer's steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch.optim import Optimizer

from yolo_prune.importance.base import FloatArray


def skipped(optimizer: Optimizer) -> bool:
    """Return whether a step does nothing: a fused optimizer is called even if AMP found overflowing gradients."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def learning_rates(
    initial: float, factor: Callable[[int], float], *, epochs: int, batches: int, warmup: int, accumulate: float
) -> FloatArray:
    """Return the sum of the learning rates of each epoch's steps, shape (epochs,), as both hosts schedule them.

    Args:
        initial: Learning rate that the schedule multiplies.
        factor: From epoch to its multiple.
        epochs: Epochs of the training.
        batches: Batches of an epoch.
        warmup: Batches of warm-up, over which the learning rate rises from 0 and the gathered batches from 1.
        accumulate: Batches that a step gathers after it.
    """
    sums = np.zeros(epochs)
    for epoch in range(epochs):
        rate, iterations = initial * factor(epoch), epoch * batches + np.arange(batches)
        rates, gathered = np.full(batches, rate), np.full(batches, float(accumulate))
        if warmup:
            rates = np.interp(iterations, [0, warmup], [0.0, rate])
            gathered = np.interp(iterations, [0, warmup], [1.0, accumulate]).round().clip(1)
        sums[epoch] = float((rates / gathered).sum())
    return sums
