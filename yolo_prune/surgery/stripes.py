"""Convolutions with dead stripes: an exact forward that skips them, and the MACs of what is left.

A stripe is `weight[n, :, i, j]`: what filter n reads at position (i, j) of its kernel. Source: Meng et al., Pruning
Filter in Filter, NeurIPS 2020, section 3.3. `StripeConv` shows that dead stripes may be skipped; it is no faster than
the dense convolution, which is what gets exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.channels.forward import forward_unchanged
from yolo_prune.errors import ConfigError
from yolo_prune.surgery.copying import copied


class StripeConv(nn.Module):
    """A convolution that computes its living stripes only: a 1x1 convolution for each position of the kernel.

    The image is padded; position (i, j) of the kernel reads it at `[i::stride, j::stride]` with the filters that have a
    living stripe there, and their answers are added up.

    Args:
        conv: A convolution of one group that pads with zeros; it is left as it is.

    Raises:
        ConfigError: Another kind of convolution.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise ConfigError(
                f"a convolution of {conv.groups} groups that pads with {conv.padding_mode}",
                expected="one group, padded with zeros",
            )
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.margins = list(conv._reversed_padding_repeated_twice)
        self.out_channels = conv.out_channels
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        self.stripes = nn.ParameterList()
        self.positions: list[tuple[int, int]] = []
        for i, j in _positions(conv):
            stripes = conv.weight.detach()[:, :, i, j]
            kept = (stripes != 0).any(dim=1).nonzero()[:, 0]
            if len(kept):
                self.positions.append((i, j))
                self.stripes.append(nn.Parameter(stripes[kept][:, :, None, None].clone()))
                self.register_buffer(f"filters{len(self.positions) - 1}", kept)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, shape (batch, inputs, height, width) to (batch, outputs, height', width')."""
        x = functional.pad(x, self.margins)
        sides = [
            (side - spacing * (size - 1) - 1) // step + 1
            for side, size, step, spacing in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        out = x.new_zeros(x.shape[0], self.out_channels, *sides)
        for number, ((i, j), weight) in enumerate(zip(self.positions, self.stripes, strict=True)):
            rows, columns = (
                slice(position * spacing, position * spacing + step * (side - 1) + 1, step)
                for position, spacing, step, side in zip((i, j), self.dilation, self.stride, sides, strict=True)
            )
            answer = functional.conv2d(x[:, :, rows, columns], weight)
            out.index_add_(1, self.get_buffer(f"filters{number}"), answer)
        return out if self.bias is None else out + self.bias[:, None, None]


def _positions(conv: nn.Conv2d) -> Iterator[tuple[int, int]]:
    """Yield the positions of a kernel, row by row."""
    height, width = conv.weight.shape[2:]
    yield from ((i, j) for i in range(height) for j in range(width))


def living_stripes(conv: nn.Conv2d) -> Tensor:
    """Return which stripes are not all zero, bool, shape (filters, kernel height, kernel width)."""
    return (conv.weight.detach() != 0).any(dim=1)


def is_striped(module: nn.Module) -> bool:
    """Return whether a module is a convolution that has stripes: one group, and a kernel larger than 1x1."""
    return isinstance(module, nn.Conv2d) and module.groups == 1 and max(module.kernel_size) > 1


def with_stripe_convs(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which every convolution with a dead stripe skips it."""
    result = copied(model)
    for path, module in list(result.named_modules()):
        if isinstance(module, nn.Conv2d) and is_striped(module) and not living_stripes(module).all():
            parent, _, name = path.rpartition(".")
            setattr(result.get_submodule(parent), name, StripeConv(module))
    return result


def macs_per_stripe(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Return the MACs of one stripe of every convolution that has stripes: inputs * output height * output width.

    Args:
        model: The model; it is left as it is.
        example: An image batch; MACs are those of one image.

    Returns:
        By the convolution's path; those that inference does not run are absent.
    """
    found: dict[str, int] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and is_striped(module):

            def note(conv: nn.Conv2d, _inputs: tuple[Tensor, ...], out: Tensor, path: str = path) -> None:
                found[path] = found.get(path, 0) + conv.in_channels * out.shape[2] * out.shape[3]

            handles.append(module.register_forward_hook(note))
    try:
        forward_unchanged(model, example, training=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def macs_in_stripes(
    graph: ChannelGraph, keep: BoolArray, alive: Mapping[str, BoolArray], costs: Mapping[str, float], *, imgsz_px: int
) -> float:
    """Return the MACs of a network without some channels that skips its dead stripes.

    The network without the channels, less `kept inputs * height * width` for every dead stripe of a kept filter.

    Args:
        graph: The channel graph.
        keep: Keep mask of shape (channels,).
        alive: Which stripes live, by path of the convolution, shape (filters, kernel height, kernel width).
        costs: MACs of one stripe with all inputs, at `imgsz_px`, by path.
        imgsz_px: Side of the image at which MACs are counted.
    """
    macs = float(graph.cost.macs(graph.kept_widths(keep), imgsz_px=imgsz_px))
    for path, stripes in alive.items():
        filters, inputs = (keep[graph.axes[f"{path}.weight", dim].channels] for dim in (0, 1))
        macs -= float((~stripes[filters]).sum()) * costs[path] * float(inputs.mean())
    return macs


@dataclass(frozen=True, kw_only=True)
class StripeCost:
    """What the living stripes of a network cost: a count, not a latency.

    Attributes:
        kept: Living stripes.
        total: Stripes of the network as it is.
        macs: Multiply-adds of one forward that skips dead stripes: of a living one `inputs * height * width` each.
        dense_macs: Multiply-adds of the forward that does not skip them, which is what runs after an export.
        imgsz_px: Side of the image at which they are counted.
    """

    kept: int
    total: int
    macs: int
    dense_macs: int
    imgsz_px: int


def stripe_cost(model: nn.Module, costs: Mapping[str, float], *, dense_macs: float, imgsz_px: int) -> StripeCost:
    """Count the living stripes of a model.

    Args:
        model: The model.
        costs: MACs of one stripe by path, at `imgsz_px`; see `macs_per_stripe`.
        dense_macs: MACs of the model with all stripes, at `imgsz_px`.
        imgsz_px: Side of the image.
    """
    layers = {path: module for path, module in model.named_modules() if path in costs}
    alive = {path: living_stripes(conv) for path, conv in layers.items() if isinstance(conv, nn.Conv2d)}
    dead = sum(float((~stripes).sum()) * costs[path] for path, stripes in alive.items())
    return StripeCost(
        kept=sum(int(stripes.sum()) for stripes in alive.values()),
        total=sum(stripes.numel() for stripes in alive.values()),
        macs=round(dense_macs - dead),
        dense_macs=round(dense_macs),
        imgsz_px=imgsz_px,
    )
