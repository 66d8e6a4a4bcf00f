"""Pooling, resampling and reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from yolo_prune.channels.facts import Facts
from yolo_prune.channels.labels import varying_dims
from yolo_prune.channels.rules.registry import aten, per_channel, rule, without_rule

_ADAPTIVE = (aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d)
_RESAMPLES = (
    aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_nearest_exact2d,
)  # fmt: skip


@rule(aten.max_pool2d_with_indices, aten.avg_pool2d, *_ADAPTIVE, *_RESAMPLES)
def spatial(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Works on each channel by itself. A plane that is asked for by its size may have that at every image size."""
    label = facts.label(args[0])
    result = out[0] if isinstance(out, (tuple, list)) else out
    by_size = func.overloadpacket in _RESAMPLES and not any(
        isinstance(value, float) for value in (*args[2:], *kwargs.values())
    )
    if by_size or (func.overloadpacket in _ADAPTIVE and result.shape[2:].numel() > 1):
        facts.fixed_planes = True
    if label is not None:
        facts.set_planes(result, per_channel(facts, label, str(func.overloadpacket)))


@rule(aten.sum, aten.mean, aten.amax, aten.amin)
def reduction(facts: Facts, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
    """What is summed together lives together: stacked features entry by entry, a plane as the one channel it is."""
    label = facts.label(args[0])
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if label is None:
        return
    if not dims:
        without_rule(facts, func, args, kwargs, out)
        return
    keepdim = bool(args[2]) if len(args) > 2 else bool(kwargs.get("keepdim", False))
    most = label.amax(dims, keepdim=True)  # of a loud and a silent entry the loud one: the sum is loud
    reduced = {dim % label.dim() for dim in dims}
    varying = set(varying_dims(label))
    if (varying and varying <= reduced) or ((label < 0) != (most < 0)).any():
        facts.lock(label, f"channels are reduced into one another in {facts.place()}")
    facts.equate(label, most.expand_as(label))
    facts.set_label(out, most if keepdim else most.reshape(out.shape))
