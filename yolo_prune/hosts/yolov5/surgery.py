"""The engine on classic models: trace, slice, prove. Their blocks hide no sizes in Python: there is little to tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from yolo_prune.channels import BoolArray, ChannelGraph, trace
from yolo_prune.surgery import Verifier, apply


def trace_model(model: Any) -> ChannelGraph:
    """Return the channel graph of a classic model; the model is left bit-identical.

    The image spans two cells of the coarsest feature map, so that a pooled map can be told from an unpooled one.
    """
    side = 2 * int(model.stride.max())
    return trace(model, torch.zeros(1, int(model.yaml.get("ch", 3)), side, side))


def slim_copy(model: nn.Module, graph: ChannelGraph, keep: BoolArray) -> nn.Module:
    """Return a slim copy of a model, made of the same classes."""
    return apply(model, graph, keep)


def verifier(dense: nn.Module, graph: ChannelGraph) -> Verifier:
    """Return what proves slim copies of a model; see `surgery.verify`."""
    return Verifier(dense, graph)
