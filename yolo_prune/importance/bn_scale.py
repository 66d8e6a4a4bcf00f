"""Batch-norm scales (Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from yolo_prune.channels import AxisKey, ChannelGraph
from yolo_prune.importance.base import FloatArray, Normalization, scales


@dataclass(frozen=True)
class BatchNormScale:
    """|gamma|: what a channel can pass on after normalisation.

    Attributes:
        name: What the user types.
        normalization: Scales follow a normalisation, so the paper compares them raw over all layers.
    """

    name: str = "bn_scale"
    normalization: Normalization = "none"

    def score(self, graph: ChannelGraph, tensors: Mapping[str, Tensor]) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield |gamma| of every batch norm."""
        for key, gamma in scales(graph, tensors):
            yield key, gamma.abs().numpy()


BN_SCALE = BatchNormScale()
