"""Find the channels of a model by running it while PyTorch moves the labels.

Every activation carries a companion int64 tensor of its own shape whose entries name the parameter slice that each
value belongs to (-1: none). Data movement runs the same ATen operator on the companion; other operators have a short
rule each (`channels.rules`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from yolo_prune.channels.assemble import assemble
from yolo_prune.channels.counting import CONVOLUTION, CallCounter, blank_convolution, is_counted, macs_of_call
from yolo_prune.channels.facts import OUTPUT, CountTie, Facts, Host
from yolo_prune.channels.forward import forward_unchanged, output_tensors
from yolo_prune.channels.graph import ChannelGraph
from yolo_prune.channels.python_calls import refuse_reading, watched_calls
from yolo_prune.channels.rules import RULES, without_rule
from yolo_prune.errors import TraceError


@dataclass(frozen=True)
class _Value:
    """A tensor that a forward made.

    Attributes:
        reference: The tensor, not kept alive: what is known of it goes when it goes, since its id may come again.
        number: What made it: (number of the call, place among its results).
        depends: Whether it was computed from the image.
    """

    reference: weakref.ref[Tensor]
    number: Hashable
    depends: bool


class LabelTracer(TorchDispatchMode):
    """Runs each operator, then its rule on the companions of its arguments.

    Values do not matter, so convolutions, which take most of a forward's time and memory, return zeros. A call that an
    earlier forward made alike (the same operator on what the same calls gave) gets the labels that it got then.

    Args:
        facts: What is collected.
        example: The input of this forward.
    """

    def __init__(self, facts: Facts, example: Tensor) -> None:
        super().__init__()
        self.facts = facts
        self._values: dict[int, _Value] = {}
        self._note(example, "the image", depends=True)
        facts.note_image(example)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, torch's default, imports its compiler at the first call: 2 s that nothing here needs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and its rule."""
        kwargs = kwargs or {}
        out = blank_convolution(*args) if func is CONVOLUTION else None
        out = func(*args, **kwargs) if out is None else out
        tensors = _tensors_in((*args, *kwargs.values()))
        sources = [tensor for tensor in tensors if self.depends(tensor)]
        if sources and _shows_values(func) and not _picks_by_number(func, args):
            refuse_reading(self.facts)
        of_image = (
            bool(sources) and all(map(self.facts.is_image, sources)) and not any(map(self.facts.concern, tensors))
        )
        call, results = self._number(func, args, kwargs), _tensors_in((out,))
        if self.facts.costing or not self.facts.recall(call, results):
            self._apply_rule(func, args, kwargs, out, tensors)
            self.facts.remember(call, results)
        for place, value in enumerate(results):
            self._note(value, (call, place), depends=bool(sources))
            if of_image:
                self.facts.note_image(value)
        return out

    def _note(self, value: Tensor, number: Hashable, *, depends: bool) -> None:
        """Know a value until it is gone."""
        identity = id(value)

        def forget(reference: weakref.ref[Tensor]) -> None:
            known = self._values.get(identity)
            if known is not None and known.reference is reference:
                del self._values[identity]
                self.facts.forget_value(identity)

        self._values[identity] = _Value(weakref.ref(value, forget), number, depends)

    def depends(self, tensor: Tensor) -> bool:
        """Return whether a value was computed from the image."""
        value = self._values.get(id(tensor))
        return value is not None and value.depends

    def _apply_rule(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: Sequence[Tensor]) -> None:
        """Collect what an operator says about channels, and what it costs."""
        prices = len(self.facts.prices)
        if any(self.facts.concern(tensor) for tensor in tensors):
            RULES.get(func.overloadpacket, without_rule)(self.facts, func, args, kwargs, out)
            self.facts.note_use(tensors, str(func.overloadpacket))
        if not self.facts.costing or not is_counted(func):
            return
        if len(self.facts.prices) > prices and self.facts.prices[-1].area_power is not None:
            self.facts.calls.append(0)  # nobody will ask how it grows
            return
        macs = macs_of_call(func, args, out)
        if len(self.facts.prices) == prices:  # no rule priced it: it keeps its size
            self.facts.price(macs, (), None)
        self.facts.calls.append(macs)

    def _number(self, func: Any, args: Any, kwargs: Any) -> int:
        """Return the number of a call; equal calls on equal values have one number."""
        try:
            named = (tuple(kwargs), self._signed(kwargs.values())) if kwargs else ()
            return self.facts.number((func, self._signed(args), named))
        except (KeyError, TypeError):  # a tensor that no call made, or what has no hash: equal to no other
            return self.facts.number(object())

    def _signed(self, arguments: Iterable[Any]) -> Hashable:
        """Return arguments as something that is equal where they are; True, 1 and 1.0 are not."""
        signed: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                name = self.facts.names.get(id(argument))
                signed.append(self._values[id(argument)].number if name is None else name)
            elif not isinstance(argument, (list, tuple)):
                signed += (type(argument), argument)
            elif argument and type(argument[0]) is int:  # strides, paddings: ATen's lists hold one type each
                signed.append(tuple(argument))
            else:
                signed.append(self._signed(argument))
        return tuple(signed)


_SHOWS_VALUES = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))


@functools.cache
def _shows_values(func: Any) -> bool:
    """Return whether what an operator gives to Python, if only by its shape, can depend on values."""
    return not _SHOWS_VALUES.isdisjoint(func.tags)


