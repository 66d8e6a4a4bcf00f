"""Shortcut removal for models of this host: blocks with sums become rows of stock layers that read the sums' terms.

A block whose sums are read by dense convolutions alone is taken apart into `Conv`, `Concat` and `Bottleneck` without
its addition; see `surgery.sums` for what a reader of a sum becomes. Sums that leave a layer (SPPF and Bottleneck as
layers) are carried on, through `Concat` and nearest `Upsample`, to whoever reads them. Where a reader is anything else,
such as a max-pool, the layer that adds stays as it is, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.block import (
    C2,
    C3,
    SPPF,
    A2C2f,
    Bottleneck,
    C2f,
    C3k,
    C3k2,
    C3x,
    RepBottleneck,
    RepCSP,
    RepNCSPELAN4,
)
from ultralytics.nn.modules.conv import Concat, Conv, RepConv
from ultralytics.nn.tasks import BaseModel

from yolo_prune.channels.forward import forward_unchanged
from yolo_prune.errors import CheckpointError
from yolo_prune.hosts.ultralytics.layer_table import IMAGE, LayerTable
from yolo_prune.hosts.ultralytics.shortcut_blocks import READERS, adds, obstacle_inside, readers
from yolo_prune.hosts.ultralytics.surgery import trace_side
from yolo_prune.surgery.copying import copied
from yolo_prune.surgery.sums import Source, Value, added, concatenated, whole, widened


@dataclass(frozen=True, kw_only=True)
class LayerNote:
    """An old layer that adds.

    Attributes:
        number: Its number in the old table.
        block: Its class.
        reason: Why it still adds; empty if it does not.
    """

    number: int
    block: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A model without the shortcuts that could be removed.

    Attributes:
        model: The model: stock classes, a new layer table.
        expanded: The old layers whose sums are gone.
        left: The old layers that still add.
    """

    model: nn.Module
    expanded: tuple[LayerNote, ...]
    left: tuple[LayerNote, ...]


def remove_shortcuts(model: nn.Module) -> Rewritten:
    """Return a copy of a model whose shortcuts are concatenations; the model itself is untouched.

    Args:
        model: A model of the host, not fused. Weights are added up in fp64 and rounded once to their type.

    Raises:
        CheckpointError: Shared weights, a forward that is no walk through the layer table, or no shortcut to remove.
    """
    _require_layer_table(model)
    _require_own_weights(model)
    rewritten: Any = copied(model)
    widths = _output_widths(model)
    left = {
        number: reason
        for number, layer in enumerate(rewritten.model)
        if adds(layer) and (reason := obstacle_inside(layer)) is not None
    }
    walk = _walk(rewritten.model, widths, left)
    blocks = [type(layer[0] if type(layer) is nn.Sequential else layer).__name__ for layer in rewritten.model]
    expanded = tuple(LayerNote(number=number, block=blocks[number]) for number in walk.expanded)
    remaining = tuple(LayerNote(number=number, block=blocks[number], reason=left[number]) for number in sorted(left))
    if not expanded:
        raise _nothing_to_remove(remaining)
    walk.table.install(rewritten)
    return Rewritten(model=rewritten, expanded=expanded, left=remaining)


def _require_layer_table(model: Any) -> None:
    kind = type(model)
    if kind.predict is not BaseModel.predict or kind._predict_once is not BaseModel._predict_once:
        raise CheckpointError(
            f"a {kind.__name__} runs its layers in a way of its own",
            expected="a model whose forward is the host's walk through its layer table",
            remedy="prune it without removing its shortcuts",
        )


def _require_own_weights(model: nn.Module) -> None:
    """Refuse weights that two layers share: a layer that reads a sum gets new ones."""
    own = {name for name, _ in model.named_parameters()}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in own:
            raise CheckpointError(
                f"'{name}' is shared by two layers",
                expected="weights of its own for every layer",
                remedy="give each of the layers a copy of the weights",
            )


