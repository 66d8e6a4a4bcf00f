"""Which convolutions can have a compactor, and how far their rows reach.

A compactor mixes the channels that it gets, so a row of it makes a channel alone. Where a shortcut adds outputs, or a
depthwise layer or a second branch writes the same channel, a row that is zero silences nothing: these have none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from yolo_prune.allocation import Budget, Constraints
from yolo_prune.allocation.budget import lowest_ratio, solver_for
from yolo_prune.channels import ChannelGraph, IntArray, Role
from yolo_prune.errors import ConfigError, InfeasibleTargetError
from yolo_prune.importance import FloatArray


def sole_producers(graph: ChannelGraph) -> dict[str, IntArray]:
    """Return the convolutions that, with the batch norm behind them, alone make channels that may go.

    Args:
        graph: Channel graph of the network without compactors.

    Returns:
        For each path, the channel of each output, shape (outputs,).
    """
    written = np.zeros(graph.channel_count, dtype=np.int64)
    for axis in graph.axes.values():
        if axis.role is Role.PRODUCER:
            np.add.at(written, axis.channels, 1)
    free = np.zeros(graph.channel_count, dtype=bool)
    for index in graph.free_groups():
        free[graph.groups[index].channels] = True
    found = {}
    for conv, norm in graph.norms.items():
        own = [name for name in (f"{conv}.weight", f"{conv}.bias", f"{norm}.weight", f"{norm}.bias")
               if (name, 0) in graph.axes]  # fmt: skip
        if (f"{conv}.weight", 0) not in graph.axes or graph.axes[f"{conv}.weight", 0].role is not Role.PRODUCER:
            continue
        channels = graph.axes[f"{conv}.weight", 0].channels
        alike = all(np.array_equal(graph.axes[name, 0].channels, channels) for name in own)
        if alike and free[channels].all() and (written[channels] == len(own)).all():
            found[conv] = channels
    return found


def maskable(graph: ChannelGraph, targets: Mapping[str, IntArray]) -> ChannelGraph:
    """Return the graph with every group locked whose channels no compactor makes.

    Args:
        graph: Channel graph of the network without compactors.
        targets: Channels of the convolutions that have one, by path.
    """
    made = np.zeros(graph.channel_count, dtype=bool)
    for channels in targets.values():
        made[channels] = True
    groups = tuple(
        group if group.lock or made[group.channels].all() else dataclasses.replace(group, lock="has no compactor")
        for group in graph.groups
    )
    return dataclasses.replace(graph, groups=groups)


def prunable(graph: ChannelGraph, targets: Mapping[str, IntArray], constraints: Constraints) -> dict[str, IntArray]:
    """Return the targets that can lose a channel within floors, multiples and ties."""
    locked = maskable(graph, targets)
    smallest = solver_for(locked, constraints, np.zeros(graph.channel_count)).smallest()
    shrinks = np.zeros(graph.channel_count, dtype=bool)
    for group, width in zip(graph.groups, smallest, strict=True):
        shrinks[group.channels] = width < group.width
    return {path: channels for path, channels in targets.items() if shrinks[channels].any()}


def require_target(graph: ChannelGraph, budget: Budget, constraints: Constraints) -> float:
    """Return the smallest fraction of the MACs that masks can reach.

    Args:
        graph: A graph as `maskable` returns it.
        budget: What shall be reached.
        constraints: Floors and multiples.

    Raises:
        ConfigError: No convolution can have a compactor.
        InfeasibleTargetError: The budget is below what can be reached.
    """
    if not graph.free_groups():
        raise ConfigError(
            "no convolution of this network can have a compactor",
            expected="convolutions with a batch norm whose outputs no shortcut, depthwise layer or branch shares",
            remedy="freeze less or lower min_channels and round_to; or prune with another method",
        )
    lowest = lowest_ratio(graph, budget, solver_for(graph, constraints, np.zeros(graph.channel_count)))
    if lowest > budget.ratio:
        raise InfeasibleTargetError(
            f"target_macs={budget.ratio} cannot be reached with method=resrep",
            expected=f"at least {np.ceil(lowest * 1e4) / 1e4:.4f}: convolutions whose outputs a shortcut adds have no "
            "compactor, and the others keep what min_channels, max_fraction and round_to ask for",
            remedy="raise the target, lower min_channels and round_to, raise max_fraction, or prune with "
            "prune_every=, which narrows shortcuts as well",
        )
    return lowest


def row_scores(graph: ChannelGraph, norms: Mapping[str, FloatArray], targets: Mapping[str, IntArray]) -> FloatArray:
    """Return the norm of each row as the score of its channel, shape (channels,); infinity where there is no row."""
    scores = np.full(graph.channel_count, np.inf)
    for path, values in norms.items():
        scores[targets[path]] = values
    return scores
