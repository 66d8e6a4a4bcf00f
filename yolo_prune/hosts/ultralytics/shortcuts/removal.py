"""Shortcut removal for models of this host: blocks with sums become rows of stock layers that read the sums' terms.

A block whose sums are read by dense convolutions alone is taken apart into `Conv`, `Concat` and `Bottleneck` without
its addition; see `surgery.sums` for what a reader of a sum becomes. Sums that leave a layer (SPPF and Bottleneck as
layers) are carried on, through `Concat` and nearest `Upsample`, to whoever reads them. Where a reader is anything else,
such as a max-pool, the layer that adds stays as it is, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import BaseModel

from yolo_prune.channels.forward import forward_unchanged
from yolo_prune.errors import CheckpointError
from yolo_prune.hosts.ultralytics.shortcuts.blocks import adds, obstacle_inside
from yolo_prune.hosts.ultralytics.shortcuts.expansions import EXPANSIONS
from yolo_prune.hosts.ultralytics.shortcuts.walk import ObstacleError, Walk
from yolo_prune.hosts.ultralytics.surgery import trace_side
from yolo_prune.surgery.copying import copied


@dataclass(frozen=True, kw_only=True)
class LayerNote:
    """An old layer that adds.

    Attributes:
        number: Its number in the old table.
        block: Its class.
        reason: Why it still adds; empty if it does not.
    """

    number: int
    block: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A model without the shortcuts that could be removed.

    Attributes:
        model: The model: stock classes, a new layer table.
        expanded: The old layers whose sums are gone.
        left: The old layers that still add.
    """

    model: nn.Module
    expanded: tuple[LayerNote, ...]
    left: tuple[LayerNote, ...]


def remove_shortcuts(model: nn.Module) -> Rewritten:
    """Return a copy of a model whose shortcuts are concatenations; the model itself is untouched.

    Args:
        model: A model of the host, not fused. Weights are added up in fp64 and rounded once to their type.

    Raises:
        CheckpointError: Shared weights, a forward that is no walk through the layer table, or no shortcut to remove.
    """
    _require_layer_table(model)
    _require_own_weights(model)
    rewritten: Any = copied(model)
    widths = _output_widths(model)
    left = {
        number: reason
        for number, layer in enumerate(rewritten.model)
        if adds(layer) and (reason := obstacle_inside(layer)) is not None
    }
    walk = _walk(rewritten.model, widths, left)
    blocks = [type(layer[0] if type(layer) is nn.Sequential else layer).__name__ for layer in rewritten.model]
    expanded = tuple(LayerNote(number=number, block=blocks[number]) for number in walk.expanded)
    remaining = tuple(LayerNote(number=number, block=blocks[number], reason=left[number]) for number in sorted(left))
    if not expanded:
        raise _nothing_to_remove(remaining)
    walk.table.install(rewritten)
    return Rewritten(model=rewritten, expanded=expanded, left=remaining)


def _require_layer_table(model: Any) -> None:
    kind = type(model)
    if kind.predict is not BaseModel.predict or kind._predict_once is not BaseModel._predict_once:
        raise CheckpointError(
            f"a {kind.__name__} runs its layers in a way of its own",
            expected="a model whose forward is the host's walk through its layer table",
            remedy="prune it without removing its shortcuts",
        )


def _require_own_weights(model: nn.Module) -> None:
    """Refuse weights that two layers share: a layer that reads a sum gets new ones."""
    own = {name for name, _ in model.named_parameters()}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in own:
            raise CheckpointError(
                f"'{name}' is shared by two layers",
                expected="weights of its own for every layer",
                remedy="give each of the layers a copy of the weights",
            )


def _nothing_to_remove(left: Sequence[LayerNote]) -> CheckpointError:
    kept = "; ".join(f"layer {note.number} ({note.block}): {note.reason}" for note in left)
    return CheckpointError(
        "nothing to remove: " + (f"no shortcut can be removed. {kept}" if kept else "no layer adds its input"),
        expected="a block that adds its input to its output and whose sums are read by dense convolutions",
        remedy="prune the model as it is",
    )


def _output_widths(model: Any) -> list[int]:
    """Return the channels of the image, then of what each layer puts out; 1 for what is not one feature map."""
    channels = int(model.yaml.get("channels", 3))
    widths: dict[int, int] = {}

    def note(layer: Any, _inputs: Any, output: Any) -> None:
        widths[layer.i] = output.shape[1] if isinstance(output, Tensor) and output.dim() == 4 else 1

    handles = [layer.register_forward_hook(note) for layer in model.model]
    side = trace_side(model)
    try:
        forward_unchanged(model, torch.zeros(1, channels, side, side).to(next(model.parameters())), training=False)
    finally:
        for handle in handles:
            handle.remove()
    return [channels, *(widths[number] for number in range(len(model.model)))]


def _walk(layers: Sequence[Any], widths: Sequence[int], left: dict[int, str]) -> Walk:
    """Walk until no sum meets an obstacle; those that do are added to `left`, and one more layer each time."""
    while True:
        walk = Walk(widths, left, EXPANSIONS)
        try:
            for number, layer in enumerate(layers):
                walk.step(number, layer)
        except ObstacleError as obstacle:
            left.update(dict.fromkeys(obstacle.layers, obstacle.reason))
        else:
            return walk
