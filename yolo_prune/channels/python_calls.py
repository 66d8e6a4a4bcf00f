"""What a forward asks of torch in Python and its operators no longer show: values to look at, written sizes, scales."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor
from torch.nn import functional

from yolo_prune.channels.facts import Facts
from yolo_prune.errors import TraceError


@contextlib.contextmanager
def watched_calls(facts: Facts, depends: Callable[[Tensor], bool]) -> Iterator[None]:
    """Note, while the block runs, some calls before they become operators.

    Functions of torch are replaced meanwhile by ones that do the same. torch's own way, a TorchFunctionMode, is asked
    about every call there is, which took a tenth of the time of a trace.

    Args:
        facts: What is collected.
        depends: Whether a value was computed from the image.

    Raises:
        TraceError: The values of an activation are handed out, past every operator.
    """

    def reading(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if depends(self):
                refuse_reading(facts)
            return call(self, *args, **kwargs)

        return read

    def splitting(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def split(self: Tensor, split_size: int | list[int], dim: int = 0) -> Any:
            facts.written_split = isinstance(split_size, int)
            try:
                return call(self, split_size, dim)
            finally:
                facts.written_split = False

        return split

    def attending(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def attend(query: Tensor, key: Tensor, *args: Any, scale: float | None = None, **kwargs: Any) -> Any:
            for operand in (query, key) if scale is None else ():
                label = facts.label(operand)
                if label is not None:  # it divides by the root of the width of its queries, which so has to stay
                    facts.lock(label, f"is scaled by its own width in {facts.place()}")
            return call(query, key, *args, scale=scale, **kwargs)

        return attend

    with contextlib.ExitStack() as replaced:
        # Tensor.__array__ and Tensor.storage come by these.
        for name in ("numpy", "tolist", "untyped_storage"):
            _replace(replaced, Tensor, name, reading)
        _replace(replaced, Tensor, "split", splitting)  # torch.split comes by it
        _replace(replaced, functional, "scaled_dot_product_attention", attending)
        yield


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, by: Callable[[Any], Any]) -> None:
    """Replace an attribute until a stack is left; one that is inherited is then inherited again."""
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, by(getattr(owner, name)))


def refuse_reading(facts: Facts) -> None:
    """Refuse a forward whose path may depend on what the image shows: another image might run other layers.

    Raises:
        TraceError: Always.
    """
    raise TraceError(
        f"the forward of {facts.place()} reads a value of an activation into Python",
        expected="a forward that runs the same operators for every image",
        remedy="replace Tensor.item(), float(tensor), `if tensor:`, numpy() and nonzero() by tensor operators such as "
        "torch.where(condition, this, that)",
    )
