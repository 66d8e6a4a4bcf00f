"""What Ultralytics' blocks hide in Python: sizes to re-read after surgery, axes to lock, branches dropped at the end.

One row per block; a new block is a new row. Subclasses follow their parents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from ultralytics.nn.modules.block import (
    C2PSA,
    DFL,
    PSA,
    AAttn,
    ADown,
    Attention,
    C2f,
    C2fAttn,
    CBLinear,
    MaxSigmoidAttnBlock,
    RealNVP,
    RepNCSPELAN4,
    RepVGGDW,
)
from ultralytics.nn.modules.conv import RepConv
from ultralytics.nn.modules.head import Detect

from yolo_prune.channels import Host
from yolo_prune.surgery import KeptEntries


def _half_of_cv1(module: Any, kept: KeptEntries) -> None:  # noqa: ARG001
    """C2f, ELAN and PSA cut the output of cv1 into two halves of `c` channels."""
    module.c = module.cv1.conv.out_channels // 2


def _adown(module: Any, kept: KeptEntries) -> None:  # noqa: ARG001
    module.c = module.cv1.conv.out_channels


def _cb_linear(module: Any, kept: KeptEntries) -> None:
    """CBLinear cuts its output into slices of `c2s` channels, each of which may have lost another number."""
    mask, start, sizes = kept("conv.weight", 0), 0, []
    for size in module.c2s:
        sizes.append(int(mask[start : start + size].sum()))
        start += size
    module.c2s = sizes


def _rep_conv(module: Any, kept: KeptEntries) -> None:  # noqa: ARG001
    convolution = module.conv1.conv
    module.c1, module.c2, module.g = convolution.in_channels, convolution.out_channels, convolution.groups


def _rep_vgg_dw(module: Any, kept: KeptEntries) -> None:  # noqa: ARG001
    module.dim = module.conv.conv.out_channels


def _attention(module: Any, kept: KeptEntries) -> None:
    """Heads and their widths, from the first of the heads that are left; the scale follows the key width."""
    rows = kept("qkv.conv.weight", 0).reshape(module.num_heads, -1)
    left = rows[rows.any(axis=1)]
    module.num_heads, module.key_dim = len(left), int(left[0, : module.key_dim].sum())
    module.head_dim = int(left[0].sum()) - 2 * module.key_dim
    module.scale = module.key_dim**-0.5


def _area_attention(module: Any, kept: KeptEntries) -> None:
    rows = kept("qkv.conv.weight", 0).reshape(module.num_heads, -1)
    module.num_heads = int(rows.any(axis=1).sum())
    module.all_head_dim = module.proj.conv.in_channels
    module.head_dim = module.all_head_dim // module.num_heads


def _max_sigmoid_attention(module: Any, kept: KeptEntries) -> None:  # noqa: ARG001
    module.hc = module.gl.out_features // module.nh


REREAD: dict[type[nn.Module], Callable[[Any, KeptEntries], None]] = {
    C2f: _half_of_cv1,
    RepNCSPELAN4: _half_of_cv1,
    PSA: _half_of_cv1,
    C2PSA: _half_of_cv1,
    C2fAttn: _half_of_cv1,
    MaxSigmoidAttnBlock: _max_sigmoid_attention,
    Attention: _attention,
    AAttn: _area_attention,
    ADown: _adown,
    CBLinear: _cb_linear,
    RepConv: _rep_conv,
    RepVGGDW: _rep_vgg_dw,
}
"""How a block re-reads the sizes that it remembers. Blocks named here may also split channels by those sizes."""

TIED: dict[type[nn.Module], Sequence[Sequence[tuple[str, int]]]] = {
    # Its forward views the values, heads * head_dim channels, as its input's width.
    Attention: [[("qkv.conv.weight", 1), ("proj.conv.weight", 1)]],
}
"""Axes that must lose equally many entries because the forward ties them in a way that labels cannot see."""


def _queries_of_attention(module: Any) -> Iterator[range]:
    """Yield, for each head, the outputs of `qkv` that are queries."""
    row = 2 * module.key_dim + module.head_dim
    yield from (range(head * row, head * row + module.key_dim) for head in range(module.num_heads))


def _queries_of_area_attention(module: Any) -> Iterator[range]:
    row = 3 * module.head_dim
    yield from (range(head * row, head * row + module.head_dim) for head in range(module.num_heads))


def _guides(module: Any) -> Iterator[range]:
    yield from (range(head * module.hc, (head + 1) * module.hc) for head in range(module.nh))


QUERIES: dict[type[nn.Module], tuple[str, Callable[[Any], Iterator[range]]]] = {
    Attention: ("qkv", _queries_of_attention),
    AAttn: ("qkv", _queries_of_area_attention),
    MaxSigmoidAttnBlock: ("gl", _guides),
}
"""A layer and, head by head, its outputs whose products the forward divides by the root of their number."""

HEADS: tuple[type[nn.Module], ...] = (Attention, AAttn)
"""Blocks that re-read their number of heads, so that whole heads may go."""

APART: tuple[type[nn.Module], ...] = (RealNVP,)
"""Modules that only the loss runs and that read none of the network's channels."""

