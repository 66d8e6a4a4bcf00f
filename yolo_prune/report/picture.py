"""The picture of a channel graph: one HTML file that needs nothing else, neither a network nor a server.

Pointing at a channel group lights every tensor that it cuts. Everything is in the page from the start; its script only
sets classes, so that a model of a thousand segments answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from yolo_prune.files import new_file
from yolo_prune.report.groups import GroupRow
from yolo_prune.report.pages import page

Segments: TypeAlias = tuple[tuple[int, int], ...]
"""Runs of entries of one group, in the order of the axis: (index of the group, entries)."""

SHORTEST_BAR_PERCENT = 15
"""Length of the bar of the narrowest axis: wide enough to point at."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """An axis, or several of one layer that are cut alike, such as a filter's and its norm's.

    Attributes:
        kind: `out` for what a layer writes, `in` for what it reads, `vector` for a vector without either.
        axes: (tensor, dim) of each.
        segments: Their entries by group.
    """

    kind: str
    axes: tuple[tuple[str, int], ...]
    segments: Segments

    @property
    def size(self) -> int:
        """Number of entries."""
        return sum(entries for _, entries in self.segments)


@dataclass(frozen=True, kw_only=True)
class Box:
    """A layer that has tensors of its own.

    Attributes:
        name: Module path; of a tensor of the model itself, the tensor's name.
        shape: Shape of its first tensor, the weight.
        bars: Its axes.
    """

    name: str
    shape: tuple[int, ...]
    bars: tuple[Bar, ...]

    def tensors(self) -> list[str]:
        """Return the names of its tensors, each once."""
        return list(dict.fromkeys(name for bar in self.bars for name, _ in bar.axes))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A top-level layer of the model.

    Attributes:
        name: Module path.
        kind: Its class.
        boxes: The layers inside, in the order of the model.
    """

    name: str
    kind: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """All that is drawn.

    Attributes:
        title: What the model is called.
        summary: A line about the whole model.
        layers: In the order of the model.
        groups: The channel groups, to whose positions the segments refer.
    """

    title: str
    summary: str
    layers: tuple[Layer, ...]
    groups: tuple[GroupRow, ...]

    def longest(self) -> int:
        """Return the entries of the longest axis."""
        return max((bar.size for layer in self.layers for box in layer.boxes for bar in box.bars), default=1)

    def anchors(self) -> dict[str, str]:
        """Return, by the name of each tensor, the identifier of the box that shows it."""
        boxes = [box for layer in self.layers for box in layer.boxes]
        return {name: f"box-{index}" for index, box in enumerate(boxes) for name in box.tensors()}


def render_picture(picture: Picture) -> str:
    """Return the page; every name in it is escaped."""
    longest = picture.longest()
    return page(
        "picture.html",
        picture=picture,
        anchors=picture.anchors(),
        length=lambda bar: bar_length_percent(bar.size, longest),
    )


def bar_length_percent(size: int, longest: int) -> int:
    """Return the length of a bar, by the root of its entries: widths of a model differ by a factor of a hundred."""
    return max(SHORTEST_BAR_PERCENT, round(100 * math.sqrt(size / longest)))


def write_picture(path: Path, picture: Picture) -> None:
    """Write the page to a new file.

    Raises:
        OutputError: The file exists or cannot be written.
    """
    with new_file(path) as temporary:
        temporary.write_text(render_picture(picture), encoding="utf-8")
