"""Random networks: directed graphs of the operators that detectors are made of, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

SIDE = 16
"""Side of the image; planes stay between 4 and 32."""


@dataclass
class Program:
    """A network as data, so that hypothesis can shrink it.

    Attributes:
        steps: (function of the layers and of the values so far, what it is) of each value; the image is value 0.
        layers: The layers by name.
        shapes: (channels, side) of each value.
        readers: How many steps read each value.
    """

    steps: list[tuple[Callable[[nn.ModuleDict, list[Tensor]], Tensor], str]] = field(default_factory=list)
    layers: dict[str, nn.Module] = field(default_factory=dict)
    shapes: list[tuple[int, int]] = field(default_factory=lambda: [(3, SIDE)])
    readers: list[int] = field(default_factory=lambda: [0])

    def add(self, what: str, sources: Sequence[int], shape: tuple[int, int], run) -> int:
        self.steps.append((run, what))
        self.shapes.append(shape)
        self.readers.append(0)
        for source in sources:
            self.readers[source] += 1
        return len(self.shapes) - 1

    def layer(self, source: int, shape: tuple[int, int], module: nn.Module) -> int:
        name = f"layer{len(self.layers)}"
        self.layers[name] = module
        return self.add(f"{name}({source})", [source], shape, lambda layers, values: layers[name](values[source]))


class Generated(nn.Module):
    """Runs a program; every value that nothing reads is read by a last convolution and returned."""

    def __init__(self, program: Program, *, reverse: bool = False) -> None:
        super().__init__()
        names = sorted(program.layers, reverse=reverse)
        self.layers = nn.ModuleDict({name: program.layers[name] for name in names})
        self.steps = program.steps

    def forward(self, x: Tensor) -> list[Tensor]:
        values, outputs = [x], []
        for run, what in self.steps:
            values.append(run(self.layers, values))
            if what.startswith("out"):
                outputs.append(values[-1])
        return outputs


class Shuffle(nn.Module):
    """Views channels as two rows, swaps, views back; a host may know that its sizes follow the weights."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Parted(nn.Module):
    """Splits channels by what its two layers read; a host may know that."""

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(size, width, 1) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split([layer.weight.shape[1] for layer in (self.first, self.second)], 1)
        return torch.cat([self.first(first), self.second(second)], 1)


