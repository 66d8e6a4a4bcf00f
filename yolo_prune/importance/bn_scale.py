"""Batch-norm scales (Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from yolo_prune.channels import AxisKey, ChannelGraph
from yolo_prune.importance.base import FloatArray, Normalization, scales
from yolo_prune.importance.evidence import Evidence, Need


@dataclass(frozen=True)
class BatchNormScale:
    """|gamma|: what a channel can pass on after normalisation.

    Attributes:
        name: What the user types.
        needs: Nothing but weights.
        normalization: Scales follow a normalisation, so the paper compares them raw over all layers.
    """

    name: str = "bn_scale"
    normalization: Normalization = "none"
    needs: frozenset[Need] = frozenset()

    def score(self, graph: ChannelGraph, evidence: Evidence) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield |gamma| of every batch norm."""
        for key, gamma in scales(graph, evidence.tensors):
            yield key, gamma.abs().numpy()


BN_SCALE = BatchNormScale()
