"""Compactors: 1x1 convolutions behind a batch norm that can be merged, exactly, into the convolution before it.

Source: Ding et al., ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting, ICCV 2021, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-30
"""Below this a row of a compactor is no row: its sizes cannot be made those of a batch norm."""


def insert_compactor(block: Any) -> nn.Conv2d:
    """Put a compactor behind the batch norm of a block, in place, and return it; the block computes what it did.

    `block.bn` becomes a sequence of stock classes, so whoever reads the block needs no class of ours.

    Args:
        block: A module with a convolution `conv` and a batch norm `bn` that is run behind it.
    """
    norm: nn.BatchNorm2d = block.bn
    compactor = nn.Conv2d(norm.num_features, norm.num_features, 1, bias=False).to(norm.weight)
    nn.init.dirac_(compactor.weight)
    compactor.train(norm.training)
    block.bn = nn.Sequential(norm, compactor).train(norm.training)
    return compactor


def compactor_of(block: Any) -> nn.Conv2d | None:
    """Return the compactor of a block; None where it has none."""
    behind = getattr(block, "bn", None)
    if not isinstance(behind, nn.Sequential) or len(behind) != 2:
        return None
    norm, compactor = behind
    return compactor if isinstance(norm, nn.BatchNorm2d) and isinstance(compactor, nn.Conv2d) else None


def remove_compactor(block: Any) -> None:
    """Take the compactor of a block away, in place, whatever it learned."""
    block.bn = block.bn[0]


@torch.no_grad()
def merge_compactor(block: Any) -> None:
    """Merge the compactor of a block into its convolution and batch norm, in place; computed in fp64.

    With Q the compactor, K the filters, gamma, beta, mu, var the batch norm and A = Q diag(gamma / sqrt(var + eps)),
    the block computes A(Kx - mu) + Q beta (paper, eq. 6 and 7). A batch norm computes the same behind the filters
    `c A K`, for any c > 0 of each row. This c is such that Q = 1 gives the block back as it was (but for the sign of
    gamma), and that a row near zero is near zero in the new gamma alone, so half precision does not lose its filters:
    c = sqrt(v + eps) / g with g^2 = sum_i (Q_i gamma_i)^2 and v the mean of var, weighted by (Q_i gamma_i)^2. The new
    statistics are those that batches would show if the channels before Q were uncorrelated.

    Args:
        block: A module with a compactor; see `insert_compactor`.
    """
    norm, compactor = block.bn
    q = compactor.weight.double().flatten(1)
    gamma, beta, mean, variance = (
        tensor.double() for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    combine = q * gamma / (variance + norm.eps).sqrt()
    energy = (q * gamma).square()
    total = energy.sum(dim=1)
    heard = total > TINY
    typical = torch.where(heard, energy @ variance / total.clamp_min(TINY), variance)
    scale = torch.where(heard, (typical + norm.eps).sqrt() / total.clamp_min(TINY).sqrt(), torch.ones_like(total))
    combine = combine * scale[:, None]
    spread = combine.square() @ variance
    kernel = block.conv.weight
    kernel.copy_((combine @ kernel.double().flatten(1)).view_as(kernel))
    if block.conv.bias is not None:
        block.conv.bias.copy_(combine @ block.conv.bias.double())
    _set(norm, mean=combine @ mean, variance=spread, weight=(spread + norm.eps).sqrt() / scale, bias=q @ beta)
    block.bn = norm


def _set(norm: nn.BatchNorm2d, *, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> None:
    values = {"running_mean": mean, "running_var": variance, "weight": weight, "bias": bias}
    for name, value in values.items():
        getattr(norm, name).copy_(value)
