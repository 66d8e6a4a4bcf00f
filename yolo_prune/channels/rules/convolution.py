"""Layers with weights: convolutions and linear layers name their outputs and read their inputs; batch norms follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from yolo_prune.channels.facts import Facts
from yolo_prune.channels.graph import Role
from yolo_prune.channels.labels import NONE, ids
from yolo_prune.channels.rules.registry import aten, follow, per_channel, read, rule, tie_vectors, without_rule


@rule(aten.convolution)
def convolution(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:  # noqa: ARG001
    """Outputs get the filters' names; inputs are tied to the weight's input axis, group by group."""
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    name, label = facts.weight(weight), facts.label(x)
    if name is None:
        without_rule(facts, func, args, {}, out)
        return
    inputs = torch.full((x.shape[1],), NONE) if label is None else per_channel(facts, label, "convolution")
    outputs = _grouped(facts, name, x, inputs, out.shape[1], groups, transposed=transposed)
    if bias is not None:
        tie_vectors(facts, [(bias, Role.PRODUCER)], outputs)
    facts.set_planes(out, outputs)
    positions = (x if transposed else out).shape[2:].numel()
    untracked = 1 if (name, 1) in facts.axes else weight.shape[1]  # 1 for depthwise
    coef = weight.shape[2:].numel() * positions * untracked
    facts.price(coef, [(name, 0), (name, 1)], _area_power(facts, x.shape[2:]))


def _area_power(facts: Facts, plane: Sequence[int]) -> int | None:
    """Return how the positions of a plane grow with the image's area; None where only a second run can tell.

    A plane is the image's own, made smaller by strides, if it is about as tall for its width as the image is.
    """
    if all(side == 1 for side in plane):
        return 0  # a trace image spans at least two cells of the coarsest map
    strides = [image / own for image, own in zip(facts.image, plane, strict=False)]
    alike = len(plane) == len(facts.image) and max(strides) < 2.0 * min(strides)
    return 1 if (alike and not facts.fixed_planes) or facts.host.areal(facts.path()) else None


def _grouped(
    facts: Facts, name: str, x: Tensor, inputs: Tensor, width: int, groups: int, *, transposed: bool
) -> Tensor:
    """Name the outputs of a convolution of x, shape (width,), and tie its inputs, shape (I,).

    A depthwise filter lives with its input. In other grouped convolutions each group reads and produces channels of its
    own, the same number in every group; plain ones are the case of one group.
    """
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    if groups > 1 and groups == len(inputs) and (width == groups or not transposed):
        filters = facts.axis(name, 0, width, Role.PRODUCER)
        follow(facts, [filters], inputs if width == groups else inputs.repeat_interleave(width // groups))
        return filters.ids()
    # Only dim 1 of a grouped weight is shared by the groups; dim 0 lists them one after the other.
    outputs = facts.axis(name, out_dim, width, Role.PRODUCER, groups=groups if out_dim == 1 else 1).ids()
    read(facts, facts.axis(name, in_dim, len(inputs), Role.CONSUMER, groups=groups if in_dim == 1 else 1), x, inputs)
    if groups > 1:
        facts.tie(outputs.view(groups, -1).unbind(), "grouped convolution", blocks=groups)
        facts.tie(inputs.view(groups, -1).unbind(), "grouped convolution", blocks=groups)
    return outputs


@rule(aten.mm, aten.addmm)
def linear(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """A linear layer is a 1x1 convolution over rows; a product of two activations is none."""
    x, transposed = args[-2:]
    name = facts.transposed_weight(transposed)
    if name is None:
        without_rule(facts, func, args, kwargs, out)
        return
    label = facts.label(x)
    inputs = torch.full((x.shape[1],), NONE) if label is None else per_channel(facts, label, "a linear layer")
    outputs = facts.axis(name, 0, out.shape[1], Role.PRODUCER).ids()
    read(facts, facts.axis(name, 1, x.shape[1], Role.CONSUMER), x, inputs)
    if len(args) == 3:
        tie_vectors(facts, [(args[0], Role.PRODUCER)], outputs)
    facts.set_planes(out, outputs)
    facts.price(len(x), [(name, 0), (name, 1)], 0 if len(x) == 1 else None)  # one row: a pooled image


@rule(aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm, aten.batch_norm)
def batch_norm(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Scale, shift and statistics belong to the normalised channel, which they silence whatever it carries."""
    x, scale, shift, mean, variance = args[:5]
    result = out[0] if isinstance(out, (tuple, list)) else out
    label = facts.label(x)
    if label is None or scale is None or mean is None:
        # Without a scale no parameter can silence the channel, without statistics none is left to prove it by.
        without_rule(facts, func, args, kwargs, out)
        return
    channels = ids(per_channel(facts, label, "batch norm"))
    produced = [(scale, Role.PRODUCER), (shift, Role.PRODUCER)]
    measured = [(mean, Role.STATISTIC), (variance, Role.STATISTIC)]
    tie_vectors(facts, produced + measured, channels)
    _note_norm(facts, channels, scale)
    facts.set_planes(result, channels)


def _note_norm(facts: Facts, channels: Tensor, scale: Tensor) -> None:
    """Remember which convolution feeds a batch norm directly: its constants can be folded there."""
    producer, norm = facts.owner(int(channels[0])), facts.names.get(id(scale))
    whole = producer is not None and (producer, 0) in facts.axes
    if producer is not None and norm is not None and whole and torch.equal(channels, facts.axes[producer, 0].ids()):
        facts.norms[producer.rpartition(".")[0]] = norm.rpartition(".")[0]
