"""Ways from the dense model to an empty one; a budget picks the place on the way.

A path has steps 0..n; at step k it wishes a width for every group, never larger than at step k - 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from yolo_prune.channels import ChannelGraph
from yolo_prune.errors import ConfigError
from yolo_prune.importance import FloatArray


class Path(Protocol):
    """A monotone family of wishes.

    Attributes:
        steps: Number of the last step.
    """

    steps: int

    def wish(self, step: int) -> FloatArray:
        """Return the wished width of every group at a step, shape (groups,)."""
        ...


class Uniform:
    """Step k removes the same fraction k / steps of every group."""

    steps = 10_000

    def __init__(self, graph: ChannelGraph) -> None:
        self._widths = graph.widths()

    def wish(self, step: int) -> FloatArray:
        """Return the scaled width of every group."""
        return self._widths.astype(np.float64) * (1.0 - step / self.steps)


REACH = 1000.0
"""Largest multiple of given ratios on the way to the empty model."""


class Ratios:
    """Step k removes a multiple of each group's own ratio, at most all of the group; the multiple grows from 0.

    Args:
        graph: The channel graph.
        ratios: How much of each group goes, in proportion to the others, shape (groups,); above 0.
    """

    steps = 10_000

    def __init__(self, graph: ChannelGraph, ratios: FloatArray) -> None:
        self._widths = graph.widths().astype(np.float64)
        self._ratios = np.clip(ratios / ratios.max(), 1.0 / REACH, 1.0)

    def wish(self, step: int) -> FloatArray:
        """Return the scaled width of every group."""
        return self._widths * (1.0 - np.minimum(self._ratios * _growing(step / self.steps), 1.0))


def _growing(part: float) -> float:
    """Go from 0 to `REACH`, in fine steps first: most budgets are met there."""
    return (1.0 + REACH) ** part - 1.0


@dataclass(frozen=True, kw_only=True)
class DropCurve:
    """What the removal of parts of one group was seen to cost.

    Attributes:
        removed: Fractions of the group, ascending, above 0; 1 at most, where the whole group may go, as a head does.
        drops: Loss of the score at each; below 0 where it rose.

    Raises:
        ConfigError: They are not that.
    """

    removed: tuple[float, ...]
    drops: tuple[float, ...]

    def __post_init__(self) -> None:
        places = [0.0, *self.removed]
        if len(self.removed) != len(self.drops) or not np.isfinite(self.drops).all():
            raise ConfigError(f"drops {self.drops} at {self.removed}", expected="a number for each fraction")
        if any(high <= low for low, high in pairwise(places)) or places[-1] > 1.0:
            raise ConfigError(f"fractions {self.removed}", expected="ascending ones above 0 and up to 1")


class EqualDrop:
    """Step k removes as much of every group as costs the same: its own measured drop of the score.

    Source: the sensitivity analysis of Li et al., Pruning Filters for Efficient ConvNets, 2017, section 3.1.

    Args:
        graph: The channel graph.
        drops: Curves by group name, between whose points is interpolated; behind the last one, and for groups without
            one, an even slope leads to twice the largest drop for the whole group, unless that was measured.
    """

    steps = 10_000

    def __init__(self, graph: ChannelGraph, drops: Mapping[str, DropCurve]) -> None:
        self._widths = graph.widths().astype(np.float64)
        self._most = max([drop for curve in drops.values() for drop in curve.drops], default=0.0)
        self._most = max(self._most, TELLABLE)
        self._curves = [self._curve(drops.get(group.name)) for group in graph.groups]

    def wish(self, step: int) -> FloatArray:
        """Return the width of every group whose drop is that of the step."""
        allowed = (2.0 * self._most + TELLABLE) * _growing(step / self.steps) / REACH
        return self._widths * (1.0 - np.array([np.interp(allowed, *curve) for curve in self._curves]))

    def _curve(self, known: DropCurve | None) -> tuple[FloatArray, FloatArray]:
        """Return drops that only grow, and the fraction removed at each: from nothing to the whole group."""
        removed = np.array([0.0, *(known.removed if known else ())])
        drops = np.array([0.0, *(known.drops if known else ())])
        if removed[-1] < 1.0:
            removed, drops = np.append(removed, 1.0), np.append(drops, 2.0 * self._most)
        # Never falling, and rising a little where the score did not: an even slope there is the least guess.
        return np.maximum.accumulate(drops) + TELLABLE * removed, removed


TELLABLE = 1e-4
"""A drop of the score that can be told from none."""
