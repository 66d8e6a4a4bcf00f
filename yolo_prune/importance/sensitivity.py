"""How the training loss would change: first-order Taylor expansions and Fisher information.

Sources: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019 (Taylor, by weights and by scales);
Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018. Gradients are those of batches, as
`importance.evidence` gathers them. Changes of one loss compare between layers as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from yolo_prune.channels import AxisKey, ChannelGraph
from yolo_prune.importance.base import FloatArray, Normalization, as_rows, filters, scales
from yolo_prune.importance.evidence import Evidence, Need

GRADIENTS: frozenset[Need] = frozenset({"gradients"})


@dataclass(frozen=True)
class LossChange:
    """The sum of |w * gradient|^order / order over a filter's weights, on average over batches.

    Order 1 is the first-order change of the loss if they were zero. Order 2 is the second-order one of Fisher pruning;
    the gradients are those of batches, and with `batch=1` those of the empirical Fisher matrix, its diagonal.

    Attributes:
        name: What the user types.
        order: Of the expansion.
        normalization: None is needed.
        needs: Gradients.
        by_filters: See `FilterCriterion`.
    """

    name: str
    order: Literal[1, 2]
    normalization: Normalization = "none"
    needs: frozenset[Need] = GRADIENTS
    by_filters: bool = True

    def score(self, graph: ChannelGraph, evidence: Evidence) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield the sum of every filter."""
        moments = {1: evidence.gradients, 2: evidence.squares}[self.order]
        for key, matrix in filters(graph, evidence.tensors):
            if key[0] in moments:
                rows = as_rows(moments[key[0]], key[1], graph.axes[key])
                yield key, (matrix.abs().pow(self.order) * rows).double().sum(dim=1).numpy() / self.order


@dataclass(frozen=True)
class TaylorScale:
    """(gamma * gradient)^2 of a channel's batch-norm scale: the first-order change if the scale were zero.

    The authors' code calls this BN_Taylor. A gate behind the norm, which they find better, would count the shift too.

    Attributes:
        name: What the user types.
        normalization: None is needed.
        needs: Gradients.
    """

    name: str = "taylor_scale"
    normalization: Normalization = "none"
    needs: frozenset[Need] = GRADIENTS

    def score(self, graph: ChannelGraph, evidence: Evidence) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield the square of every batch-norm scale."""
        for key, gamma in scales(graph, evidence.tensors):
            if key[0] in evidence.squares:
                yield key, (gamma.square() * evidence.squares[key[0]].cpu().double()).numpy()


TAYLOR, TAYLOR_SCALE, FISHER = LossChange("taylor", 1), TaylorScale(), LossChange("fisher", 2)