class Stacked(nn.Module):
    """Two values one after the other, or interleaved, by way of a new dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], self.dim).flatten(1, 2)


class Gated(nn.Module):
    """One channel that all others are multiplied with, or that is added to them."""

    def __init__(self, width: int, operator: Callable[[Tensor, Tensor], Tensor], *, first: bool) -> None:
        super().__init__()
        self.gate, self.operator, self.first = nn.Conv2d(width, 1, 1), operator, first

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        return self.operator(gate, x) if self.first else self.operator(x, gate)


def _conv(draw, program: Program, source: int) -> int:
    channels, side = program.shapes[source]
    size, stride = draw(st.sampled_from([(1, 1), (3, 1), (3, 2)]))
    stride = stride if side > 4 else 1
    width = draw(st.integers(2, 8))
    module = nn.Conv2d(channels, width, size, stride, size // 2, bias=draw(st.booleans()))
    return program.layer(source, (width, side // stride), module)


def _depthwise(draw, program: Program, source: int) -> int:
    channels, side = program.shapes[source]
    width = channels * draw(st.integers(1, 2))
    return program.layer(source, (width, side), nn.Conv2d(channels, width, 3, 1, 1, groups=channels, bias=False))


def _grouped(draw, program: Program, source: int) -> int:
    channels, side = program.shapes[source]
    fitting = [groups for groups in (2, 3) if channels % groups == 0 and channels > groups]
    if not fitting:
        return _conv(draw, program, source)
    groups = draw(st.sampled_from(fitting))
    width = groups * draw(st.integers(1, 3))
    if draw(st.booleans()):
        return program.layer(source, (width, side), nn.ConvTranspose2d(channels, width, 3, 1, 1, groups=groups))
    return program.layer(source, (width, side), nn.Conv2d(channels, width, 3, 1, 1, groups=groups))


def _transposed(draw, program: Program, source: int) -> int:
    channels, side = program.shapes[source]
    if side > SIDE:
        return _conv(draw, program, source)
    width = draw(st.integers(2, 6))
    return program.layer(source, (width, 2 * side), nn.ConvTranspose2d(channels, width, 2, 2))


def _norm(draw, program: Program, source: int) -> int:  # noqa: ARG001
    return program.layer(source, program.shapes[source], nn.BatchNorm2d(program.shapes[source][0]))


def _activation(draw, program: Program, source: int) -> int:
    name, function = draw(
        st.sampled_from(
            [
                ("leaky", lambda x: functional.leaky_relu(x, 0.3)),
                ("silu", functional.silu),
                ("sigmoid", torch.sigmoid),
                ("hardswish", functional.hardswish),
                ("shift", lambda x: x + 0.5),
                ("softplus", functional.softplus),
            ]
        )
    )
    run = lambda _, values: function(values[source])  # noqa: E731
    return program.add(f"{name}({source})", [source], program.shapes[source], run)


def _pair(draw, program: Program, source: int) -> int:
    """Add or multiply with another value of the same shape, or concatenate with one of the same side."""
    operator = draw(st.sampled_from(["add", "mul", "cat"]))
    shape = program.shapes[source]
    fitting = [
        other
        for other, (channels, side) in enumerate(program.shapes)
        if side == shape[1] and other > 0 and (operator == "cat" or channels == shape[0])
    ]
    if not fitting:
        return _conv(draw, program, source)
    other = draw(st.sampled_from(fitting))
    if operator == "cat":
        width = shape[0] + program.shapes[other][0]
        run = lambda _, values: torch.cat([values[source], values[other]], 1)  # noqa: E731
        return program.add(f"cat({source}, {other})", [source, other], (width, shape[1]), run)
    function = torch.add if operator == "add" else torch.mul
    run = lambda _, values: function(values[source], values[other])  # noqa: E731
    return program.add(f"{operator}({source}, {other})", [source, other], shape, run)


def _stacked(draw, program: Program, source: int) -> int:
    shape = program.shapes[source]
    fitting = [other for other, found in enumerate(program.shapes) if found == shape and other > 0]
    if not fitting:
        return _conv(draw, program, source)
    other, name = draw(st.sampled_from(fitting)), f"layer{len(program.layers)}"
    program.layers[name] = Stacked(draw(st.sampled_from([1, 2])))
    run = lambda layers, values: layers[name](values[source], values[other])  # noqa: E731
    return program.add(f"{name}({source}, {other})", [source, other], (2 * shape[0], shape[1]), run)


def _cut(draw, program: Program, source: int) -> int:
    """Chunk in equal parts, or split at a fixed place; each part is a value."""
    channels, side = program.shapes[source]
    if channels == 1:
        return source
    if channels % 2 == 0 and draw(st.booleans()):
        for part in (0, 1):
            run = lambda _, values, part=part: values[source].chunk(2, 1)[part]  # noqa: E731
            last = program.add(f"chunk({source})[{part}]", [source], (channels // 2, side), run)
        return last
    first = draw(st.integers(1, channels - 1))
    sizes = [first, channels - first]
    for part, size in enumerate(sizes):
        run = lambda _, values, part=part: values[source].split(sizes, 1)[part]  # noqa: E731
        last = program.add(f"split({source}, {sizes})[{part}]", [source], (size, side), run)
    return last


def _gated(draw, program: Program, source: int) -> int:
    shape = program.shapes[source]
    operator = draw(st.sampled_from([torch.mul, torch.add, torch.sub]))
    return program.layer(source, shape, Gated(shape[0], operator, first=draw(st.booleans())))


def _shuffle(draw, program: Program, source: int) -> int:  # noqa: ARG001
    """View as two rows of channels, swap, view back; sizes are read from the value."""
    channels = program.shapes[source][0]
    if channels % 2 or channels == 2:  # two rows of one channel look like an added dimension: only the proof can tell
        return source
    return program.layer(source, program.shapes[source], Shuffle())


def _parted(draw, program: Program, source: int) -> int:
    """Split at a place that the layers behind it know."""
    channels, side = program.shapes[source]
    if channels < 3:
        return source
    first, width = draw(st.integers(1, channels - 1)), draw(st.integers(1, 4))
    return program.layer(source, (2 * width, side), Parted([first, channels - first], width))


def _resample(draw, program: Program, source: int) -> int:
    channels, side = program.shapes[source]
    kinds = {
        "max": (side, lambda x: functional.max_pool2d(x, 3, 1, 1)),
        "gate": (side, lambda x: x * x.mean((2, 3), keepdim=True)),
    }
    if side > 4:
        kinds["avg"] = (side // 2, lambda x: functional.avg_pool2d(x, 2))
    if side <= SIDE:
        kinds["up"] = (2 * side, lambda x: functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    name = draw(st.sampled_from(sorted(kinds)))
    after, function = kinds[name]
    run = lambda _, values: function(values[source])  # noqa: E731
    return program.add(f"{name}({source})", [source], (channels, after), run)


BUILDERS = (
    _conv,
    _depthwise,
    _grouped,
    _transposed,
    _norm,
    _activation,
    _pair,
    _cut,
    _gated,
    _shuffle,
    _parted,
    _stacked,
    _resample,
)


@st.composite
def programs(draw, *, steps: int = 10) -> Program:
    """Draw a program; its weights are drawn by torch, seeded by the caller."""
    program = Program()
    last = _conv(draw, program, 0)
    for _ in range(draw(st.integers(2, steps))):
        build = draw(st.sampled_from(BUILDERS))
        source = draw(st.sampled_from([last, *range(1, len(program.shapes))]))
        last = build(draw, program, source)
    for value in [value for value, readers in enumerate(program.readers) if readers == 0]:
        channels, side = program.shapes[value]
        name = f"layer{len(program.layers)}"
        program.layers[name] = nn.Conv2d(channels, 2, 1)
        run = lambda layers, values, name=name, value=value: layers[name](values[value])  # noqa: E731
        program.add(f"out {name}({value})", [value], (2, side), run)
    return program
