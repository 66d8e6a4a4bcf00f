"""A new layer table for a model of this host: its layers in order, and which earlier ones each reads.

The host's network is a list of layers; a layer knows its number `i` and the numbers `f` of those that it reads (-1: the
one before), and the model keeps the outputs named in `save`. Rows are written first, layers are made at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from ultralytics.nn.modules.block import SPPF, Bottleneck
from ultralytics.nn.modules.conv import Concat, Conv

from yolo_prune.surgery.sums import Source, Value, whole

IMAGE = -1
"""Number of what the first layer reads."""

SCALING = ("scales", "depth_multiple", "width_multiple")
"""Keys of a yaml that multiply the widths of its rows."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A layer to be.

    Attributes:
        make: Returns the layer; called once.
        reads: Numbers of the layers that it reads.
        several: It takes a list.
        origin: Number of the old layer that it stems from.
        width: Channels of its output.
    """

    make: Callable[[], nn.Module]
    reads: tuple[int, ...]
    several: bool
    origin: int
    width: int


class LayerTable:
    """The rows of a new table.

    Attributes:
        rows: What was added, in order.
        origin: Number of the old layer from which the rows that are added now stem.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.origin = 0
        self._gathered: dict[tuple[Source, ...], Source] = {}

    def add(
        self, make: Callable[[], nn.Module], reads: Sequence[Source], width: int, *, several: bool = False
    ) -> Value:
        """Add a layer and return what it puts out.

        Args:
            make: Returns the layer; called once, when the table is complete.
            reads: What it reads.
            width: Channels of its output; 1 stands for what is not one feature map and is only ever handed on.
            several: It takes a list, however many it reads.
        """
        numbers = tuple(source.number for source in reads)
        self.rows.append(Row(make=make, reads=numbers, several=several, origin=self.origin, width=width))
        return whole(Source(len(self.rows) - 1, width))

    def gathered(self, sources: tuple[Source, ...]) -> Source:
        """Return one tensor that holds these side by side, with a layer that concatenates them where there is none."""
        if len(sources) == 1:
            return sources[0]
        if sources not in self._gathered:
            value = self.add(lambda: Concat(1), sources, sum(source.width for source in sources), several=True)
            self._gathered[sources] = value.sources()[0]
        return self._gathered[sources]

    def install(self, model: Any) -> None:
        """Make the layers and give them to a model in place of its own, with a yaml that counts them."""
        layers: list[Any] = [row.make() for row in self.rows]
        froms = [self._from(number) for number in range(len(self.rows))]
        for number, (layer, source) in enumerate(zip(layers, froms, strict=True)):
            kind = type(layer)
            layer.i, layer.f, layer.type = number, source, f"{kind.__module__}.{kind.__qualname__}"
            layer.np = sum(parameter.numel() for parameter in layer.parameters())
        model.yaml = self._yaml(model.yaml, layers)
        model.model = nn.Sequential(*layers)
        named = [number for source in froms for number in ([source] if isinstance(source, int) else source)]
        model.save = sorted({number for number in named if number != IMAGE})

    def _from(self, number: int) -> int | list[int]:
        """Return the `f` of a layer. What is read as -1 need not be kept; the host looks up what the head reads."""
        row, head = self.rows[number], number == len(self.rows) - 1
        reads = [-1 if at == number - 1 and not (row.several and head) else at for at in row.reads]
        return reads if row.several else reads[0]

    def _yaml(self, old: dict[str, Any], layers: Sequence[Any]) -> dict[str, Any]:
        """Return a yaml with a row for each layer, its output's width written out: nothing is left to scale.

        It describes the network and tells backbone from neck. No yaml of the host can say every width of a network that
        was pruned or rewritten, so it is not what such a network is built from.
        """
        rows = [*old["backbone"], *old["head"]]
        described: list[list[Any]] = []
        for layer, row in zip(layers, self.rows, strict=True):
            name, args = _described(layer, row.width, rows[row.origin])
            described.append([layer.f, _repeats(layer), name, args])
        backbone = sum(row.origin < len(old["backbone"]) for row in self.rows)
        kept = {key: value for key, value in old.items() if key not in SCALING}
        return {**kept, "backbone": described[:backbone], "head": described[backbone:]}


def _described(layer: Any, width: int, old: Sequence[Any]) -> tuple[str, list[Any]]:
    """Return the type and the arguments of a layer as a yaml has them."""
    if type(layer) is Conv:
        conv = layer.conv
        sizes = [_size(pair) for pair in (conv.kernel_size, conv.stride, conv.padding)]
        shape = [*sizes, conv.groups, _size(conv.dilation)]
        return "Conv", [width, *shape, not isinstance(layer.act, nn.Identity)]
    if type(layer) is Bottleneck:
        first, second = layer.cv1.conv, layer.cv2.conv
        kernels = [_size(first.kernel_size), _size(second.kernel_size)]
        return "Bottleneck", [width, layer.add, second.groups, kernels, first.out_channels / width]
    if type(layer) is Concat:
        return "Concat", [layer.d]
    name, args = old[2], list(old[3])
    if name.rpartition(".")[2] != type(_first(layer)).__name__:  # a part of the old layer
        return type(layer).__name__, [width]
    if hasattr(layer, "npr"):  # the width of a mask head's prototypes
        args[2] = layer.npr
    if type(layer) is SPPF and len(args) > 3:
        args[3] = layer.add
    return name, [width, *args[1:]] if args and isinstance(args[0], int) else args


def _size(pair: tuple[int, int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)


def _first(layer: nn.Module) -> nn.Module:
    """Return the block that a row of a yaml repeats."""
    return layer[0] if type(layer) is nn.Sequential else layer


def _repeats(layer: Any) -> int:
    """Return how often a row of a yaml repeats its block, or its block's inner one."""
    if type(layer) is nn.Sequential:
        return len(layer)
    inner = getattr(layer, "m", None)
    return len(inner) if isinstance(inner, (nn.Sequential, nn.ModuleList)) else 1
