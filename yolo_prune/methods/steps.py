"""What the hooks of several methods on an optimizer have to know of its steps."""

from __future__ import annotations

from torch.optim import Optimizer


def skipped(optimizer: Optimizer) -> bool:
    """Return whether a step does nothing: a fused optimizer is called even if AMP found overflowing gradients."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
