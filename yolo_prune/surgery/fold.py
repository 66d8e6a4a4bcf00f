"""Fold what is left of removed channels into the biases of their readers.

A channel whose scale is zero still carries the constant f(shift). Cutting it takes that constant away from every
convolution that read it; adding the convolution's answer to the constant to its bias (or taking it off the running mean
of the batch norm behind it) gives it back. Exact for 1x1 kernels; at the border of a zero-padded larger kernel the
constant met padding, so there it is an approximation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolo_prune.channels import BoolArray, ChannelGraph, Role
from yolo_prune.channels.forward import forward_unchanged
from yolo_prune.surgery.copying import copied
from yolo_prune.surgery.mask import silence


@dataclass(frozen=True, kw_only=True)
class Folding:
    """What was folded.

    Attributes:
        exact: Convolutions whose answer to the constants is the same at every position.
        at_border: Convolutions with zero padding: exact inside, an approximation at the border.
        skipped: Convolutions without a bias or a batch norm that could take the constant.
    """

    exact: tuple[str, ...]
    at_border: tuple[str, ...]
    skipped: tuple[str, ...]


def fold_constants(dense: nn.Module, slim: nn.Module, graph: ChannelGraph, keep: BoolArray, example: Tensor) -> Folding:
    """Fold the constants of removed channels into a slim model, in place.

    Args:
        dense: The model that was sliced.
        slim: The result of `apply`.
        graph: Channel graph of `dense`.
        keep: Keep mask of shape (channels,).
        example: An image batch, large enough that most positions lie away from borders.
    """
    constants = _constants(dense, graph, keep, example)
    layers, targets = dict(dense.named_modules()), dict(slim.named_modules())
    folded: dict[str, list[str]] = {"exact": [], "at_border": [], "skipped": []}
    for path, constant in constants.items():
        layer = layers[path]
        assert isinstance(layer, nn.Conv2d)  # `_readers` yields nothing else
        removed = ~torch.from_numpy(keep[graph.axes[f"{path}.weight", 1].channels])
        answer = layer.weight.detach()[:, removed].sum(dim=(2, 3)).double() @ constant
        outputs = graph.axes.get((f"{path}.weight", 0))
        kept = answer if outputs is None else answer[torch.from_numpy(keep[outputs.channels])]
        done = _add_bias(targets, path, graph.norms.get(path), kept)
        padded = layer.padding not in ("valid", (0, 0))
        folded["skipped" if not done else "at_border" if padded else "exact"].append(path)
    folded["skipped"] += _unfoldable_readers(dense, graph, keep)
    return Folding(**{name: tuple(paths) for name, paths in folded.items()})


def _unfoldable_readers(model: nn.Module, graph: ChannelGraph, keep: BoolArray) -> list[str]:
    """Return the other layers that read removed channels: grouped and transposed convolutions, linear layers."""
    foldable = _readers(model, graph, keep)
    reading = [
        name for (name, _), axis in graph.axes.items() if axis.role is Role.CONSUMER and not keep[axis.channels].all()
    ]
    return [path for path in (name.rpartition(".")[0] for name in reading) if path not in foldable]


def _readers(model: nn.Module, graph: ChannelGraph, keep: BoolArray) -> Mapping[str, nn.Conv2d]:
    """Return the convolutions that read removed channels."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.groups == 1
        and (f"{path}.weight", 1) in graph.axes
        and not keep[graph.axes[f"{path}.weight", 1].channels].all()
    }


def _constants(dense: nn.Module, graph: ChannelGraph, keep: BoolArray, example: Tensor) -> dict[str, Tensor]:
    """Measure, for each reader, the constants that arrive in its removed inputs, shape (removed inputs,).

    Measuring them where they arrive covers sums, concatenations and pooling without another rule.
    """
    model = copied(dense).double()
    silence(model, graph, keep, constants=True)
    found: dict[str, Tensor] = {}
    handles = []
    for path, module in _readers(model, graph, keep).items():
        removed = ~torch.from_numpy(keep[graph.axes[f"{path}.weight", 1].channels])

        def note(_module: nn.Module, inputs: tuple[Tensor, ...], path: str = path, removed: Tensor = removed) -> None:
            # The median over positions: a few at the border may differ behind padded depthwise layers.
            found[path] = inputs[0][:, removed].movedim(1, 0).flatten(1).median(dim=1).values

        handles.append(module.register_forward_pre_hook(note))
    try:
        forward_unchanged(model, example.double(), training=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _add_bias(layers: Mapping[str, nn.Module], path: str, norm: str | None, answer: Tensor) -> bool:
    """Add an answer, shape (outputs,), to a convolution's bias or to what its batch norm subtracts."""
    bias = getattr(layers[path], "bias", None)
    mean = getattr(layers[norm], "running_mean", None) if norm else None
    with torch.no_grad():
        if isinstance(bias, Tensor):
            bias += answer.to(bias)
        elif isinstance(mean, Tensor):
            mean -= answer.to(mean)
        else:
            return False
    return True
