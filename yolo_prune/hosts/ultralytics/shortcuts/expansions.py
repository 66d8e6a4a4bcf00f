"""How this host's blocks are taken apart into rows of stock layers: one short function a forward."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
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
from ultralytics.nn.modules.conv import Conv

from yolo_prune.hosts.ultralytics.shortcuts.blocks import READERS, adds
from yolo_prune.hosts.ultralytics.shortcuts.walk import Expansion, Walk
from yolo_prune.surgery.sums import Value, added, concatenated


def _with_its_input(walk: Walk, module: Any, value: Value) -> Value:
    """Bottleneck and SPPF: the block without its addition, and its input, side by side."""
    width = module.cv2.conv.out_channels
    make = (lambda: _without_addition(module)) if adds(module) else None
    result = walk.row(module, [value], width, make=make, paths=READERS[type(module)])
    return added([value, result]) if adds(module) else result


def _one_after_another(walk: Walk, module: Any, value: Value) -> Value:
    for inner in module:
        value = walk.expand(inner, value)
    return value


def _three(walk: Walk, module: Any, value: Value) -> Value:
    """C3: cv3(cat(m(cv1(x)), cv2(x)))."""
    deep = _one_after_another(walk, module.m, walk.convolved(module.cv1, value))
    return walk.convolved(module.cv3, concatenated([deep, walk.convolved(module.cv2, value)]))


def _two(walk: Walk, module: Any, value: Value) -> Value:
    """C2: cv2(cat(m(a), b)) with the halves a and b of cv1(x)."""
    first, second = _halves(walk, module.cv1, value)
    return walk.convolved(module.cv2, concatenated([_one_after_another(walk, module.m, first), second]))


def _two_faster(walk: Walk, module: Any, value: Value) -> Value:
    """C2f: cv2 reads the halves of cv1(x) and what each inner block makes of the one before."""
    return walk.convolved(module.cv2, _chain(walk, module.m, [*_halves(walk, module.cv1, value)]))


def _elan(walk: Walk, module: Any, value: Value) -> Value:
    """RepNCSPELAN4: the same with two inner sequences."""
    return walk.convolved(module.cv4, _chain(walk, [module.cv2, module.cv3], [*_halves(walk, module.cv1, value)]))


def _area(walk: Walk, module: Any, value: Value) -> Value:
    """A2C2f without attention: the same with the whole of cv1(x)."""
    return walk.convolved(module.cv2, _chain(walk, module.m, [walk.convolved(module.cv1, value)]))


def _chain(walk: Walk, blocks: Any, values: list[Value]) -> Value:
    for inner in blocks:
        values.append(walk.expand(inner, values[-1]))
    return concatenated(values)


def _halves(walk: Walk, module: Any, value: Value) -> tuple[Value, Value]:
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
    Conv: Walk.convolved,
}


def _without_addition(module: Any) -> Any:
    module.add = False
    return module


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