AREAL: tuple[type[nn.Module], ...] = (DFL,)
"""Modules that work on the boxes of all cells of all maps, in one row."""

MERGED: dict[type[nn.Module], Sequence[str]] = {
    RepConv: ["conv2"],  # the 1x1 branch becomes part of the 3x3 kernel
    RepVGGDW: ["conv1"],  # the 3x3 branch becomes part of the 7x7 kernel
}
"""Submodules that deployment merges into a sibling."""


def reread(module: nn.Module, kept: KeptEntries) -> None:
    """Make a sliced block's attributes agree with its weights."""
    for block, function in REREAD.items():
        if isinstance(module, block):
            function(module, kept)


def raw_outputs(result: Any) -> Any:
    """Return the predictions that the loss and the decoder read, from what a model returns in training or inference.

    Feature maps that travel along in the result serve for their shapes only; decoded boxes follow from raw ones.
    """
    if isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[1], dict):
        return raw_outputs(result[1])  # inference: (decoded, raw)
    if isinstance(result, dict):
        return {name: raw_outputs(value) for name, value in result.items() if name != "feats"}
    return result


def host_for(model: nn.Module) -> Host:
    """Describe a model of this host to the tracer."""
    modules = list(model.named_modules())
    dropped = tuple(f"{path}." for path in _training_only(modules))
    apart, areal = (
        tuple(f"{path}." for path, module in modules if isinstance(module, kinds)) for kinds in (APART, AREAL)
    )
    return Host(
        outputs=raw_outputs,
        resizes=lambda module: isinstance(module, tuple(REREAD)),
        loses_rows=lambda module: isinstance(module, HEADS),
        ties=lambda module: [tie for block, ties in TIED.items() if isinstance(module, block) for tie in ties],
        rescaled=lambda module: [
            (_scaling(module, layer), entries)
            for block, (layer, heads) in QUERIES.items()
            if isinstance(module, block)
            for entries in heads(module)
        ],
        apart=lambda path: f"{path}.".startswith(apart),
        areal=lambda path: f"{path}.".startswith(areal),
        training_only=lambda path: f"{path}.".startswith(dropped),
    )


def _scaling(module: nn.Module, layer: str) -> tuple[str, ...]:
    """Return what scales a layer's outputs: its norm, or its own weight and bias."""
    norm = ("bn",) if hasattr(getattr(module, layer), "bn") else ("conv",)
    path = (layer,) if isinstance(getattr(module, layer), nn.Linear) else (layer, *norm)
    return tuple(".".join((*path, name)) for name in ("weight", "bias"))


def _training_only(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[str]:
    """Yield the paths of submodules that deployment merges or drops."""
    for path, module in modules:
        for block, names in MERGED.items():
            if isinstance(module, block):
                yield from (f"{path}.{name}" for name in names)
        if isinstance(module, Detect) and getattr(module, "one2one_cv2", None) is not None:
            twins = [name for name in module._modules if name.startswith("one2one_")]
            yield from (f"{path}.{name[8:] if module.end2end else name}" for name in twins)
