"""How much of which layer goes, as a person writes it down."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

from yolo_prune.channels import ChannelGraph, ChannelGroup, Role
from yolo_prune.errors import ConfigError
from yolo_prune.importance import FloatArray


def layer_ratios(graph: ChannelGraph, ratios: Mapping[str, float]) -> FloatArray:
    """Return the fraction that goes of every group, shape (groups,).

    Args:
        graph: The channel graph.
        ratios: Fraction by pattern: a module path, in which `*` and `?` stand for anything. It means all modules below
            that path. Of several patterns that match a group the last one counts; groups that none matches stay whole.

    Raises:
        ConfigError: A ratio out of range, a pattern that matches nothing, or only what is locked.
    """
    found = np.zeros(len(graph.groups))
    places = [_places(graph, group) for group in graph.groups]
    for pattern, ratio in ratios.items():
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio < 1.0:
            raise ConfigError(f"ratio {ratio!r} of '{pattern}'", expected="a number from 0 to below 1: what goes")
        matched = [index for index, paths in enumerate(places) if any(fnmatchcase(path, pattern) for path in paths)]
        free = [index for index in matched if not graph.groups[index].lock]
        if not free:
            raise _nothing(graph, pattern, matched, places)
        found[free] = ratio
    return found


def _places(graph: ChannelGraph, group: ChannelGroup) -> set[str]:
    """Return the paths of the modules that produce a group's channels, and of all modules that they are in."""
    producers = {key[0].rpartition(".")[0] for key in group.axes if graph.axes[key].role is Role.PRODUCER}
    return {".".join(path.split(".")[:depth]) for path in producers for depth in range(1, path.count(".") + 2)}


def _nothing(graph: ChannelGraph, pattern: str, matched: list[int], places: list[set[str]]) -> ConfigError:
    if matched:
        locked = graph.groups[matched[0]]
        return ConfigError(
            f"nothing of '{pattern}' may go: {locked.lock}",
            expected="a layer with channels that are not locked",
            remedy="yolo-prune inspect shows them",
        )
    near = difflib.get_close_matches(pattern, sorted(set().union(*places)), n=3)
    return ConfigError(
        f"no layer matches '{pattern}'",
        expected="the path of a module" + (f", such as {', '.join(near)}" if near else ""),
        remedy="yolo-prune inspect shows them",
    )
