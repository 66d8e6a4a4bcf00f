"""Channels that are silent already: nothing of the network has to be approximated to remove them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from yolo_prune.channels import BoolArray, ChannelGraph, IntArray, Role, Tie


def silent_channels(tensors: Mapping[str, Tensor], graph: ChannelGraph) -> BoolArray:
    """Return which channels are zero whatever the image, shape (channels,).

    Every producer has to be silent: the scale and the shift of a batch norm are zero, or the filter and the bias of a
    layer without one. What a convolution in front of a batch norm has no longer matters then.

    Args:
        tensors: Parameters of the network by name.
        graph: Its channel graph.
    """
    silent = np.zeros(graph.channel_count, dtype=bool)
    loud = np.zeros(graph.channel_count, dtype=bool)
    for (name, dim), axis in graph.axes.items():
        if axis.role is not Role.PRODUCER or name.rpartition(".")[0] in graph.norms:
            continue
        silent[axis.channels] = True
        if axis.groups > 1:  # entries that differ from block to block: left alone
            loud[axis.channels] = True
            continue
        entries = tensors[name].detach().movedim(dim, 0)
        heard = (entries.reshape(len(entries), -1) != 0).any(dim=1)
        loud[axis.channels[heard.cpu().numpy()]] = True
    return silent & ~loud


def without_silent(graph: ChannelGraph, silent: BoolArray) -> BoolArray:
    """Return the keep mask, shape (channels,), that removes as many silent channels as the graph allows.

    Locked channels stay, so does one channel of each group. Tied groups lose as many as the least silent of them has;
    ties between unlike parts, and rows (attention's heads), lose nothing.

    Args:
        graph: The channel graph.
        silent: Which channels are silent, shape (channels,).
    """
    lost: IntArray = np.array(
        [0 if group.lock else min(int(silent[group.channels].sum()), group.width - 1) for group in graph.groups]
    )
    before = None
    while before is None or (lost != before).any():
        before = lost.copy()
        for tie in graph.ties:
            members = sorted(tie.members())
            lost[members] = lost[members].min() if _is_plain(tie) else 0
    keep = np.ones(graph.channel_count, dtype=bool)
    for group, count in zip(graph.groups, lost, strict=True):
        keep[group.channels[silent[group.channels]][:count]] = False
    graph.check_keep(keep)
    return keep


def _is_plain(tie: Tie) -> bool:
    """Return whether each part of a tie is one group, of which a channel takes one entry."""
    return not tie.rows and all(len(part) == 1 and part[0][1] == 1 for part in tie.sets)
