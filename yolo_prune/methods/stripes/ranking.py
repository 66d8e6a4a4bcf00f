"""Which stripes a budget of MACs costs: those that give the least of their layer's output for what they cost.

Behind a convolution stands a batch norm, so neither a filter's own scale nor that of its input says anything. What
counts is the part of the output: a filter's output has the variance gamma^2, of which a stripe gives about the part
that it has in the filter's squared norm. So a stripe of layer l is worth

    gamma_n^2 * |w_nij|^2 / |w_n|^2 / sum over the filters m of l of gamma_m^2,

a fraction of the layer's output, where w is the product of weight and skeleton. Stripes of all layers are ranked by
that fraction per MAC.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from yolo_prune.channels import IntArray
from yolo_prune.methods.stripes.skeleton import StripedLayer

TINY = 1e-30
"""Keeps 0 / 0 from being NaN."""


@dataclass(frozen=True, kw_only=True)
class StripeFloors:
    """What no budget takes.

    Attributes:
        min_channels: Filters of each layer that keep at least their strongest stripe.
        max_fraction: Largest fraction of a layer's stripes that may be dead.
    """

    min_channels: int = 8
    max_fraction: float = 0.9


def stripe_worth(layer: StripedLayer) -> Tensor:
    """Return the fraction of a layer's output that each stripe gives, the skeleton's shape; they sum to 1.

    A gamma of 0 still leaves its filter a trace of worth, so that a network that learns from such a start is ranked.
    """
    energy = layer.conv.weight.detach().double().square().sum(dim=1)
    gamma = layer.norm.weight.detach().double().square()[:, None, None] + TINY
    filters = energy.sum(dim=(1, 2), keepdim=True)
    worth = gamma * energy / filters.clamp_min(TINY)
    return worth / worth.sum().clamp_min(TINY)


def protected_stripes(layer: StripedLayer, floors: StripeFloors) -> Tensor:
    """Return which stripes of a layer no budget takes, bool, the skeleton's shape."""
    worth = stripe_worth(layer)
    strongest = worth.flatten(1).max(dim=1)
    best = strongest.values.topk(min(floors.min_channels, len(worth))).indices
    kept = torch.zeros_like(worth, dtype=torch.bool).flatten(1)
    kept[best, strongest.indices[best]] = True
    least = int(np.ceil(round((1.0 - floors.max_fraction) * worth.numel(), 9)))
    kept = kept.flatten()
    kept[worth.flatten().topk(max(least, 1)).indices] = True
    return kept.view_as(worth) & layer.alive()


class StripeRanking:
    """The stripes that may go, those first that give the least of their layer's output for what they cost.

    Args:
        layers: The layers by path.
        costs: MACs of one stripe of each.
        floors: What stays whatever it costs.
    """

    def __init__(self, layers: Mapping[str, StripedLayer], costs: Mapping[str, float], floors: StripeFloors) -> None:
        self._free = {path: layer.alive() & ~protected_stripes(layer, floors) for path, layer in layers.items()}
        worth = [stripe_worth(layer)[self._free[path]] / costs[path] for path, layer in layers.items()]
        self._order: IntArray = np.argsort(torch.cat(worth).cpu().numpy(), kind="stable")

    def __len__(self) -> int:
        return len(self._order)

    def first(self, count: int) -> dict[str, Tensor]:
        """Return which stripes the first so many are, by path, bool, of the skeletons' shapes."""
        going = np.zeros(len(self._order), dtype=bool)
        going[self._order[:count]] = True
        parts = np.split(going, np.cumsum([int(free.sum()) for free in self._free.values()])[:-1])
        result = {path: torch.zeros_like(free) for path, free in self._free.items()}
        for (path, free), part in zip(self._free.items(), parts, strict=True):
            result[path][free] = torch.from_numpy(part).to(free.device)
        return result

    def within(self, macs: float, price: Callable[[dict[str, Tensor]], float]) -> dict[str, Tensor]:
        """Return the fewest first stripes without which a network is within a number of MACs; all if none suffice.

        Args:
            macs: The MACs.
            price: Returns the MACs that are left without some stripes; never more without more of them.
        """
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if price(self.first(middle)) <= macs else (middle + 1, high)
        return self.first(low)
