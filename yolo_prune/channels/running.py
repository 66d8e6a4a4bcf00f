"""Which module is running: a stack kept by hooks on every module's forward.

torch's own ModuleTracker also follows the backward pass, for which it walks all arguments of every call; it took an
eighth of the time of a trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class RunningModule:
    """Knows, while it is entered as a context, the innermost running module.

    Args:
        modules: The modules by path; one that is registered under two paths goes by the last.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._paths = {id(module): path for path, module in modules.items()}
        self._stack: list[str] = []

    @property
    def path(self) -> str:
        """Path of the innermost running module; empty in the root."""
        return self._stack[-1] if self._stack else ""

    def __enter__(self) -> None:
        """Start to follow."""
        self._handles = (
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Stop to follow."""
        for handle in self._handles:
            handle.remove()
        self._stack.clear()

    def _begin(self, module: nn.Module, _inputs: Any) -> None:
        self._stack.append(self._paths.get(id(module), self.path))  # a module made on the way belongs to its caller

    def _end(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._stack.pop()
