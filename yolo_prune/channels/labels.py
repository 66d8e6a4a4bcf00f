"""Arithmetic of labels: companions of activations whose entries name channels.

A label is an id of a parameter slice, or `NONE`. The bit `LOUD` is set where the value is *not* zero although the
channel's producers are silenced, as after a sigmoid: such a channel may be cut only where something multiplies it by a
silent one, or where a scale of its own silences it again, before it is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NONE = -1
"""Label of a value that belongs to no channel."""

LOUD = 1 << 40
"""Bit of a label: the value is not zero where its channel is silenced. No model has so many slices."""

IDS = LOUD - 1
"""Bits of a label that hold the id."""


def ids(label: Tensor) -> Tensor:
    """Return labels without the bit: ids or `NONE`, in the same shape."""
    return torch.where(label >= 0, label & IDS, label)


def loud(label: Tensor) -> Tensor:
    """Return which entries are loud, as a bool mask of the labels' shape."""
    return (label >= 0) & (label & LOUD != 0)


def made_loud(label: Tensor) -> Tensor:
    """Return labels of values that are no longer zero where their channels are silenced."""
    return torch.where(label >= 0, label | LOUD, label)


def varies(label: Tensor, dim: int) -> bool:
    """Return whether labels differ along a dimension."""
    return bool((label != label.narrow(dim, 0, 1)).any())


def varying_dims(label: Tensor) -> list[int]:
    """Return the dimensions along which labels differ."""
    return [dim for dim in range(label.dim()) if varies(label, dim)]


def spread(channels: Tensor, like: Tensor) -> Tensor:
    """Expand labels of shape (C,) along dim 1 of a tensor, without memory."""
    return channels.view(1, -1, *[1] * (like.dim() - 2)).expand(like.shape)


def cuts_channel_axis(label: Tensor, shape: Sequence[int]) -> bool:
    """Return whether a reshape cuts up or merges an axis along which labels vary."""
    before = {(label.shape[:dim].numel(), label.shape[dim]) for dim in varying_dims(label)}
    after = {(torch.Size(shape[:dim]).numel(), shape[dim]) for dim in range(len(shape))}
    return not before <= after


def extends_along_channels(label: Tensor, other: Tensor) -> bool:
    """Return whether an unlabelled operand has entries of its own along an axis on which the labels vary."""
    sizes = [1] * (label.dim() - other.dim()) + list(other.shape)
    return any(size > 1 and varies(label, dim) for dim, size in enumerate(sizes))
