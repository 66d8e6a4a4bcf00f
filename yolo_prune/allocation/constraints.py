"""From wished widths to widths that can be built: floors, ties and multiples together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from yolo_prune.allocation.coupled import Coupled
from yolo_prune.allocation.ladders import Ladder, equations, head_ladder, independent, ladder
from yolo_prune.channels import BoolArray, ChannelGraph, IntArray, Tie
from yolo_prune.errors import ConfigError
from yolo_prune.importance import FloatArray

Attention: TypeAlias = Literal["width", "heads", "none"]
ATTENTION: tuple[Attention, ...] = get_args(Attention)
"""What attention may lose, by the name that the user types."""


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What every group must respect.

    Attributes:
        min_channels: Fewest channels that a group keeps (a narrower group stays whole).
        max_fraction: Largest fraction of a group that may be removed, in [0, 1).
        round_to: Kept widths are multiples of this, where the group is at least that wide; 1 for any width.
        attention: What attention loses: `width` of every head alike, whole `heads`, or `none`.
    """

    min_channels: int = 8
    max_fraction: float = 0.9
    round_to: int = 8
    attention: Attention = "width"

    def __post_init__(self) -> None:
        if self.min_channels < 1:
            raise ConfigError(f"min_channels={self.min_channels}", expected="at least 1")
        if not 0.0 <= self.max_fraction < 1.0:
            raise ConfigError(f"max_fraction={self.max_fraction}", expected="at least 0 and below 1")
        if self.round_to < 1:
            raise ConfigError(f"round_to={self.round_to}", expected="at least 1")
        if self.attention not in ATTENTION:
            raise ConfigError(f"attention={self.attention}", expected=f"one of {', '.join(ATTENTION)}")


class WidthSolver:
    """Turns wishes into widths for one graph, by way of `ladders` or, where they do not suffice, of `coupled`.

    Deterministic. On ladders it is monotone as well: a smaller wish never gives a larger width.

    Args:
        graph: The channel graph.
        constraints: Floors and multiples.
        scores: One score per channel, which decides the heads that go; only `attention=heads` needs it.
        whole: bool array of shape (groups,): groups that keep every channel, besides the locked ones.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        constraints: Constraints,
        *,
        scores: FloatArray | None = None,
        whole: BoolArray | None = None,
    ) -> None:
        self._graph, self._constraints = graph, constraints
        self._scores = np.zeros(graph.channel_count) if scores is None else scores
        self.widths = graph.widths()
        fraction_floor = np.ceil(self.widths * (1.0 - constraints.max_fraction) - 1e-9).astype(np.int64)
        fewest = -(-constraints.min_channels // self._blocks())
        self._floors = np.minimum(np.maximum(fraction_floor, fewest), self.widths)
        frozen = np.array([bool(group.lock) for group in graph.groups], dtype=bool)
        self.units = self._units(frozen if whole is None else frozen | whole)
        self.component = np.arange(len(self.widths)) + len(self.units)  # groups in no unit stand alone
        for number, unit in enumerate(self.units):
            self.component[unit.groups] = number

    def settle(self, wish: FloatArray | IntArray) -> IntArray:
        """Return buildable widths near the wished ones, both of shape (groups,)."""
        kept, wished = self.widths.copy(), self.widths - np.asarray(wish, dtype=float)
        for unit in self.units:
            kept[unit.groups] -= unit.nearest(wished[unit.groups])
        return kept

    def smallest(self) -> IntArray:
        """Return the smallest buildable widths, shape (groups,)."""
        return self.settle(np.zeros(len(self.widths)))

    def _units(self, frozen: BoolArray) -> list[Ladder | Coupled]:
        """Split the groups that may change into sets that choose their widths independently."""
        units: list[Ladder | Coupled] = []
        for groups, ties in _tied(self._graph, frozen):
            in_heads = any(tie.rows for tie in ties)
            if in_heads and self._constraints.attention == "none":
                continue
            lots = self._lots(groups, ties)
            if in_heads and self._constraints.attention == "heads":
                heads = head_ladder(
                    self._graph, ties, groups, self._scores,
                    max_fraction=self._constraints.max_fraction, floors=self._floors[groups], lots=lots,
                )  # fmt: skip
                units += [heads] if heads is not None else []
                continue
            matrix = equations(ties, groups)
            spans = independent(matrix)
            widths, floors = self.widths[groups], self._floors[groups]
            if spans is None:
                units.append(Coupled(groups, matrix, widths, floors, self._constraints.round_to))
                continue
            for span in spans:
                members = span > 0
                units.append(ladder(groups[members], span[members], widths[members], floors[members], lots[members]))
        return units

    def _blocks(self) -> IntArray:
        """Return how many groups of a convolution lie side by side where each group of channels is one; 1 elsewhere."""
        blocks = np.ones(len(self.widths), dtype=np.int64)
        for tie in self._graph.ties:
            if tie.blocks:
                members = list(tie.members())
                blocks[members] = np.maximum(blocks[members], tie.blocks)
        return blocks

    def _lots(self, groups: IntArray, ties: list[Tie]) -> IntArray:
        """Return the multiple for each group: what lies side by side in one layer, as heads do, counts together."""
        lots = np.full(len(groups), self._constraints.round_to)
        for tie in ties:
            beside = max(tie.rows, tie.blocks, 1)
            members = np.isin(groups, list(tie.members())) & (beside > 1)
            lots[members] = self._constraints.round_to // np.gcd(self._constraints.round_to, beside)
        return lots


def _tied(graph: ChannelGraph, frozen: BoolArray) -> list[tuple[IntArray, list[Tie]]]:
    """Return sets of groups that ties connect, each with its ties; groups that keep every channel are in none."""
    pairs = [
        (members[0], other)
        for tie in graph.ties
        if (members := [index for index in sorted(tie.members()) if not frozen[index]])
        for other in members
    ]
    first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    edges = coo_array((np.ones(len(first)), (first, second)), shape=(len(frozen), len(frozen)))
    component = connected_components(edges, directed=False)[1]
    ties = defaultdict(list)
    for tie in graph.ties:
        for number in {component[index] for index in tie.members() if not frozen[index]}:
            ties[number].append(tie)
    sets: dict[int, list[int]] = defaultdict(list)
    for group in np.flatnonzero(~frozen):
        sets[component[group]].append(int(group))
    return [(np.array(groups, dtype=np.int64), ties[number]) for number, groups in sets.items()]
