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
    modules = list(model.modules())
    plain = {kind for kind in {type(module) for module in modules} if _is_plain(kind)}
    modules = [module for module in modules if type(module) in plain]
    # Attributes first, by ourselves: most are numbers or empty containers for hooks, which deepcopy is slow about.
    memo |= {id(module): object.__new__(type(module)) for module in modules}
    try:
        for module in modules:
            vars(memo[id(module)]).update({name: _copied(value, memo) for name, value in vars(module).items()})
        result: nn.Module = copy.deepcopy(model, memo)
    except RuntimeError as error:  # torch's word for a tensor that was computed and stored in a module
        raise CheckpointError(
            f"the model cannot be copied: {error}",
            expected="tensors that are parameters, buffers or plain values",
            remedy="turn weight_norm of torch.nn.utils into that of torch.nn.utils.parametrizations, or remove it",
        ) from error
    return result


_AS_IT_IS = frozenset((bool, int, float, str, type(None)))
_CONTAINERS = frozenset((dict, OrderedDict, set))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Return what `copy.deepcopy` does; numbers and empty containers, most of what modules hold, at once."""
    kind = type(value)
    if kind in _AS_IT_IS:
        return value
    if kind in _CONTAINERS and not value:
        return memo.setdefault(id(value), kind())
    return copy.deepcopy(value, memo)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Return whether a module of a class is its attributes, and no method of the class copies it otherwise.

    torch's own layers add to attributes only what files of an older version lack.
    """
    owners = [one for one in kind.__mro__ if one not in (nn.Module, object)]
    return not any(
        name in _COPYING and not (name == "__setstate__" and owner.__module__.startswith("torch.nn."))
        for owner in owners
        for name in vars(owner)
    )


_COPYING = frozenset(("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__slots__"))


def _like(value: Tensor, original: Tensor) -> Tensor:
    """Return a value in memory of its own, as a parameter where the original is one."""
    if value.data_ptr() == original.data_ptr():
        value = value.clone()
    return nn.Parameter(value, requires_grad=original.requires_grad) if isinstance(original, nn.Parameter) else value
