"""One forward of somebody's model, which is left exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from yolo_prune.errors import TraceError


def forward_unchanged(
    model: nn.Module, example: Tensor, *, training: bool, modes: Sequence[AbstractContextManager[Any]] = ()
) -> Any:
    """Run one forward in the structure of training or of inference and leave the model exactly as it was.

    Norm and dropout layers run as in inference either way: the channels are the same, no statistic moves, and two runs
    give the same numbers. What a forward draws at random, as drop path does, is the same in every run. Only the forward
    itself runs under `modes`.

    Args:
        model: The model.
        example: Image of shape (B, C, H, W).
        training: Which structure: some blocks run others in training.
        modes: Dispatch or function modes of torch, the outermost first.

    Returns:
        What the model returns.
    """
    modules = list(model.modules())
    with _left_untouched(modules), same_random_numbers(), torch.inference_mode(False), torch.no_grad():
        for module in modules:  # past torch's own setter, which looks for parameters first
            vars(module)["training"] = training and not isinstance(module, (_NormBase, _DropoutNd))
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return model(example)


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Let a block draw the same random numbers whenever it runs, and its caller those that it would have drawn."""
    with torch.random.fork_rng(devices=[]):  # of the CPU: nothing else runs here
        torch.default_generator.manual_seed(0)
        yield


@contextlib.contextmanager
def _left_untouched(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore every module attribute and buffer value after a forward (caches, statistics, training flags)."""
    state = [(module, dict(module.__dict__), dict(module._buffers)) for module in modules]
    buffers = {id(buffer): buffer for _, _, own in state for buffer in own.values() if buffer is not None}
    values = [(buffer, buffer.clone()) for buffer in buffers.values()]
    try:
        yield
    finally:
        for module, attributes, own in state:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


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
