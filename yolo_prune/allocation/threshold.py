"""The channels with the lowest scores of the whole network go first.

Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017, section 3: one threshold
for all layers. Channels go by what can be built, though, not one by one: of tied groups, such as the halves of a C2f,
each loses as many, and widths are multiples. Channels ranked singly would want other numbers of either half, and
settling between them takes good channels of the one and leaves dead ones in the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from yolo_prune.allocation.constraints import WidthSolver
from yolo_prune.allocation.stairs import Stairs, stairs_of
from yolo_prune.channels import ChannelGraph, IntArray
from yolo_prune.importance import FloatArray


class GlobalThreshold:
    """Each step takes one set of tied groups down to another state: where the mean score of what goes is lowest.

    Args:
        graph: The channel graph.
        scores: One score per channel, shape (channels,); the lowest of each group go first.
        solver: What can be built.
    """

    def __init__(self, graph: ChannelGraph, scores: FloatArray, solver: WidthSolver) -> None:
        self._widths = graph.widths()
        self._stairs = [stairs_of(graph, scores, unit) for unit in solver.units]
        ways = [
            (mean, number, state)
            for number, stairs in enumerate(self._stairs)
            for mean, state in _steps(stairs, self._widths)
        ]
        # Equal means in the order of the network, so that a plan is the same on every machine.
        self._order = [(number, state) for _, number, state in sorted(ways)]
        self.steps = len(self._order)

    def wish(self, step: int) -> FloatArray:
        """Return the widths after so many steps."""
        widths = self._widths.astype(np.float64)
        for number, state in dict(self._order[:step]).items():  # the last state of each set
            widths[self._stairs[number].groups] = self._stairs[number].kept[state]
        return widths


def _steps(stairs: Stairs, widths: IntArray) -> Iterator[tuple[float, int]]:
    """Yield the mean score of the channels that go, and the state that is left, so that means never fall.

    From each state the way goes to the one with the lowest mean: a state in between that costs more would have to wait
    for its own mean, and hold up what is cheap behind it.
    """
    gone = (widths[stairs.groups] - stairs.kept).sum(axis=1)
    at = 0
    while at < len(gone) - 1:
        means = (stairs.lost[at + 1 :] - stairs.lost[at]) / (gone[at + 1 :] - gone[at])
        at += 1 + int(means.argmin())
        yield float(means.min()), at
