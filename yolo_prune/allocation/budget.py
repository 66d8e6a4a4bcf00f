"""Choose how many channels stay where, for a target in MACs or parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from yolo_prune.allocation.constraints import Constraints, WidthSolver
from yolo_prune.allocation.knapsack import Knapsack
from yolo_prune.allocation.latency import LatencyModel
from yolo_prune.allocation.layers import layer_ratios
from yolo_prune.allocation.paths import DropCurve, EqualDrop, Path, Ratios, Uniform
from yolo_prune.allocation.threshold import GlobalThreshold
from yolo_prune.channels import BoolArray, ChannelGraph, IntArray
from yolo_prune.errors import ConfigError, InfeasibleTargetError
from yolo_prune.importance import FloatArray


def require_ratio(unit: str, ratio: object) -> None:
    """Refuse a target that is no fraction.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(ratio, (int, float)) or not 0.0 < ratio < 1.0:
        raise ConfigError(
            f"target_{unit}={ratio}",
            expected="a number above 0 and below 1: the fraction that is kept",
            remedy=f"target_{unit}=0.5 keeps half",
        )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the slim model may cost.

    Attributes:
        unit: What is counted.
        ratio: Fraction of the dense model's cost that is kept, in (0, 1).
        imgsz_px: Image side at which MACs are counted.
        latency: What predicts latencies; for that unit only.
    """

    unit: Literal["macs", "params", "latency"]
    ratio: float
    imgsz_px: int = 640
    latency: LatencyModel | None = None

    def __post_init__(self) -> None:
        require_ratio(self.unit, self.ratio)
        if (self.unit == "latency") != (self.latency is not None):
            raise ConfigError(
                f"a budget of {self.unit} {'with' if self.latency else 'without'} a model of latency",
                expected="a model for latency, and for nothing else",
            )

    def cost(self, graph: ChannelGraph, kept: IntArray) -> float:
        """Return the cost at kept widths, shape (groups,); see `costs`."""
        return float(self.costs(graph, kept))

    def costs(self, graph: ChannelGraph, kept: IntArray) -> FloatArray:
        """Return the costs at kept widths: MACs, parameters, or predicted latency (1 for the dense network).

        Args:
            graph: The channel graph.
            kept: Kept channels per group, shape (groups,) or (candidates, groups).

        Returns:
            Shape () or (candidates,).
        """
        if self.latency is not None:
            return self.latency.predict(kept)
        if self.unit == "macs":
            return graph.cost.macs(kept, imgsz_px=self.imgsz_px)
        return graph.cost.params(kept)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How a budget is met.

    Attributes:
        path: `global` ranks what can be built in the whole network by its mean score; `uniform` takes the same fraction
            everywhere; `knapsack` keeps the importance that the budget has room for.
        constraints: Floors and multiples.
        ratios: Instead of `path`: the fraction that goes, by pattern of layers; see `layers.layer_ratios`. Layers that
            none matches stay whole.
        drops: Instead of `path`: measured drops of the mAP, by group name; see `paths.EqualDrop`.
    """

    path: str = "global"
    constraints: Constraints = field(default_factory=Constraints)
    ratios: Mapping[str, float] | None = None
    drops: Mapping[str, DropCurve] | None = None

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ConfigError(f"allocation={self.path}", expected=f"one of {', '.join(PATHS)}")


def allocate(graph: ChannelGraph, scores: FloatArray, budget: Budget | None, allocation: Allocation) -> BoolArray:
    """Choose the kept channels.

    Args:
        graph: The channel graph.
        scores: One score per channel, shape (channels,); the lowest of each group go first.
        budget: What the slim model may cost. None takes the ratios of the layers as they are; with a budget they are
            scaled to meet it.
        allocation: How the budget is met.

    Returns:
        Keep mask of shape (channels,), within the budget.

    Raises:
        ConfigError: A pattern that no layer matches, or neither a budget nor ratios.
        InfeasibleTargetError: The floors do not allow the target; the message names the smallest reachable one.
    """
    ratios = None if allocation.ratios is None else layer_ratios(graph, allocation.ratios)
    solver = solver_for(graph, allocation.constraints, scores, whole=None if ratios is None else ratios == 0.0)
    if budget is None:
        if ratios is None:
            raise ConfigError("neither a budget nor ratios of layers", expected="one of them")
        return lowest_go(graph, scores, solver.settle(graph.widths() * (1.0 - ratios)))
    require_reachable(graph, budget, solver)
    path: Path
    if ratios is not None:
        path = Ratios(graph, ratios)
    elif allocation.drops is not None:
        path = EqualDrop(graph, allocation.drops)
    else:
        path = PATHS[allocation.path](graph, scores, solver, budget)
    return lowest_go(graph, scores, meet(graph, budget, solver, path))