def _nothing_to_remove(left: Sequence[LayerNote]) -> CheckpointError:
    kept = "; ".join(f"layer {note.number} ({note.block}): {note.reason}" for note in left)
    return CheckpointError(
        "nothing to remove: " + (f"no shortcut can be removed. {kept}" if kept else "no layer adds its input"),
        expected="a block that adds its input to its output and whose sums are read by dense convolutions",
        remedy="prune the model as it is",
    )


def _output_widths(model: Any) -> list[int]:
    """Return the channels of the image, then of what each layer puts out; 1 for what is not one feature map."""
    channels = int(model.yaml.get("channels", 3))
    widths: dict[int, int] = {}

    def note(layer: Any, _inputs: Any, output: Any) -> None:
        widths[layer.i] = output.shape[1] if isinstance(output, Tensor) and output.dim() == 4 else 1

    handles = [layer.register_forward_hook(note) for layer in model.model]
    side = trace_side(model)
    try:
        forward_unchanged(model, torch.zeros(1, channels, side, side).to(next(model.parameters())), training=False)
    finally:
        for handle in handles:
            handle.remove()
    return [channels, *(widths[number] for number in range(len(model.model)))]


class _ObstacleError(Exception):
    """A sum that cannot be read.

    Args:
        layers: Numbers of the old layers that have to keep their sums for it.
        reason: Why.
    """

    def __init__(self, layers: frozenset[int], reason: str) -> None:
        super().__init__(reason)
        self.layers, self.reason = layers, reason


def _walk(layers: Sequence[Any], widths: Sequence[int], left: dict[int, str]) -> _Walk:
    """Walk until no sum meets an obstacle; those that do are added to `left`, and one more layer each time."""
    while True:
        walk = _Walk(widths, left)
        try:
            for number, layer in enumerate(layers):
                walk.step(number, layer)
        except _ObstacleError as obstacle:
            left.update(dict.fromkeys(obstacle.layers, obstacle.reason))
        else:
            return walk


class _Walk:
    """One walk through the old layers: it writes the rows of the new ones and changes none of them.

    Args:
        widths: Channels of the image and of what each old layer puts out.
        left: Numbers of the old layers that keep their sums.

    Attributes:
        table: The new rows.
        expanded: Numbers of the old layers whose sums are gone.
    """

    def __init__(self, widths: Sequence[int], left: dict[int, str]) -> None:
        self.table = LayerTable()
        self.expanded: list[int] = []
        self._widths, self._left = widths, left
        self._values = {IMAGE: whole(Source(IMAGE, widths[0]))}
        self._origins = {IMAGE: frozenset[int]()}  # old layers whose sums an output carries
        self._carried = frozenset[int]()
        self._number, self._layer = 0, ""

    def step(self, number: int, layer: Any) -> None:
        """Write the rows of an old layer.

        Raises:
            _ObstacleError: It cannot read a sum.
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
            paths: The convolutions of the layer that alone read its input, where the table does not say it of the block.
            several: It takes a list.

        Raises:
            _ObstacleError: It cannot read a sum, or it is not the first layer and reads the image.
        """
        sources, widening = [], list[tuple[str, Value]]()
        for level, value in enumerate(values):
            wholes, found = value.wholes(), paths
            if wholes is None:
                found = readers(module, level) if paths is None else paths
                if found is None:
                    raise self._obstacle(f"its sum reaches {self._layer}, which is no dense convolution")
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
        return EXPANSIONS[type(module)](self, module, value)

    def _obstacle(self, reason: str) -> _ObstacleError:
        return _ObstacleError(self._carried or frozenset({self._number}), reason)


Expansion: TypeAlias = Callable[[_Walk, Any, Value], Value]
"""Writes the rows of a block that reads a value; returns what the block puts out."""


def _with_its_input(walk: _Walk, module: Any, value: Value) -> Value:
    """Bottleneck and SPPF: the block without its addition, and its input, side by side."""
    width = module.cv2.conv.out_channels
    make = (lambda: _without_addition(module)) if module.add else None
    result = walk.row(module, [value], width, make=make, paths=READERS[type(module)])
    return added([value, result]) if module.add else result


