"""Multiply-adds of every call of a forward.

torch's own counter, `torch.utils.flop_counter`, counts the same, and the tests hold one against the other; importing it
brings the compiler for GPUs, 85 MB of it, and the counter itself another one, 2 s of it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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

    The arguments are those of `aten.convolution`.

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


def _convolution(args: Sequence[Any], out: Any) -> int:
    """Every position that is written, of a transposed one every one that is read, takes the weight once."""
    x, weight, transposed = args[0], args[1], args[6]
    return int(weight.numel() * (x if transposed else out).shape[2:].numel() * len(x))


def _product(args: Sequence[Any], out: Any) -> int:
    """Every entry of the result is a sum along the last dimension of the first factor; what is added to it is free."""
    return int(out.numel() * args[-2].shape[-1])


def _attention(args: Sequence[Any], out: Any) -> int:  # noqa: ARG001
    """Every query meets every key, and every pair takes a value: (batch, heads, positions, width) each."""
    query, key, value = args[:3]
    return int(query.shape[:3].numel() * key.shape[2] * (query.shape[3] + value.shape[3]))


_aten = torch.ops.aten

_MACS: Mapping[Any, Callable[[Sequence[Any], Any], int]] = {
    _aten.convolution: _convolution,
    **dict.fromkeys((_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm), _product),
    **dict.fromkeys(
        (
            _aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_flash_attention,
            _aten._scaled_dot_product_efficient_attention, _aten._scaled_dot_product_cudnn_attention,
        ),
        _attention,
    ),
}  # fmt: skip
"""Operators that multiply, and what a call costs, from its positional arguments and its result."""


def is_counted(func: Any) -> bool:
    """Return whether an operator costs multiply-adds."""
    return func.overloadpacket in _MACS


class CallCounter(TorchDispatchMode):
    """Notes the MACs of every call that costs some, in order.

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
            self.macs.append(macs_of_call(func, args, out) if wanted else 0)
        return out


def macs_of_call(func: Any, args: Sequence[Any], out: Any) -> int:
    """Return the multiply-adds of a counted operator."""
    return _MACS[func.overloadpacket](args, out)
