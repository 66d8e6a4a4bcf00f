"""Deep copies of models with other tensors in them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from yolo_prune.channels.tensors import named_tensors
from yolo_prune.errors import CheckpointError


def copied(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return a deep copy of a model.

    Args:
        model: The model.
        tensors: Stand in for the model's own parameters and buffers of the same names, which are then not copied. Each
            gets memory of its own where it shares the original's.

    Raises:
        CheckpointError: A module holds a tensor that torch cannot copy.
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
    try:
        result: nn.Module = copy.deepcopy(model, memo)
    except RuntimeError as error:  # torch's word for a tensor that was computed and stored in a module
        raise CheckpointError(
            f"the model cannot be copied: {error}",
            expected="tensors that are parameters, buffers or plain values",
            remedy="turn weight_norm of torch.nn.utils into that of torch.nn.utils.parametrizations, or remove it",
        ) from error
    return result


def _like(value: Tensor, original: Tensor) -> Tensor:
    """Return a value in memory of its own, as a parameter where the original is one."""
    if value.data_ptr() == original.data_ptr():
        value = value.clone()
    return nn.Parameter(value, requires_grad=original.requires_grad) if isinstance(original, nn.Parameter) else value
