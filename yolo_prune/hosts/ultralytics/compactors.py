"""Compactors in networks of this host: where they can stand, where they are, and how a network loses them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from ultralytics.nn.modules.conv import Conv

from yolo_prune.hosts.ultralytics.networks import network_of
from yolo_prune.surgery.compactor import compactor_of, insert_compactor, merge_compactor, remove_compactor


def without_compactors(network: Any) -> Any:
    """Return a network without its compactors, in place: what it was before it had them."""
    for block in list(network.modules()):
        if compactor_of(block) is not None:
            remove_compactor(block)
    return network


def add_compactors(network: nn.Module, paths: Iterable[str]) -> None:
    """Put a compactor behind some convolutions, in place; see `surgery.compactor`."""
    for path in paths:
        insert_compactor(_block(network, path))


def compactor_behind(network: nn.Module, path: str) -> nn.Conv2d:
    """Return the compactor behind a convolution that has one."""
    found = compactor_of(_block(network, path))
    assert found is not None  # callers name those that have one
    return found


def _block(network: nn.Module, path: str) -> Any:
    """Return the block that a convolution belongs to."""
    return network.get_submodule(path.removesuffix(".conv"))


def compactor_weights(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the weights of compactors by the path of the convolution before them; the model may be wrapped."""
    network = network_of(model)
    return {path: cast(nn.Parameter, compactor_behind(network, path).weight) for path in paths}


def with_compactors(network: nn.Module) -> list[str]:
    """Return the paths of the convolutions that have a compactor."""
    return [f"{path}.conv" for path, block in network.named_modules() if compactor_of(block) is not None]


def suitable(network: nn.Module, frozen: list[str]) -> list[str]:
    """Return the paths of the convolutions that a compactor can stand behind: stock blocks that are trained.

    Blocks of other classes may run their parts in another order. The activation has to leave zero as it is.
    """
    return [
        f"{path}.conv"
        for path, block in network.named_modules()
        if type(block) is Conv
        and isinstance(block.bn, nn.BatchNorm2d)
        and block.conv.groups == 1
        and float(block.act(torch.zeros(1))) == 0.0
        and not any(name in f"{path}." for name in frozen)
    ]


def frozen_names(freeze: int | list[int] | None) -> list[str]:
    """Return what is in the names of frozen parameters, as the host will freeze them."""
    layers = range(freeze) if isinstance(freeze, int) else freeze or ()
    return [f"model.{layer}." for layer in layers]


def merged(network: Any) -> Any:
    """Merge every compactor of a network into its convolution, in place; return the network."""
    for block in list(network.modules()):
        if compactor_of(block) is not None:
            merge_compactor(block)
    return network
