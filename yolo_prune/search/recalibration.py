"""Adaptive batch normalisation: the statistics of norms that a pruned network's own activations have.

Source: Li et al., EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning, 2020, section 3.2. A network
that lost channels still carries the means and variances of the whole one, which hides what its weights are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolo_prune.errors import ConfigError

Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object]) -> int:
    """Measure the running statistics of every batch norm anew, in place; nothing else changes.

    Each batch counts alike: at a momentum such as YOLO's 0.03, a twentieth of the stale statistics would be left after
    100 batches. The model runs as in training, so that branches which only training runs are measured too; dropout is
    left out, and norms that no batch reaches keep what they have.

    Args:
        model: The model, in float32.
        batches: What `forward` takes; of training images, never of those that are scored.
        forward: Runs the model on a batch.

    Returns:
        The number of batches.

    Raises:
        ConfigError: No batch, or activations that are not finite (the statistics are then as they were).
    """
    norms: list[Any] = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [_statistics(norm) for norm in norms]
    momenta, modes = [norm.momentum for norm in norms], [module.training for module in model.modules()]
    count = 0
    try:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        for norm in norms:
            norm.momentum = None  # an average in which all batches count alike
            norm.reset_running_stats()
        for count, batch in enumerate(batches, start=1):  # noqa: B007  # returned
            forward(model, batch)
        if not count:
            raise ConfigError("no batch to recalibrate batch norms on", expected="training images")
        for norm, old in zip(norms, before, strict=True):
            if not norm.num_batches_tracked:
                _restore(norm, old)
            elif not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
                raise ConfigError("activations that are not finite", expected="finite weights and images")
    except BaseException:
        for norm, old in zip(norms, before, strict=True):
            _restore(norm, old)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, was in zip(model.modules(), modes, strict=True):
            module.training = was
    return count


def _statistics(norm: Any) -> Statistics:
    return norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()


def _restore(norm: Any, statistics: Statistics) -> None:
    for buffer, value in zip((norm.running_mean, norm.running_var, norm.num_batches_tracked), statistics, strict=True):
        buffer.copy_(value)