def _picks_by_number(func: Any, args: Sequence[Any]) -> bool:
    """Return whether an operator is an index without masks: how many it picks does not depend on values."""
    return func.overloadpacket is torch.ops.aten.index and not any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors of an operator's arguments: it takes lists at most (torch's tree walk is ten times slower)."""
    found: list[Tensor] = []
    for value in values:
        kind = type(value)
        if kind is list or kind is tuple:
            found += () if value and type(value[0]) is int else _tensors_in(value)
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def trace(model: nn.Module, example: Tensor, *, host: Host | None = None) -> ChannelGraph:
    """Trace a model and return its channel graph.

    The forward runs twice, as in training and as in inference, because twin heads run different branches there.

    Args:
        model: A torch model on the CPU; it is left bit-identical.
        example: An input of shape (1, channels, side, side).
        host: What labels alone cannot see.

    Raises:
        TraceError: The forward fails, or depends on what the image shows; or the example is no such input.
    """
    facts = Facts(model, host or Host())
    example = _fitting(facts, example)
    with _garbage_left_alone():
        for training in (False, True):
            _run(facts, model, example, training=training)
        facts.forget_calls()
        _tie_declared(facts)
        _lock_misused(facts)
        _lock_around_untraced(facts)
        powers = _area_powers(facts, model, example)
        return assemble(facts, image_shape=tuple(example.shape), powers=powers)


@contextlib.contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """Pause the search for reference cycles: a trace makes many objects that stay, and the search took a quarter."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _fitting(facts: Facts, example: Tensor) -> Tensor:
    """Return the example in the model's own floating type.

    Raises:
        TraceError: The example is no single square image, or parts of the model cannot be run and cut here.
    """
    if example.dim() != 4 or len(example) != 1 or example.shape[2] != example.shape[3]:
        raise TraceError(
            f"an example of shape {tuple(example.shape)}", expected="one square image, (1, channels, side, side)"
        )
    for path, module in facts.modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"'{path or 'the model'}' is compiled by TorchScript",
                expected="modules whose weights can be replaced",
                remedy="prune the model that it was compiled from",
            )
    tensors = facts.parameters | facts.buffers
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise TraceError(
                f"'{name}' lives on device '{tensor.device}'",
                expected="a model on the CPU",
                remedy="move it with model.cpu(), or load it with map_location='cpu'",
            )
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), example.dtype)
    return example.to(dtype)


def _run(facts: Facts, model: nn.Module, example: Tensor, *, training: bool) -> None:
    """Run one forward and lock what leaves the model."""
    facts.costing = not training  # MACs are those of inference
    facts.image, facts.fixed_planes = tuple(example.shape[2:]), False
    tracer = LabelTracer(facts, example)
    modes = (facts.running, tracer, watched_calls(facts, tracer.depends))
    result = _forward(model, example, training=training, modes=modes)
    for leaf in output_tensors(facts.host.outputs(result)):
        label = facts.label(leaf)
        if label is not None:
            facts.lock(label, OUTPUT)


def _forward(model: nn.Module, example: Tensor, *, training: bool, modes: Sequence[AbstractContextManager[Any]]) -> Any:
    """Run one forward and say what input it was that made it fail."""
    try:
        return forward_unchanged(model, example, training=training, modes=modes)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"the model's forward failed on an input of shape {tuple(example.shape)}: {error}",
            expected="a model that runs on the CPU with such an input",
            remedy="run the model by itself first and mend its forward",
        ) from error


GROWTH: Mapping[int, float] = {1: 0, 2: 0.5, 4: 1, 8: 1.5, 16: 2}
"""Powers of the image's area, by what a cost is multiplied by when the side is doubled."""


def _area_powers(facts: Facts, model: nn.Module, example: Tensor) -> dict[int, float]:
    """Measure how calls whose rule cannot know it grow with the image's area: run again at twice the side and compare.

    Returns:
        Power of the area by call.

    Raises:
        TraceError: A cost neither stays nor grows with a power of the side.
    """
    unknown = {price.call: price.place for price in facts.prices if price.area_power is None}
    if not unknown:
        return {}
    counter = CallCounter(only=unknown)
    larger = example.new_zeros(*example.shape[:2], 2 * example.shape[2], 2 * example.shape[3])
    _forward(model, larger, training=False, modes=(counter,))
    powers: dict[int, float] = {}
    for call, place in unknown.items():
        before, after = facts.calls[call], counter.macs[call] if len(counter.macs) == len(facts.calls) else 0
        growth = after / before if before else float(after == before)
        if growth not in GROWTH:
            raise TraceError(
                f"a call in {place} costs {before} MACs at {example.shape[-1]} px and {after} at twice that",
                expected="a cost that stays, or grows with the image's side to a power of 1 to 4",
                remedy="pass a larger example image; planes that are not padded to stay in step with it have no law",
            )
        powers[call] = GROWTH[int(growth)]
    return powers


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
    for name in sorted(facts.parameters.keys() - facts.touched):  # the order of a set is another in every process
        if facts.host.apart(name.rpartition(".")[0]):
            continue
        prefix = name.rpartition(".")[0]
        while prefix and not any(key.startswith(prefix + ".") for key, _ in facts.axes):
            prefix = prefix.rpartition(".")[0]
        for (key, _), axis in facts.axes.items():
            if not prefix or key.startswith(prefix + "."):
                facts.lock(axis.ids(), f"{name} was never traced")
