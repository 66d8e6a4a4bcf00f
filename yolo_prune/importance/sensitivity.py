"""How the training loss would change: first-order Taylor expansions and Fisher information.

Sources: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019 (Taylor, by weights and by scales);
Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018. Gradients are those of batches, as
`importance.evidence` gathers them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from yolo_prune.channels import AxisKey, ChannelGraph
from yolo_prune.importance.base import FloatArray, Normalization, as_rows, filters, scales
from yolo_prune.importance.evidence import Evidence, Need

GRADIENTS: frozenset[Need] = frozenset({"gradients"})


@dataclass(frozen=True)
class Taylor:
    """The sum of |w * gradient| over a filter's weights: the first-order change of the loss if they were zero.

    Attributes:
        name: What the user types.
        normalization: Changes of one loss compare between layers.
        needs: Gradients.
    """

    name: str = "taylor"
    normalization: Normalization = "none"
    needs: frozenset[Need] = GRADIENTS

    def score(self, graph: ChannelGraph, evidence: Evidence) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield the sum of every filter."""
        for key, matrix in filters(graph, evidence.tensors):
            if key[0] in evidence.gradients:
                yield key, _summed(matrix.abs() * _rows(graph, key, evidence.gradients[key[0]]))


@dataclass(frozen=True)
class TaylorScale:
    """(gamma * gradient)^2 of a channel's batch-norm scale: the first-order change if the scale were zero.

    The authors' code calls this BN_Taylor. A gate behind the norm, which they find better, would count the shift too.

    Attributes:
        name: What the user types.
        normalization: Changes of one loss compare between layers.
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


@dataclass(frozen=True)
class Fisher:
    """The sum of gradient^2 * w^2 / 2 over a filter's weights: a second-order change of the loss.

    The gradients are those of batches; with `batch=1` they are those of the empirical Fisher matrix, its diagonal.

    Attributes:
        name: What the user types.
        normalization: Changes of one loss compare between layers.
        needs: Gradients.
    """

    name: str = "fisher"
    normalization: Normalization = "none"
    needs: frozenset[Need] = GRADIENTS

    def score(self, graph: ChannelGraph, evidence: Evidence) -> Iterator[tuple[AxisKey, FloatArray]]:
        """Yield the sum of every filter."""
        for key, matrix in filters(graph, evidence.tensors):
            if key[0] in evidence.squares:
                yield key, _summed(0.5 * matrix.square() * _rows(graph, key, evidence.squares[key[0]]))


def _rows(graph: ChannelGraph, key: AxisKey, values: Tensor) -> Tensor:
    return as_rows(values, key[1], graph.axes[key])


def _summed(matrix: Tensor) -> FloatArray:
    scores: FloatArray = matrix.double().sum(dim=1).numpy()
    return scores


TAYLOR, TAYLOR_SCALE, FISHER = Taylor(), TaylorScale(), Fisher()
