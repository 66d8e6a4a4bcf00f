"""Silence channels instead of removing them: the same rule as surgery, with zeros, on the producers' side only."""

from __future__ import annotations

import torch
from torch import nn

from yolo_prune.channels import BoolArray, ChannelGraph, Role
from yolo_prune.channels.tensors import named_tensors


def silence(model: nn.Module, graph: ChannelGraph, keep: BoolArray, *, constants: bool = False) -> None:
    """Zero, in place, everything that produces the removed channels: filters, biases, BN scales and shifts.

    Consumers are untouched, so a model that still agrees with its sliced copy depended on nothing else.

    Args:
        model: The traced model.
        graph: Its channel graph.
        keep: Keep mask of shape (channels,).
        constants: Leave biases and shifts alone, so that removed channels carry the constant that is left of them.
    """
    tensors = named_tensors(model)
    with torch.no_grad():
        for (name, dim), axis in graph.axes.items():
            removed = torch.from_numpy(~keep[axis.channels])
            if axis.role is Role.PRODUCER and removed.any() and not (constants and name.endswith(".bias")):
                blocks = tensors[name].chunk(axis.groups) if axis.groups > 1 else (tensors[name],)
                for block, part in zip(blocks, removed.chunk(axis.groups), strict=True):
                    block.index_fill_(dim, part.nonzero()[:, 0], 0.0)
