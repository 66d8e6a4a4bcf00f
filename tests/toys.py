"""Small networks whose channels, groups and MACs can be worked out by hand (beside each: the answers)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options)


class Chain(nn.Module):
    """3 -> a: 4 -> b: 6 -> out: 2, at 8x8.

    Channels: 4 of a, 6 of b, 2 locked outputs, 3 locked inputs.
    MACs: 64 * (9*3*4 + 4*6 + 6*2) = 64 * 144. Parameters: 108 + 8 + 24 + 12 = 152 (the norm of a has 2 * 4).
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.out = conv(3, 4, 3), nn.BatchNorm2d(4), conv(4, 6), conv(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.b(nn.functional.silu(self.norm(self.a(x))))))


class Residual(nn.Module):
    """x = a(image); out(x + c(b(x))): the outputs of a and c are one group of 4, b is a group of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = conv(3, 4), conv(4, 5), conv(5, 4), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.out(x + torch.relu(self.c(torch.relu(self.b(x)))))


class Branches(nn.Module):
    """out(cat(a, b, pool(a))): a (4) is read twice by out, b (3) once; out reads 11 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), conv(3, 3), conv(11, 2)
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.a(x)), torch.relu(self.b(x))
        return self.out(torch.cat([a, b, self.pool(a)], 1))


class Chunked(nn.Module):
    """The two halves of a (8) go separate ways: groups of 4 and 4 that must lose the same number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(4, 5), conv(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.relu(self.a(x)).chunk(2, 1)
        return self.out(torch.cat([first, torch.relu(self.b(second))], 1))


class Depthwise(nn.Module):
    """a (4) and its depthwise filters are one group; the multiplied depthwise (8) lives with its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depth, self.multiplied = conv(3, 4), conv(4, 4, 3, groups=4), conv(4, 8, 3, groups=4)
        self.out = conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.multiplied(torch.relu(self.depth(torch.relu(self.a(x)))))))


class Grouped(nn.Module):
    """Two groups: inputs j and j + 3 of a (6) share a slice of the weight; the outputs (8) are tied 4 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.grouped, self.out = conv(3, 6), conv(6, 8, groups=2), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.grouped(torch.relu(self.a(x)))))


class Resampled(nn.Module):
    """Strided, transposed and nearest-neighbour layers keep channels apart: a 4, up 6, mean over the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, 2, 1)
        self.up = nn.ConvTranspose2d(4, 6, 2, 2)
        self.out = conv(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.a(x))))
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.out(x.mean((2, 3), keepdim=True))


class Padded(nn.Module):
    """Zeros around a belong to a (free); ones around b would not be silent (locked)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), conv(4, 5), nn.Conv2d(5, 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(torch.relu(self.a(x)), (1, 0, 0, 1))
        return self.out(nn.functional.pad(torch.relu(self.b(x)), (1, 1, 1, 1), value=1.0))


class Gated(nn.Module):
    """Sigmoid has no rule (f(0) is not 0): a is locked, b is free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), conv(4, 5), conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.b(torch.sigmoid(self.a(x)))))


class Shifted(nn.Module):
    """A constant is added to a (locked); b is scaled by a learned vector (free, the vector is cut with it)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), conv(4, 5), conv(5, 2)
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) + 1.0
        return self.out(torch.relu(self.b(x)) * self.scale.view(1, -1, 1, 1))


class FixedSplit(nn.Module):
    """Explicit sizes that live in Python only: a is locked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = conv(3, 8), conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.a(x)).split([5, 3], 1)[0])


class Twin(nn.Module):
    """The training head reads x in training only; both heads must be cut together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inference, self.training_head = conv(3, 4), conv(4, 2), conv(4, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.a(x))
        return (self.inference(x), self.training_head(x)) if self.training else self.inference(x)


class Unused(nn.Module):
    """`idle.spare` is never run: what could feed it (a channel of `idle`) is locked, `b` is not."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.ModuleDict({"a": conv(3, 4), "spare": conv(4, 7)})
        self.b, self.out = conv(4, 5), conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.b(torch.relu(self.idle["a"](x)))))


TOYS: dict[str, type[nn.Module]] = {
    toy.__name__: toy
    for toy in (
        Chain, Residual, Branches, Chunked, Depthwise, Grouped, Resampled, Padded, Gated, Shifted, FixedSplit,
        Twin, Unused,
    )
}  # fmt: skip


def build(name: str, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = TOYS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()
