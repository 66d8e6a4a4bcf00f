"""Small networks whose channels, groups and MACs can be worked out by hand (beside each: the answers)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options)


def act(x: Tensor) -> Tensor:
    """Zero stays zero, and no channel dies: a plain ReLU would leave nothing to prove in nets this narrow."""
    return nn.functional.leaky_relu(x, 0.3)


class Chain(nn.Module):
    """3 -> a: 4 -> b: 6 -> out: 2, at 8x8.

    Channels: 4 of a, 6 of b, 2 locked outputs, 3 locked inputs.
    MACs: 64 * (9*3*4 + 4*6 + 6*2) = 64 * 144. Parameters: 108 + 8 + 24 + 12 = 152 (the norm of a has 2 * 4).
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.out = conv(3, 4, 3), nn.BatchNorm2d(4), conv(4, 6), conv(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.b(nn.functional.silu(self.norm(self.a(x))))))


class Residual(nn.Module):
    """x = a(image); out(x + c(b(x))): the outputs of a and c are one group of 4, b is a group of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = conv(3, 4), conv(4, 5), conv(5, 4), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = act(self.a(x))
        return self.out(x + act(self.c(act(self.b(x)))))


class Branches(nn.Module):
    """out(cat(a, b, pool(a))): a (4) is read twice by out, b (3) once; out reads 11 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), conv(3, 3), conv(11, 2)
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = act(self.a(x)), act(self.b(x))
        return self.out(torch.cat([a, b, self.pool(a)], 1))


class Chunked(nn.Module):
    """The two halves of a (8) go separate ways: groups of 4 and 4 that must lose the same number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(4, 5), conv(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = act(self.a(x)).chunk(2, 1)
        return self.out(torch.cat([first, act(self.b(second))], 1))


class Depthwise(nn.Module):
    """a (4) and its depthwise filters are one group; the multiplied depthwise (8) lives with its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depth, self.multiplied = conv(3, 4), conv(4, 4, 3, groups=4), conv(4, 8, 3, groups=4)
        self.out = conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.multiplied(act(self.depth(act(self.a(x)))))))


class Grouped(nn.Module):
    """Two groups read the halves of a (6), tied 3 and 3, and produce outputs (8), tied 4 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.grouped, self.out = conv(3, 6), conv(6, 8, groups=2), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.grouped(act(self.a(x)))))


class Resampled(nn.Module):
    """Strided, transposed and nearest-neighbour layers keep channels apart: a 4, up 6, mean over the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, 2, 1)
        self.up = nn.ConvTranspose2d(4, 6, 2, 2)
        self.out = conv(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = act(self.up(act(self.a(x))))
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.out(x.mean((2, 3), keepdim=True))


class Padded(nn.Module):
    """Zeros around a belong to a (free); ones around b would not be silent (locked)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), nn.Conv2d(4, 5, 3, bias=False), nn.Conv2d(5, 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(act(self.a(x)), (1, 1, 1, 1))
        return self.out(nn.functional.pad(act(self.b(x)), (1, 1, 1, 1), value=1.0))


class Picked(nn.Module):
    """Positions that live in Python pick channels of a (locked); a full slice and rows of a plane pick none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 5), conv(3, 5), conv(5, 2)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        picked = act(self.b(act(self.a(x))[:, self.order][:, :3]))
        return self.out(picked[:, :][:, :, ::2, ::2])


class PartlyLabelled(nn.Module):
    """The image is concatenated to a and b is added: what meets the image (3 of b) is locked, the rest lives with a."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), conv(3, 7), conv(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([act(self.a(x)), x], 1) + act(self.b(x)))


class Reduced(nn.Module):
    """A mean over channels mixes them (a locked); a learned number for all channels belongs to none (b free)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), conv(1, 5), conv(5, 2)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.b(act(self.a(x)).mean(1, keepdim=True))) * self.gain)


