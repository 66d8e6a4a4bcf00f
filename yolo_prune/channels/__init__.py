"""Which channels belong together: the label tracer, its rules, and the channel graph that they result in."""

from yolo_prune.channels.cost import CostModel, CostTerm
from yolo_prune.channels.facts import Host
from yolo_prune.channels.graph import (
    Axis,
    AxisKey,
    BoolArray,
    ChannelGraph,
    ChannelGroup,
    IntArray,
    Rescale,
    Role,
    Tie,
    TraceReport,
)
from yolo_prune.channels.trace import trace

__all__ = [
    "Axis",
    "AxisKey",
    "BoolArray",
    "ChannelGraph",
    "ChannelGroup",
    "CostModel",
    "CostTerm",
    "Host",
    "IntArray",
    "Rescale",
    "Role",
    "Tie",
    "TraceReport",
    "trace",
]
