"""What shortcut removal has to know of this host's blocks: which add, and which convolutions read a block's input.

One row per block; subclasses are blocks of their own. What has no row keeps its sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from ultralytics.nn.modules.block import (
    C1,
    C2,
    C2PSA,
    C3,
    CIB,
    ELAN1,
    PSA,
    SPP,
    SPPELAN,
    SPPF,
    A2C2f,
    AAttn,
    ABlock,
    Attention,
    Bottleneck,
    C2f,
    C2fCIB,
    C2fPSA,
    C3k,
    C3k2,
    C3x,
    GhostBottleneck,
    RepBottleneck,
    RepC3,
    RepCSP,
    RepNCSPELAN4,
    ResNetBlock,
    SCDown,
)
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.modules.head import OBB, Detect, Pose, Segment

ALWAYS_ADD: tuple[type[nn.Module], ...] = (PSA, ABlock, C1, GhostBottleneck, RepC3, ResNetBlock)
"""Blocks that add without an attribute that says so."""

READERS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((C1, C2, C2f, C3k2, C2fCIB, C2fPSA, C2PSA, PSA, A2C2f), ("cv1",)),
    **dict.fromkeys((SPP, SPPF, SPPELAN, ELAN1, RepNCSPELAN4, SCDown, Bottleneck), ("cv1",)),
    **dict.fromkeys((C3, C3k, C3x, RepCSP, RepC3), ("cv1", "cv2")),
    RepBottleneck: ("cv1.conv1", "cv1.conv2"),
    Conv: ("",),
}
"""The convolutions that read a block's input, by their paths. Nothing else of the block does, but its own shortcut."""

INNER: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((C2, C2f, C3k2, A2C2f, C3, C3k, C3x, RepCSP), ("m",)),
    **dict.fromkeys((Bottleneck, RepBottleneck, SPPF), ()),
    RepNCSPELAN4: ("cv2", "cv3"),
    nn.Sequential: (),
}
"""Blocks that can be taken apart, and where their inner blocks stand (in those of torch: themselves)."""

HEADS: tuple[type[nn.Module], ...] = (Detect, OBB, Pose, Segment)
"""Heads whose towers read the feature maps, one each a level, and, of the first level, the prototypes of masks."""


def adds(layer: nn.Module) -> bool:
    """Return whether a block adds something somewhere, as far as attributes and the table tell."""
    return any(isinstance(module, ALWAYS_ADD) or adds_its_input(module) for module in layer.modules())


def adds_its_input(module: nn.Module) -> bool:
    """Return whether a block adds its own input to what it makes of it."""
    return bool(getattr(module, "add", False)) or getattr(module, "gamma", None) is not None


def readers(module: Any, level: int = 0) -> tuple[str, ...] | None:
    """Return the paths of the `Conv` that alone read a block's input; None if there are other readers.

    Args:
        module: The block.
        level: Which of its inputs, for a head.
    """
    kind = type(module)
    if kind is nn.Sequential:
        first = readers(module[0])
        return None if first is None else tuple(f"0.{path}".rstrip(".") for path in first)
    if kind in HEADS:
        towers = [name for name, child in module.named_children() if name.rpartition("_")[2] in ("cv2", "cv3", "cv4")]
        found = tuple(f"{name}.{level}.0" for name in towers)
        found += ("proto.cv1",) if kind is Segment and level == 0 else ()
    elif kind not in READERS or adds_its_input(module):
        return None
    else:
        found = READERS[kind]
    return found if all(is_dense(module.get_submodule(path)) for path in found) else None


def is_dense(module: Any) -> bool:
    """Return whether a module is the host's convolution with a batch norm, every output of which reads every input."""
    return type(module) is Conv and type(module.conv) is nn.Conv2d and module.conv.groups == 1


def obstacle_inside(module: Any) -> str | None:
    """Return why a block cannot be taken apart so that all its sums are gone; None if it can."""
    kind = type(module)
    if kind is Conv:
        return None
    if kind not in INNER or getattr(module, "gamma", None) is not None:
        return _why(module)
    if not all(is_dense(module.get_submodule(path)) for path in READERS.get(kind, ())):
        return f"its first convolution is grouped, or none of the host's ({kind.__name__})"
    if kind is RepBottleneck and module.cv1.bn is not None:
        return "its first convolution has a branch that is none"
    return next((reason for inner in inner_blocks(module) if (reason := obstacle_inside(inner))), None)


def inner_blocks(module: Any) -> Iterator[Any]:
    """Yield the blocks inside a block that can be taken apart."""
    for name in INNER[type(module)]:
        yield from getattr(module, name)
    if type(module) is nn.Sequential:
        yield from module


def _why(module: nn.Module) -> str:
    if any(isinstance(inner, (Attention, AAttn)) for inner in module.modules()):
        return "its sums are read by attention, which has to be as wide as what it reads"
    if any(isinstance(inner, (CIB, GhostBottleneck)) for inner in module.modules()):
        return "its sums are read by depthwise convolutions"
    return f"{type(module).__name__} is no block that can be taken apart"
