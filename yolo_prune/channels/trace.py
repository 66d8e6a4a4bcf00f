"""Find the channels of a model by running it while PyTorch moves the labels.

Every activation carries a companion int64 tensor of its own shape whose entries name the parameter slice that each
value belongs to (-1: none). Data movement runs the same ATen operator on the companion; other operators have a short
rule each (`channels.rules`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from yolo_prune.channels.assemble import assemble
from yolo_prune.channels.facts import OUTPUT, CountTie, Facts, Host
from yolo_prune.channels.graph import ChannelGraph
from yolo_prune.channels.rules import RULES, without_rule
from yolo_prune.errors import TraceError


class LabelTracer(TorchDispatchMode):
    """Runs each operator, then its rule on the companions of its arguments."""

    def __init__(self, facts: Facts, example: Tensor) -> None:
        super().__init__()
        self.facts = facts
        # What was computed from the image, by id; the values are held so that no two share one.
        self._depends: dict[int, Tensor] = {id(example): example}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and its rule."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = list(_tensors_in((*args, *kwargs.values())))
        self._refuse_reading_values(func, tensors)
        prices = len(self.facts.prices)
        if any(self.facts.concern(tensor) for tensor in tensors):
            RULES.get(func.overloadpacket, without_rule)(self.facts, func, args, kwargs, out)
            self.facts.note_use(tensors, str(func.overloadpacket))
        macs = macs_of_call(func, args, kwargs, out)
        if macs is not None:
            if len(self.facts.prices) == prices:  # no rule priced it: it keeps its size
                self.facts.price(macs, (), None)
            self.facts.calls += self.facts.costing
        if any(id(tensor) in self._depends for tensor in tensors):
            self._depends.update((id(value), value) for value in _tensors_in((out,)))
        return out

    def _refuse_reading_values(self, func: Any, tensors: Sequence[Tensor]) -> None:
        """Refuse a forward whose path may depend on what the image shows: another image might run other layers."""
        if func.overloadpacket is torch.ops.aten._local_scalar_dense and id(tensors[0]) in self._depends:
            raise TraceError(
                f"the forward of {self.facts.place()} reads a value of an activation into Python",
                expected="a forward that runs the same operators for every image",
                remedy="replace Tensor.item(), float(tensor) and `if tensor:` by tensor operators",
            )


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors of an operator's arguments: it takes lists at most (torch's tree walk is ten times slower)."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


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
    example = _fitting(model, example)
    facts = Facts(model, host or Host())
    for training in (True, False):
        _run(facts, model, example, training=training)
    _tie_declared(facts)
    _lock_misused(facts)
    _lock_around_untraced(facts)
    powers = _area_powers(facts, model, example)
    return assemble(facts, imgsz_px=int(example.shape[-1]), powers=powers)


def _fitting(model: nn.Module, example: Tensor) -> Tensor:
    """Return the example in the model's own floating type.

    Raises:
        TraceError: Parts of the model are not in this process's main memory.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise TraceError(
                f"'{name}' lives on device '{tensor.device}'",
                expected="a model on the CPU",
                remedy="move it with model.cpu(), or load it with map_location='cpu'",
            )
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), example.dtype)
    return example.to(dtype)


def _run(facts: Facts, model: nn.Module, example: Tensor, *, training: bool) -> None:
    """Run one forward and lock what leaves the model."""
    facts.costing = not training  # MACs are those of inference
    tracer = LabelTracer(facts, example)
    try:
        result = forward_unchanged(model, example, training=training, modes=(facts.tracker, tracer))
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
            facts.lock(label, OUTPUT)
    facts.forget_activations()


def _area_powers(facts: Facts, model: nn.Module, example: Tensor) -> dict[int, int]:
    """Measure how calls whose rule cannot know it grow with the image's area: run again at twice the side and compare.

    Returns:
        Power of the area by call.

    Raises:
        TraceError: A cost neither stays nor grows with the area or its square.
    """
    unknown = [price.call for price in facts.prices if price.area_power is None]
    if not unknown:
        return {}
    at_side, doubled = CallCounter(), CallCounter()
    forward_unchanged(model, example, training=False, modes=(at_side,))
    larger = example.new_zeros(*example.shape[:2], 2 * example.shape[2], 2 * example.shape[3])
    forward_unchanged(model, larger, training=False, modes=(doubled,))
    powers = {}
    for call in unknown:
        before, after = at_side.macs[call], doubled.macs[call] if len(doubled.macs) == len(at_side.macs) else 0
        if after not in (before, 4 * before, 16 * before):
            raise TraceError(
                f"a product costs {before} MACs at {example.shape[-1]} px and {after} at twice that",
                expected="a cost that stays, or grows with the image's area or its square",
                remedy="pass a larger example image",
            )
        powers[call] = {1: 0, 4: 1, 16: 2}[after // before] if before else 0
    return powers


class CallCounter(TorchDispatchMode):
    """Notes the MACs of every call that torch's own counter knows, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and note its cost."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        macs = macs_of_call(func, args, kwargs, out)
        if macs is not None:
            self.macs.append(macs)
        return out


def macs_of_call(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return the multiply-adds of an operator as torch's own counter knows them; None if it does not count it."""
    formula = flop_registry.get(func.overloadpacket)
    return None if formula is None else int(formula(*args, **kwargs, out_val=out)) // 2


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


def _tie_declared(facts: Facts) -> None:
    """Note what the host declares: ties and rescaled values that hide in Python."""
    for path, module in facts.modules.items():
        prefix = f"{path}." if path else ""
        for tied in facts.host.ties(module):
            axes = [facts.axes.get((prefix + name, dim)) for name, dim in tied]
            parts = tuple(axis.ids().numpy() for axis in axes if axis is not None)
            facts.ties.append(CountTie(parts, f"{type(module).__name__}'s width in {path or 'the model'}"))
        for names, entries in facts.host.rescaled(module):
            keys = tuple((prefix + name, 0) for name in names if (prefix + name, 0) in facts.axes)
            facts.rescales.append((keys, np.asarray(entries, dtype=np.int64)))


def _lock_misused(facts: Facts) -> None:
    """Lock the axes of weights that something else than their layer used as well."""
    for name, reason in facts.misused.items():
        for (key, _), axis in facts.axes.items():
            if key == name:
                facts.lock(axis.ids(), f"its weight {reason}")


def _lock_around_untraced(facts: Facts) -> None:
    """Lock what may feed a parameter that no forward touched: everything in the nearest module that did run."""
    for name in facts.parameters.keys() - facts.touched:
        if facts.host.apart(name.rpartition(".")[0]):
            continue
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
