"""What filters put out: how often it is quiet, and how much its maps hold.

Sources: Hu et al., Network Trimming (APoZ), 2016; Lin et al., HRank, 2020. Both count exact zeros or ranks, which SiLU
leaves trivial: zeros hardly occur and every map has full rank. So the share of values near zero stands for that of
zeros (`evidence.QUIET`), and the effective rank for the rank. Layers are differently quiet, and ranks depend on the
maps' sides, so both are divided by their group's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from yolo_prune.channels import AxisKey, ChannelGraph
from yolo_prune.importance.base import FloatArray, Normalization
from yolo_prune.importance.evidence import Activations, Evidence, Need


@dataclass(frozen=True)
class FeatureMaps:
    """A criterion that looks at what each convolution's filters put out.

    Attributes:
        name: What the user types.
        value: From what is known of it to one score per filter.
        normalization: Division by the group's mean.
        needs: Activations.
    """

    name: str
    value: Callable[[Activations], Tensor]
    normalization: Normalization = "mean"
    needs: frozenset[Need] = frozenset({"activations"})

    def score(
        self,
        graph: ChannelGraph,  # noqa: ARG002  # the protocol's
        evidence: Evidence,
    ) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield the scores of the filters of every convolution."""
        for key, found in evidence.activations.items():
            yield key, self.value(found).cpu().double().numpy()


APOZ = FeatureMaps("apoz", lambda found: 1.0 - found.quiet)
HRANK = FeatureMaps("hrank", lambda found: found.rank)
