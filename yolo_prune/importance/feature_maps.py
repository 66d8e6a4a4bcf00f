"""What filters put out: how often it is quiet, and how much its maps hold.

Sources: Hu et al., Network Trimming (APoZ), 2016; Lin et al., HRank, 2020. Both count exact zeros or ranks, which SiLU
leaves trivial: zeros hardly occur and every map has full rank. So the share of values near zero stands for that of
zeros, and the effective rank for the rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from yolo_prune.channels import AxisKey, ChannelGraph
from yolo_prune.importance.base import FloatArray, Normalization
from yolo_prune.importance.evidence import Evidence, Need

ACTIVATIONS: frozenset[Need] = frozenset({"activations"})


@dataclass(frozen=True)
class Loudness:
    """1 - APoZ: the share of a channel's activations that are not near zero; see `evidence.QUIET`.

    Attributes:
        name: What the user types.
        normalization: Layers are differently quiet, so shares are divided by their group's mean.
        needs: Activations.
    """

    name: str = "apoz"
    normalization: Normalization = "mean"
    needs: frozenset[Need] = ACTIVATIONS

    def score(
        self,
        graph: ChannelGraph,  # noqa: ARG002  # the protocol's
        evidence: Evidence,
    ) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield the share of every filter."""
        for key, found in evidence.activations.items():
            yield key, _scores(1.0 - found.quiet)


@dataclass(frozen=True)
class Rank:
    """The mean effective rank of a channel's feature maps.

    Attributes:
        name: What the user types.
        normalization: Ranks depend on the maps' sides, so they are divided by their group's mean.
        needs: Activations.
    """

    name: str = "hrank"
    normalization: Normalization = "mean"
    needs: frozenset[Need] = ACTIVATIONS

    def score(
        self,
        graph: ChannelGraph,  # noqa: ARG002  # the protocol's
        evidence: Evidence,
    ) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield the rank of every filter."""
        for key, found in evidence.activations.items():
            yield key, _scores(found.rank)


def _scores(values: Tensor) -> FloatArray:
    scores: FloatArray = values.cpu().double().numpy()
    return scores


APOZ, HRANK = Loudness(), Rank()