class Gated(nn.Module):
    """Sigmoid turns silence into a constant, which b would read: a is locked, b is free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), conv(4, 5), conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.b(torch.sigmoid(self.a(x)))))


class Excited(nn.Module):
    """Squeeze and excitation: a gate that is never zero multiplies its own channel, so both go: a 4, squeeze 3."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.squeeze, self.excite, self.out = conv(3, 4), conv(4, 3), nn.Conv2d(3, 4, 1), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = act(self.a(x))
        gate = nn.functional.hardsigmoid(self.excite(act(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.out(gate * x)


class Normed(nn.Module):
    """A constant is added to a, but the scale of the norm silences it again: a is free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.out = conv(3, 4), nn.BatchNorm2d(4), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.norm(torch.exp(self.a(x)) + 1.0)))


class Perceptron(nn.Module):
    """Linear layers on positions: hidden 6 and the features 4 that feed it; MACs 64 * (3*4 + 4*6 + 6*2)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.hidden, self.out = conv(3, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.hidden(act(self.a(x)).flatten(2).transpose(1, 2))))


class SelfAttention(nn.Module):
    """One head: queries and keys (3) live in pairs, values 5; MACs 64*3*11 + 64*64*(3 + 5) + 64*5*2."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = conv(3, 3), conv(3, 3), conv(3, 5), conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        return self.out((v @ weights.transpose(1, 2)).view(x.shape[0], -1, *x.shape[2:]))


class Repeated(nn.Module):
    """One half of a chunk holds a (2) twice and multiplies b (4): the channels of both are the same two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 2), conv(3, 4), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = act(self.a(x))
        first, second = torch.cat([a, a, act(self.b(x))], 1).chunk(2, 1)
        return self.out(first * second)


class Straddling(nn.Module):
    """An equal split that cuts b (10) in 3 and 7: a (4) and b#1 (3) together lose as many as b#2 (7)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.left, self.right = conv(3, 4), conv(3, 10), conv(7, 2), conv(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.cat([act(self.a(x)), act(self.b(x))], 1).chunk(2, 1)
        return self.left(first) + self.right(second)


class Shared(nn.Module):
    """One layer runs twice, two layers hold one weight: b (4) feeds itself, so it lives with a; c and d are one (5)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.out = conv(3, 4), conv(4, 4), conv(4, 5), conv(4, 5), conv(5, 2)
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        x = act(self.b(act(self.b(act(self.a(x))))))
        return self.out(act(self.c(x)) + act(self.d(x)))


class Reread(nn.Module):
    """The weight of a is read twice, once as numbers: a is locked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = conv(3, 4), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.a(x))) + self.a.weight.abs().mean()


class GroupedUp(nn.Module):
    """Grouped and depthwise transposed convolutions: a 6 (3 and 3), up 4 (2 and 2) with its depthwise twin."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 6)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2, groups=2)
        self.depth = nn.ConvTranspose2d(4, 4, 2, 2, groups=4)
        self.out = conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.depth(act(self.up(act(self.a(x)))))))


class Shifted(nn.Module):
    """A constant is added to a (locked); b is scaled by a learned vector (free, the vector is cut with it)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 4), conv(4, 5), conv(5, 2)
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        x = act(self.a(x)) + 1.0
        return self.out(act(self.b(x)) * self.scale.view(1, -1, 1, 1))


class FixedSplit(nn.Module):
    """Explicit sizes that live in Python only: a is locked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = conv(3, 8), conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.a(x)).split([5, 3], 1)[0])


class Twin(nn.Module):
    """The training head reads x in training only; both heads must be cut together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inference, self.training_head = conv(3, 4), conv(4, 2), conv(4, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = act(self.a(x))
        return (self.inference(x), self.training_head(x)) if self.training else self.inference(x)


class Unused(nn.Module):
    """`idle.spare` is never run: what could feed it (a channel of `idle`) is locked, `b` is not."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.ModuleDict({"a": conv(3, 4), "spare": conv(4, 7)})
        self.b, self.out = conv(4, 5), conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(act(self.b(act(self.idle["a"](x)))))


TOYS: dict[str, type[nn.Module]] = {
    toy.__name__: toy
    for toy in (
        Chain, Residual, Branches, Chunked, Depthwise, Grouped, Resampled, Padded, Picked, PartlyLabelled, Reduced,
        Gated, Excited, Normed, Perceptron, SelfAttention, Repeated, Straddling, Shared, Reread, GroupedUp, Shifted,
        FixedSplit, Twin, Unused,
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