def _one_after_another(walk: _Walk, module: Any, value: Value) -> Value:
    for inner in module:
        value = walk.expand(inner, value)
    return value


def _three(walk: _Walk, module: Any, value: Value) -> Value:
    """C3: cv3(cat(m(cv1(x)), cv2(x)))."""
    deep = _one_after_another(walk, module.m, walk.convolved(module.cv1, value))
    return walk.convolved(module.cv3, concatenated([deep, walk.convolved(module.cv2, value)]))


def _two(walk: _Walk, module: Any, value: Value) -> Value:
    """C2: cv2(cat(m(a), b)) with the halves a and b of cv1(x)."""
    first, second = _halves(walk, module.cv1, value)
    return walk.convolved(module.cv2, concatenated([_one_after_another(walk, module.m, first), second]))


def _two_faster(walk: _Walk, module: Any, value: Value) -> Value:
    """C2f: cv2 reads the halves of cv1(x) and what each inner block makes of the one before."""
    return walk.convolved(module.cv2, _chain(walk, module.m, [*_halves(walk, module.cv1, value)]))


def _elan(walk: _Walk, module: Any, value: Value) -> Value:
    """RepNCSPELAN4: the same with two inner sequences."""
    return walk.convolved(module.cv4, _chain(walk, [module.cv2, module.cv3], [*_halves(walk, module.cv1, value)]))


def _area(walk: _Walk, module: Any, value: Value) -> Value:
    """A2C2f without attention: the same with the whole of cv1(x)."""
    return walk.convolved(module.cv2, _chain(walk, module.m, [walk.convolved(module.cv1, value)]))


def _chain(walk: _Walk, blocks: Any, values: list[Value]) -> Value:
    for inner in blocks:
        values.append(walk.expand(inner, values[-1]))
    return concatenated(values)


def _halves(walk: _Walk, module: Any, value: Value) -> tuple[Value, Value]:
    """Write a row for each half of a convolution's outputs."""
    half = module.conv.out_channels // 2
    first = walk.row(module, [value], half, make=lambda: _outputs(module, slice(None, half)))
    return first, walk.row(module, [value], half, make=lambda: _outputs(module, slice(half, None)))


EXPANSIONS: dict[type[nn.Module], Expansion] = {
    **dict.fromkeys((Bottleneck, RepBottleneck, SPPF), _with_its_input),
    **dict.fromkeys((C3, C3k, C3x, RepCSP), _three),
    **dict.fromkeys((C2f, C3k2), _two_faster),
    C2: _two,
    RepNCSPELAN4: _elan,
    A2C2f: _area,
    nn.Sequential: _one_after_another,
    Conv: _Walk.convolved,
}


def _without_addition(module: Any) -> nn.Module:
    module.add = False
    return module  # type: ignore[no-any-return]


def _outputs(module: Any, rows: slice) -> nn.Module:
    """Return some outputs of one of the host's convolutions with a batch norm, as another one."""
    part: Any = copy.deepcopy(module, {id(module.act): module.act})
    for owner, names in ((part.conv, ("weight", "bias")), (part.bn, ("weight", "bias"))):
        for name in names:
            if (parameter := getattr(owner, name)) is not None:
                cut = parameter.detach()[rows].clone()
                setattr(owner, name, nn.Parameter(cut, requires_grad=parameter.requires_grad))
    for name in ("running_mean", "running_var"):
        setattr(part.bn, name, getattr(part.bn, name)[rows].clone())
    part.conv.out_channels = part.bn.num_features = len(part.conv.weight)
    return part


def _widen(module: Any, value: Value) -> None:
    """Make one of the host's convolutions read the sources of a value side by side, in place; its norm stays."""
    weight = module.conv.weight
    module.conv.weight = nn.Parameter(widened(weight.detach(), value), requires_grad=weight.requires_grad)
    module.conv.in_channels = module.conv.weight.shape[1]