PATHS: dict[str, Callable[[ChannelGraph, FloatArray, WidthSolver, Budget], Path]] = {
    "global": lambda graph, scores, solver, _budget: GlobalThreshold(graph, scores, solver),
    "uniform": lambda graph, _scores, _solver, _budget: Uniform(graph),
    "knapsack": lambda graph, scores, solver, budget: Knapsack(graph, scores, solver, partial(budget.costs, graph)),
}
"""Every allocation by the name that the user types."""


def solver_for(
    graph: ChannelGraph, constraints: Constraints, scores: FloatArray, *, whole: BoolArray | None = None
) -> WidthSolver:
    """Return what can be built of a graph; groups with a channel that has no finite score stay whole.

    Args:
        graph: The channel graph.
        constraints: Floors and multiples.
        scores: One score per channel, shape (channels,).
        whole: bool array of shape (groups,): further groups that stay whole.
    """
    unscored = np.array([not np.isfinite(scores[group.channels]).all() for group in graph.groups])
    return WidthSolver(graph, constraints, scores=scores, whole=unscored if whole is None else unscored | whole)


def require_reachable(graph: ChannelGraph, budget: Budget, solver: WidthSolver) -> None:
    """Refuse a budget that floors do not allow.

    Raises:
        InfeasibleTargetError: The message names the smallest reachable one.
    """
    lowest = lowest_ratio(graph, budget, solver)
    if lowest > budget.ratio:
        reachable = np.ceil(lowest * 1e4) / 1e4
        raise InfeasibleTargetError(
            f"target_{budget.unit}={budget.ratio} cannot be reached within the floors",
            expected=f"at least {reachable:.4f}, the smallest that min_channels, max_fraction and round_to allow"
            + (", as the profile predicts" if budget.latency else ""),
            remedy="raise the target, or lower min_channels and round_to or raise max_fraction",
        )


def lowest_ratio(graph: ChannelGraph, budget: Budget, solver: WidthSolver) -> float:
    """Return the smallest fraction of the dense model's cost that floors allow, in the unit of a budget."""
    return budget.cost(graph, solver.smallest()) / budget.cost(graph, graph.widths())


def meet(graph: ChannelGraph, budget: Budget, solver: WidthSolver, path: Path) -> IntArray:
    """Return the widths of the first step of a path within a budget, and what still fits given back.

    Args:
        graph: The channel graph.
        budget: What the slim model may cost; the smallest widths do not cost more.
        solver: What can be built.
        path: Where to look.
    """
    limit = budget.ratio * budget.cost(graph, graph.widths())
    low, high = 0, path.steps  # the cost at `low` is above the limit, at `high` within it
    while high - low > 1:
        middle = (low + high) // 2
        if budget.cost(graph, solver.settle(path.wish(middle))) > limit:
            low = middle
        else:
            high = middle
    return _give_back(graph, budget, solver, limit, solver.settle(path.wish(high)), solver.settle(path.wish(low)))


def _give_back(
    graph: ChannelGraph, budget: Budget, solver: WidthSolver, limit: float, kept: IntArray, before: IntArray
) -> IntArray:
    """Restore, one tied set at a time, the widths of the step before where the budget still allows it.

    Rounding makes many groups step at once, so the first step within the limit may lie well below it.
    """
    for component in np.unique(solver.component[before > kept]):
        candidate = np.where(solver.component == component, before, kept)
        if budget.cost(graph, candidate) <= limit:
            kept = candidate
    return kept


def lowest_go(graph: ChannelGraph, scores: FloatArray, kept: IntArray) -> BoolArray:
    """Keep the best-scored channels of each group; equal scores favour the lower channel number.

    Args:
        graph: The channel graph.
        scores: One score per channel, shape (channels,).
        kept: Kept channels of every group, shape (groups,).

    Returns:
        Keep mask of shape (channels,).
    """
    keep = np.zeros(graph.channel_count, dtype=bool)
    for group, width in zip(graph.groups, kept, strict=True):
        order = np.argsort(-scores[group.channels], kind="stable")
        keep[group.channels[order[:width]]] = True
    return keep
