"""Unstructured pruning: which weights of chosen layers become zero; by `torch.nn.utils.prune` where it knows how.

N:M patterns follow Mishra et al., Accelerating Sparse Deep Neural Networks, 2021: of every M consecutive input channels
of a filter, at each position of its kernel, at most N weights are left. 2:4 is what sparse tensor cores take.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from yolo_prune.errors import ConfigError

PATTERNS = ("global", "l1", "random")
"""Patterns by name, besides N:M: the smallest weights of all layers together, or of each layer; any of each layer."""


def n_of_m(pattern: str) -> tuple[int, int] | None:
    """Return N and M of an N:M pattern; None for a pattern that has a name.

    Raises:
        ConfigError: Neither.
    """
    if pattern in PATTERNS:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    kept, group = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < kept < group:
        raise ConfigError(
            f"unstructured.pattern={pattern}",
            expected=f"{', '.join(PATTERNS)}, or N:M: of M consecutive input channels N are left, such as 2:4",
        )
    return kept, group


def require_width(weight: Tensor, group: int, path: str) -> None:
    """Refuse a layer whose input channels do not come in groups of M.

    Raises:
        ConfigError: They do not.
    """
    if not fits_groups(weight, group):
        raise ConfigError(
            f"a pattern over {group} input channels on '{path}', which reads {weight.shape[1]} per filter",
            expected=f"a layer whose input channels are a multiple of {group}",
            remedy="leave that layer out of unstructured.targets",
        )


def fits_groups(weight: Tensor, group: int) -> bool:
    """Return whether a weight's input channels come in groups of M."""
    return weight.shape[1] % group == 0


def pruned_masks(weights: Mapping[str, Tensor], pattern: str, *, amount: float, seed: int) -> dict[str, Tensor]:
    """Choose the weights that stay.

    Only copies of the weights are handed to `torch.nn.utils.prune`: its hooks, which cannot be pickled with a network
    and which a deep copy loses track of, never get near the network.

    Args:
        weights: Weights by name, each once.
        pattern: `global`, `l1`, `random` or N:M.
        amount: Fraction that goes; N:M says it itself.
        seed: Seed of `random`.

    Returns:
        By name, which weights stay, bool, of the weights' shapes.
    """
    pair = n_of_m(pattern)
    if pair is not None:
        return {name: n_of_m_mask(weight, *pair) for name, weight in weights.items()}
    copies = {name: _copy(weight) for name, weight in weights.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if pattern == "global":
            prune.global_unstructured(
                [(copy, "weight") for copy in copies.values()], pruning_method=prune.L1Unstructured, amount=amount
            )
        for copy in copies.values():
            if pattern == "l1":
                prune.l1_unstructured(copy, "weight", amount)
            elif pattern == "random":
                prune.random_unstructured(copy, "weight", amount)
    return {name: copy.get_buffer("weight_mask").bool() for name, copy in copies.items()}


def _copy(weight: Tensor) -> nn.Module:
    """Return a module that has nothing but a copy of a weight."""
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(weight.detach().clone()))
    return module


def n_of_m_mask(weight: Tensor, kept: int, group: int) -> Tensor:
    """Return which weights stay: the N largest of every M consecutive input channels, bool, shape of the weight.

    Args:
        weight: Weight of a convolution, shape (outputs, inputs, height, width); inputs are a multiple of M.
        kept: N.
        group: M.
    """
    blocks = _blocks(weight, group)
    largest = blocks.abs().topk(kept, dim=2).indices
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, largest, True)
    return mask.reshape(weight.shape)


def is_n_of_m(weight: Tensor, kept: int, group: int) -> bool:
    """Return whether of every M consecutive input channels at most N weights are left."""
    return fits_groups(weight, group) and bool(((_blocks(weight, group) != 0).sum(dim=2) <= kept).all())


def _blocks(weight: Tensor, group: int) -> Tensor:
    """Return a weight as (outputs, inputs / M, M, height, width)."""
    outputs, inputs, *kernel = weight.shape
    return weight.detach().reshape(outputs, inputs // group, group, *kernel)
