"""One walk through a model's old layers that writes the rows of the new ones.

Values that are sums are not written: they travel as their terms, through `Concat` and nearest `Upsample`, to whoever
reads them, and dense convolutions read the terms side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn
from ultralytics.nn.modules.conv import Concat, RepConv

from yolo_prune.hosts.ultralytics.shortcuts.blocks import adds, readers
from yolo_prune.hosts.ultralytics.shortcuts.table import IMAGE, LayerTable
from yolo_prune.surgery.sums import Source, Value, concatenated, whole, widened

Expansion: TypeAlias = "Callable[[Walk, Any, Value], Value]"
"""Writes the rows of a block that reads a value; returns what the block puts out."""


class ObstacleError(Exception):
    """A sum that cannot be read.

    Args:
        layers: Numbers of the old layers that have to keep their sums for it.
        reason: Why.
    """

    def __init__(self, layers: frozenset[int], reason: str) -> None:
        super().__init__(reason)
        self.layers, self.reason = layers, reason


class Walk:
    """One walk through the old layers: it writes the rows of the new ones and changes none of them.

    Args:
        widths: Channels of the image and of what each old layer puts out.
        left: Numbers of the old layers that keep their sums.
        expansions: How blocks are taken apart.

    Attributes:
        table: The new rows.
        expanded: Numbers of the old layers whose sums are gone.
    """

    def __init__(
        self, widths: Sequence[int], left: Mapping[int, str], expansions: Mapping[type[nn.Module], Expansion]
    ) -> None:
        self.table = LayerTable()
        self.expanded: list[int] = []
        self._widths, self._left, self._expansions = widths, left, expansions
        self._values = {IMAGE: whole(Source(IMAGE, widths[0]))}
        self._origins = {IMAGE: frozenset[int]()}  # old layers whose sums an output carries
        self._carried = frozenset[int]()
        self._number, self._layer = 0, ""

    def step(self, number: int, layer: Any) -> None:
        """Write the rows of an old layer.

        Raises:
            ObstacleError: It cannot read a sum.
        """
        reads = [layer.f] if isinstance(layer.f, int) else layer.f
        reads = [at if at >= 0 else number + at for at in reads]
        self._number, self._layer, self.table.origin = number, f"layer {number} ({type(layer).__name__})", number
        self._carried = frozenset[int]().union(*(self._origins[at] for at in reads))
        values = [self._values[at] for at in reads]
        expands = adds(layer) and number not in self._left
        if expands:
            value = self.expand(layer, values[0])
            self.expanded.append(number)
        else:
            value = self._kept(layer, values, self._widths[number + 1])
        self._values[number] = value
        self._origins[number] = frozenset() if value.wholes() else self._carried | ({number} if expands else set())

    def _kept(self, layer: Any, values: list[Value], width: int) -> Value:
        """Write an old layer that keeps its class; concatenation and up-sampling are carried out on terms."""
        plain = all(value.wholes() for value in values)
        if type(layer) is Concat and layer.d == 1 and not plain:
            return concatenated(values)
        if type(layer) is nn.Upsample and layer.mode == "nearest" and not plain:
            return self._upsampled(layer, values[0])
        return self.row(layer, values, width, several=not isinstance(layer.f, int))

    def _upsampled(self, layer: Any, value: Value) -> Value:
        """Enlarge each source by itself."""
        larger = {
            source: self.table.add(lambda: copy.deepcopy(layer), [source], source.width).sources()[0]
            for source in value.sources()
        }
        return Value(value.width, tuple((larger[source], at) for source, at in value.terms))

    def row(
        self,
        module: Any,
        values: Sequence[Value],
        width: int,
        *,
        make: Callable[[], nn.Module] | None = None,
        paths: Sequence[str] | None = None,
        several: bool = False,
    ) -> Value:
        """Write a row for a block and return what it puts out.

        Args:
            module: The block.
            values: What it reads.
            width: Channels of its output.
            make: Returns the layer, if it is another than the block.
            paths: The convolutions of the layer that alone read its input, where the block's own row is not meant.
            several: It takes a list.

        Raises:
            ObstacleError: It cannot read a sum, or it is not the first layer and reads the image.
        """
        sources, widening = [], list[tuple[str, Value]]()
        for level, value in enumerate(values):
            wholes, found = value.wholes(), paths
            if wholes is None:
                found = readers(module, level) if paths is None else paths
                if found is None:
                    raise self._obstacle(f"its sum reaches {self._layer}, and not through dense convolutions alone")
                widening += [(path, value) for path in found]
            sources.append(self.table.gathered(wholes or value.sources()))
        if self.table.rows and any(source.number == IMAGE for source in sources):
            raise self._obstacle("it reads the image, which only one layer can")

        def made() -> nn.Module:
            layer: nn.Module = make() if make else module
            for path, value in widening:
                _widen(layer.get_submodule(path), value)
            for inner in layer.modules():
                if isinstance(inner, RepConv):
                    inner.c1 = inner.conv1.conv.in_channels
            return layer

        return self.table.add(made, sources, width, several=several)

    def convolved(self, module: Any, value: Value) -> Value:
        """Write a row for one of the host's convolutions."""
        return self.row(module, [value], module.conv.out_channels)

    def expand(self, module: Any, value: Value) -> Value:
        """Write the rows of a block that is taken apart."""
        return self._expansions[type(module)](self, module, value)

    def _obstacle(self, reason: str) -> ObstacleError:
        return ObstacleError(self._carried or frozenset({self._number}), reason)


def _widen(module: Any, value: Value) -> None:
    """Make one of the host's convolutions read the sources of a value side by side, in place; its norm stays."""
    weight = module.conv.weight
    module.conv.weight = nn.Parameter(widened(weight.detach(), value), requires_grad=weight.requires_grad)
    module.conv.in_channels = module.conv.weight.shape[1]
