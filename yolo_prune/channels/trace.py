"""Find the channels of a model by running it while PyTorch moves the labels.

Every activation carries a companion int64 tensor of its own shape whose entries name the parameter slice that each
value belongs to (-1: none). Data movement runs the same ATen operator on the companion; other operators have a short
rule each (`channels.rules`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yolo_prune.channels.assemble import assemble
from yolo_prune.channels.facts import Facts, Host
from yolo_prune.channels.graph import ChannelGraph
from yolo_prune.channels.rules import RULES, without_rule
from yolo_prune.errors import TraceError


class LabelTracer(TorchDispatchMode):
    """Runs each operator, then its rule on the companions of its arguments."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and its rule."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.facts.touch(tensors)
        if any(self.facts.concern(tensor) for tensor in tensors):
            RULES.get(func.overloadpacket, without_rule)(self.facts, func, args, kwargs, out)
        return out


def trace(model: nn.Module, example: Tensor, *, host: Host | None = None) -> ChannelGraph:
    """Trace a model and return its channel graph.

    The forward runs twice, as in training and as in inference, because twin heads run different branches there.

    Args:
        model: A torch model on the CPU; it is left bit-identical.
        example: An input of shape (1, channels, side, side).
        host: What labels alone cannot see.

    Raises:
        TraceError: The forward fails.
    """
    facts = Facts(model, host or Host())
    for training in (True, False):
        _run(facts, model, example, training=training)
    _lock_declared(facts)
    _lock_around_untraced(facts)
    return assemble(facts, imgsz_px=int(example.shape[-1]))


def _run(facts: Facts, model: nn.Module, example: Tensor, *, training: bool) -> None:
    """Run one forward and lock what leaves the model."""
    facts.costing = not training  # MACs are those of inference
    try:
        result = forward_unchanged(model, example, training=training, modes=(facts.tracker, LabelTracer(facts)))
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"the model's forward failed on an input of shape {tuple(example.shape)}: {error}",
            expected="a model that runs on the CPU with such an input",
            remedy="run the model by itself first and mend its forward",
        ) from error
    for leaf in output_tensors(facts.host.outputs(result)):
        label = facts.label(leaf)
        if label is not None:
            facts.lock(label, "reaches the model's output")


def output_tensors(result: Any) -> list[Tensor]:
    """Return the tensors of what a forward returned.

    Raises:
        TraceError: It holds an object that cannot be looked into, which might hide a tensor.
    """
    leaves = tree_leaves(result)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, (Tensor, bool, int, float, str)):
            raise TraceError(
                f"the forward returns a {type(leaf).__name__}, which cannot be looked into",
                expected="tensors in lists, tuples and dictionaries",
                remedy="pass a Host whose `outputs` picks the tensors",
            )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def forward_unchanged(
    model: nn.Module, example: Tensor, *, training: bool, modes: Sequence[AbstractContextManager[Any]] = ()
) -> Any:
    """Run one forward in the structure of training or of inference and leave the model exactly as it was.

    Norm and dropout layers run as in inference either way: the channels are the same, no statistic moves, and two runs
    give the same numbers. Only the forward itself runs under `modes`.
    """
    with _left_untouched(model), torch.no_grad():
        for module in model.modules():
            module.training = training and not isinstance(module, (_NormBase, _DropoutNd))
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return model(example)


def _lock_declared(facts: Facts) -> None:
    """Lock the axes that the host declares."""
    for path, module in facts.modules.items():
        for name, dim, reason in facts.host.locked_axes(module):
            axis = facts.axes.get((f"{path}.{name}" if path else name, dim))
            if axis is not None:
                facts.lock(axis.ids(), reason)


def _lock_around_untraced(facts: Facts) -> None:
    """Lock what may feed a parameter that no forward touched: everything in the nearest module that did run."""
    for name in facts.parameters.keys() - facts.touched:
        prefix = name.rpartition(".")[0]
        while prefix and not any(key.startswith(prefix + ".") for key, _ in facts.axes):
            prefix = prefix.rpartition(".")[0]
        for (key, _), axis in facts.axes.items():
            if not prefix or key.startswith(prefix + "."):
                facts.lock(axis.ids(), f"{name} was never traced")


@contextlib.contextmanager
def _left_untouched(model: nn.Module) -> Iterator[None]:
    """Restore every module attribute and buffer value after a forward (caches, statistics, training flags)."""
    state = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, attributes, buffers in state:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
