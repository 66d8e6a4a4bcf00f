"""What a trace results in: channels, the groups that they form, locks with their reasons, and ties.

A *channel* is a class of parameter slices that live or die together. Channels are numbered 0..n-1; every parameter axis
that carries channels maps its entries to these numbers.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from yolo_prune.channels.cost import CostModel
from yolo_prune.errors import PlanError

IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

AxisKey: TypeAlias = tuple[str, int]
"""(state-dict name of a parameter or buffer, dimension)."""


class Role(enum.Enum):
    """What zeroing one entry of an axis does to the channel."""

    PRODUCER = "producer"
    """Filters, biases, BN scales and shifts: zeroing all of a channel's producer entries silences it."""
    CONSUMER = "consumer"
    """Input slices of a convolution: they read the channel."""
    STATISTIC = "statistic"
    """Running means and variances: they follow the channel and are left alone by masking."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One dimension of one tensor.

    Attributes:
        role: How the axis takes part in its channels.
        channels: int64 array of shape (groups * size of the dimension,): the channel of each entry.
        groups: Of a grouped convolution, on dim 1 of its weight: block g of the rows of dim 0 has entries of its own
            there, which `channels` lists block after block. 1 everywhere else.
    """

    role: Role
    channels: IntArray
    groups: int = 1


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that cut the same axes, the unit in which widths are chosen.

    Attributes:
        name: Module path of the first producer, with `#k` where one producer feeds several groups.
        channels: int64 array of shape (width,), in the order of the first producer's entries.
        axes: The axes that removing a channel cuts.
        lock: Why no channel of the group may be removed; empty if they may.
    """

    name: str
    channels: IntArray
    axes: tuple[AxisKey, ...]
    lock: str = ""

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.channels)


@dataclass(frozen=True, kw_only=True)
class Tie:
    """Parts that must lose the same number of entries, each choosing its own.

    Attributes:
        sets: For each part, the groups that make it up: (index into `ChannelGraph.groups`, entries of the part that
            one channel of the group takes).
        where: Operator and module path that need equal counts.
        rows: If the parts are rows of rectangles, the number of rows (attention's heads); 0 if they are not. A whole
            row may go, whatever the others lose.
        blocks: If the parts are the groups of one convolution, their number; 0 if they are not. What a layer should
            keep at least, or as a multiple, counts over all of them.
    """

    sets: tuple[tuple[tuple[int, int], ...], ...]
    where: str
    rows: int = 0
    blocks: int = 0

    def members(self) -> set[int]:
        """Return the indices of all groups in it."""
        return {index for part in self.sets for index, _ in part}

    def entries(self, counts: IntArray) -> list[int]:
        """Return the entries of each part at given channels per group, shape (groups,)."""
        return [sum(int(counts[index]) * entries for index, entries in part) for part in self.sets]


@dataclass(frozen=True, kw_only=True)
class Rescale:
    """Values that grow by the square root of the kept share of their entries.

    Attention divides by the root of its key width, read from the weights; this keeps the quotient as it was.

    Attributes:
        axes: The vectors that hold the values.
        entries: int64 array: the entries, the same in each vector.
    """

    axes: tuple[AxisKey, ...]
    entries: IntArray


@dataclass(frozen=True, kw_only=True)
class TraceReport:
    """What the trace could not settle by itself; data for `inspect`, never hidden.

    Attributes:
        operators_without_rule: Operator name to the number of calls that locked something.
        operators_at_outputs: Those of them that touched only channels which reach the model's output: these are locked
            whatever a rule would say.
        untraced_parameters: Parameters that no traced forward touched.
    """

    operators_without_rule: Mapping[str, int] = field(default_factory=dict)
    operators_at_outputs: tuple[str, ...] = ()
    untraced_parameters: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChannelGraph:
    """Which parameter slices belong together.

    Attributes:
        axes: Every parameter or buffer axis that carries channels.
        groups: Partition of the channels.
        ties: Equal-count constraints between groups.
        cost: Closed form of MACs and parameters over the kept widths of `groups`.
        rescales: Values that change with the number of their kept entries.
        norms: Batch-norm module path for each convolution module path that directly feeds one.
        report: What the trace could not settle.
        channel_count: Number of channels.
        image_channels: Channels of the traced image.
    """

    axes: Mapping[AxisKey, Axis]
    groups: tuple[ChannelGroup, ...]
    ties: tuple[Tie, ...]
    cost: CostModel
    rescales: tuple[Rescale, ...]
    norms: Mapping[str, str]
    report: TraceReport
    channel_count: int
    image_channels: int

    def group_names(self) -> dict[str, int]:
        """Return the index of each group by its name."""
        return {group.name: index for index, group in enumerate(self.groups)}

    def free_groups(self) -> list[int]:
        """Return the indices of the groups whose channels may be removed."""
        return [index for index, group in enumerate(self.groups) if not group.lock]

    def widths(self) -> IntArray:
        """Return the width of every group, shape (groups,)."""
        return np.array([group.width for group in self.groups], dtype=np.int64)

    def kept_widths(self, keep: BoolArray) -> IntArray:
        """Return the number of kept channels of every group, shape (groups,)."""
        return np.array([int(keep[group.channels].sum()) for group in self.groups], dtype=np.int64)

    def check_keep(self, keep: BoolArray) -> None:
        """Refuse a keep mask that cannot be applied.

        Args:
            keep: bool array of shape (channel_count,).

        Raises:
            PlanError: Wrong shape, a locked channel removed, a group emptied, or a tie broken.
        """
        if keep.shape != (self.channel_count,) or keep.dtype != np.bool_:
            raise PlanError(
                f"keep mask has shape {keep.shape} and type {keep.dtype}",
                expected=f"shape ({self.channel_count},), one bool a channel",
            )
        kept = self.kept_widths(keep)
        in_rows = {index for tie in self.ties if tie.rows for index in tie.members()}
        for index, (group, width) in enumerate(zip(self.groups, kept, strict=True)):
            if group.lock and width != group.width:
                raise PlanError(f"{group.width - width} channels of locked '{group.name}' removed", expected=group.lock)
            if width == 0 and index not in in_rows:
                raise PlanError(f"every channel of '{group.name}' removed", expected="at least one kept channel")
        for tie in self.ties:
            self._check_tie(tie, kept)

    def _check_tie(self, tie: Tie, kept: IntArray) -> None:
        left, whole = tie.entries(kept), tie.entries(self.widths())
        counts = [before - after for before, after in zip(whole, left, strict=True) if after or not tie.rows]
        if not counts:
            raise PlanError(f"every row at {tie.where} removed", expected="at least one that is kept")
        if len(set(counts)) > 1:
            raise PlanError(f"tie at {tie.where} broken: parts lose {counts}", expected="equal counts in each part")
