"""Multiply-adds of every call of a forward, by the formulas of torch's own counter.

That counter itself (`FlopCounterMode`) counts the same, but imports torch's compiler first, which takes 2 s.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

CONVOLUTION = torch.ops.aten.convolution.default


def blank_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor | None:
    """Return zeros of a convolution's output shape; None where the real one would fail, so that it says why.

    For forwards in which values do not matter: convolutions take most of the time and of the memory.
    """
    if not x.dim() - 2 == len(stride) == len(padding) == len(dilation) == len(output_padding):
        return None
    if x.dim() != weight.dim() or x.shape[1] != (weight.shape[0] if transposed else weight.shape[1] * groups):
        return None
    sides = []
    for side, size, step, pad, spacing, extra in zip(
        x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True
    ):
        reach = spacing * (size - 1)
        sides.append(
            (side - 1) * step - 2 * pad + reach + extra + 1 if transposed else (side + 2 * pad - reach - 1) // step + 1
        )
    if min(sides) < 1:
        return None
    return x.new_zeros(x.shape[0], weight.shape[1] * groups if transposed else weight.shape[0], *sides)


def is_counted(func: Any) -> bool:
    """Return whether torch's own counter knows an operator."""
    return func.overloadpacket in flop_registry


class CallCounter(TorchDispatchMode):
    """Notes the MACs of every call that torch's own counter knows, in order, by torch's own formulas.

    Args:
        only: Which calls to price, by number; the others are noted as 0, and convolutions return zeros. All by default.
    """

    def __init__(self, *, only: Container[int] | None = None) -> None:
        super().__init__()
        self.macs: list[int] = []
        self._only = only

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see trace.LabelTracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and note its cost."""
        kwargs = kwargs or {}
        out = blank_convolution(*args) if self._only is not None and func is CONVOLUTION else None
        out = func(*args, **kwargs) if out is None else out
        if is_counted(func):
            wanted = self._only is None or len(self.macs) in self._only
            self.macs.append(macs_of_call(func, args, kwargs, out) if wanted else 0)
        return out


def macs_of_call(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the multiply-adds of an operator that torch's own counter knows, by its formula."""
    return int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)) // 2
