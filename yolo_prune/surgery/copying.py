"""Deep copies of models with other tensors in them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from yolo_prune.channels.tensors import named_tensors


def copied(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return a deep copy of a model.

    Args:
        model: The model.
        tensors: Stand in for the model's own parameters and buffers of the same names, which are then not copied. Each
            gets memory of its own where it shares the original's.
    """
    own = named_tensors(model)
    memo: dict[int, Any] = {id(own[name]): _like(value, own[name]) for name, value in (tensors or {}).items()}
    # New empty containers stand in too: a module holds a dozen for hooks, and copying them took most of the time.
    memo |= {
        id(value): type(value)()
        for module in model.modules()
        for value in vars(module).values()
        if type(value) in (dict, OrderedDict, set) and not value
    }
    result: nn.Module = copy.deepcopy(model, memo)
    return result


def _like(value: Tensor, original: Tensor) -> Tensor:
    """Return a value in memory of its own, as a parameter where the original is one."""
    if value.data_ptr() == original.data_ptr():
        value = value.clone()
    return nn.Parameter(value, requires_grad=original.requires_grad) if isinstance(original, nn.Parameter) else value
