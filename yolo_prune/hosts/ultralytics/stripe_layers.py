"""Which layers of a network of this host have stripes that may be pruned, and what a stripe costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.modules.conv import Conv

from yolo_prune.channels.tensors import named_tensors
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.ultralytics.blocks import MERGED, host_for
from yolo_prune.hosts.ultralytics.surgery import trace_model, trace_side
from yolo_prune.methods.stripes.skeleton import SKELETON, StripedLayer, has_skeleton
from yolo_prune.surgery.silent import silent_channels, without_silent
from yolo_prune.surgery.stripes import is_striped, macs_in_stripes, macs_per_stripe

METHOD = "stripes"
"""Name of the method, and of its group of parameters."""


def striped_paths(network: Any) -> list[str]:
    """Return the paths of the convolutions whose stripes may be pruned.

    Those of the host's `Conv` block (a batch norm follows) with one group and a kernel larger than 1x1, unless
    deployment merges them into another kernel or drops them.

    Raises:
        ConfigError: There are none.
    """
    modules = list(network.named_modules())
    merged = tuple(f"{path}." for path, module in modules if isinstance(module, tuple(MERGED)))
    host = host_for(network)
    found = [
        f"{path}.conv"
        for path, module in modules
        if type(module) is Conv
        and hasattr(module, "bn")
        and is_striped(module.conv)
        and module.conv.padding_mode == "zeros"
        and not f"{path}.".startswith(merged)
        and not host.training_only(f"{path}.conv")
    ]
    if not found:
        raise ConfigError(
            "method=stripes on a network without a convolution that has stripes",
            expected="convolutions of one group with a kernel larger than 1x1 and a batch norm behind",
            remedy="prune its channels instead: yolo-prune prune",
        )
    return found


def layers_of(network: Any) -> dict[str, StripedLayer]:
    """Return the layers of a network that have a skeleton, by path of the convolution."""
    found = {}
    for path, module in network.named_modules():
        if has_skeleton(module):
            found[path] = StripedLayer(conv=module, norm=network.get_submodule(path.rpartition(".")[0]).bn)
    return found


def dead_stripes(network: Any) -> dict[str, int]:
    """Return the number of dead stripes of each layer that has a skeleton."""
    return {path: int((~layer.alive()).sum()) for path, layer in layers_of(network).items()}


class StripePrices:
    """What a network costs, counted in living stripes, after the dead filters that may be removed are.

    Args:
        model: The network, on the CPU; it loses its skeletons, so hand over a copy.
        imgsz_px: Side of the images at which MACs are counted.

    Attributes:
        dense_macs: MACs of the network with all its stripes.
        per_stripe: MACs of one stripe of each layer that has some, by path.
    """

    def __init__(self, model: Any, imgsz_px: int) -> None:
        for layer in layers_of(model).values():
            delattr(layer.conv, SKELETON)
        side, self._graph, self._imgsz_px = trace_side(model), trace_model(model), imgsz_px
        costs = macs_per_stripe(model, torch.zeros(1, int(model.yaml.get("channels", 3)), side, side))
        self.per_stripe = {path: cost * (imgsz_px / side) ** 2 for path, cost in costs.items()}
        self.dense_macs = float(self._graph.cost.macs(self._graph.widths(), imgsz_px=imgsz_px))

    def macs(self, network: Any, dying: Mapping[str, Tensor] | None = None) -> float:
        """Return the MACs of a network with skeletons, whose channels are those of this one.

        Args:
            network: The network.
            dying: Stripes that count as dead already, by path, bool, the skeleton's shape.
        """
        alive = {path: layer.alive() for path, layer in layers_of(network).items()}
        alive |= {path: alive[path] & ~stripes for path, stripes in (dying or {}).items()}
        tensors = named_tensors(network)
        for path, stripes in alive.items():
            heard = stripes.flatten(1).any(dim=1)
            for name in (f"{path.rpartition('.')[0]}.bn.{vector}" for vector in ("weight", "bias")):
                tensors[name] = tensors[name].detach() * heard
        keep = without_silent(self._graph, silent_channels(tensors, self._graph))
        masks = {path: stripes.cpu().numpy() for path, stripes in alive.items()}
        return macs_in_stripes(self._graph, keep, masks, self.per_stripe, imgsz_px=self._imgsz_px)
