"""From wished widths to widths that can be built: floors, ties and multiples together.

Deterministic and monotone: a smaller wish never gives a larger width, so budgets can be met by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from yolo_prune.channels import BoolArray, ChannelGraph, IntArray
from yolo_prune.errors import ConfigError
from yolo_prune.importance import FloatArray


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What every group must respect.

    Attributes:
        min_channels: Fewest channels that a group keeps (a narrower group stays whole).
        max_fraction: Largest fraction of a group that may be removed, in [0, 1).
        round_to: Kept widths are multiples of this, where the group is at least that wide; 1 for any width.
    """

    min_channels: int = 8
    max_fraction: float = 0.9
    round_to: int = 8

    def __post_init__(self) -> None:
        if self.min_channels < 1:
            raise ConfigError(f"min_channels={self.min_channels}", expected="at least 1")
        if not 0.0 <= self.max_fraction < 1.0:
            raise ConfigError(f"max_fraction={self.max_fraction}", expected="at least 0 and below 1")
        if self.round_to < 1:
            raise ConfigError(f"round_to={self.round_to}", expected="at least 1")


class WidthSolver:
    """Turns wishes into widths for one graph.

    Tied groups are of one width each side in every supported block, so a tie is solved by giving all its groups the
    mean of their wishes; a tie between unions of groups keeps them whole.

    Args:
        graph: The channel graph.
        constraints: Floors and multiples.
        whole: bool array of shape (groups,): groups that keep every channel, besides the locked ones.
    """

    def __init__(self, graph: ChannelGraph, constraints: Constraints, *, whole: BoolArray | None = None) -> None:
        self.widths = graph.widths()
        self.round_to = constraints.round_to
        self.component = _tied(graph)
        frozen = np.array([bool(group.lock) for group in graph.groups])
        if whole is not None:
            frozen |= whole
        for tie in graph.ties:
            if any(len(part) != 1 for part in tie.sets):
                frozen[[index for part in tie.sets for index in part]] = True
        frozen_components = np.unique(self.component[frozen])
        self.frozen = np.isin(self.component, frozen_components)
        fraction_floor = np.ceil(self.widths * (1.0 - constraints.max_fraction) - 1e-9).astype(np.int64)
        floor = np.minimum(np.maximum(fraction_floor, constraints.min_channels), self.widths)
        self.floor = np.where(self.frozen, self.widths, self._round_up(floor))

    def settle(self, wish: FloatArray | IntArray) -> IntArray:
        """Return buildable widths near the wished ones, both of shape (groups,)."""
        members = np.bincount(self.component)
        shared = (np.bincount(self.component, weights=wish) / members)[self.component]
        rounded = np.floor(shared / self.round_to + 0.5).astype(np.int64) * self.round_to
        # A group that is no multiple wide has one more choice: to stay whole.
        whole = self.widths - shared <= shared - np.minimum(rounded, self.widths // self.round_to * self.round_to)
        rounded = np.where((rounded > self.widths) | whole, self.widths, rounded)
        return np.maximum(rounded, self.floor)

    def smallest(self) -> IntArray:
        """Return the smallest buildable widths, shape (groups,)."""
        return self.floor.copy()

    def _round_up(self, widths: IntArray) -> IntArray:
        return np.minimum(-(-widths // self.round_to) * self.round_to, self.widths)


def _tied(graph: ChannelGraph) -> IntArray:
    """Return, for every group, the number of the set of groups that ties connect it with."""
    pairs = [(tie.sets[0][0], index) for tie in graph.ties for part in tie.sets for index in part]
    first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    size = len(graph.groups)
    edges = coo_array((np.ones(len(first)), (first, second)), shape=(size, size))
    return connected_components(edges, directed=False)[1].astype(np.int64)
