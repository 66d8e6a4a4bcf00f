"""The engine, told what it has to know about this host: trace, slice, prove."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from yolo_prune.channels import BoolArray, ChannelGraph, trace
from yolo_prune.hosts.ultralytics.blocks import host_for, reread
from yolo_prune.surgery import Verifier, apply


def trace_model(model: Any) -> ChannelGraph:
    """Return the channel graph of a model of this host; the model is left bit-identical.

    The image spans two cells of the coarsest feature map, so that a pooled map can be told from an unpooled one.
    """
    side = trace_side(model)
    channels = int(model.yaml.get("channels", 3))
    return trace(model, torch.zeros(1, channels, side, side), host=host_for(model))


def trace_side(model: Any) -> int:
    """Return the side in pixels of a small image that runs every layer of a model."""
    stride = max(32, int(model.stride.max()))  # classifiers do not tell theirs
    side = 2 * stride
    queries = getattr(model.model[-1], "num_queries", 0)  # a transformer decoder picks as many cells of its maps
    while queries > sum((side // level) ** 2 for level in (stride, stride // 2, stride // 4)):
        side += stride
    return side


def slim_copy(model: nn.Module, graph: ChannelGraph, keep: BoolArray) -> nn.Module:
    """Return a slim copy of a model, made of stock classes, its blocks' sizes re-read."""
    return apply(model, graph, keep, reread=[reread])


def verifier(dense: nn.Module, graph: ChannelGraph) -> Verifier:
    """Return what proves slim copies of a model; see `surgery.verify`."""
    return Verifier(dense, graph, host=host_for(dense), deployed=_fused)


def _fused(model: Any) -> nn.Module:
    fused: nn.Module = model.fuse(verbose=False)
    return fused
