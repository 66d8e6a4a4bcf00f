"""What a trace collects, and the small vocabulary in which the operator rules speak.

Entries of parameter axes are named by consecutive ids; companions of activations hold such ids. Facts about ids are
recorded as arrays and solved once, at the end (`channels.assemble`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker
from torch.utils.weak import WeakTensorKeyDictionary

from yolo_prune.channels.graph import AxisKey, IntArray, Role
from yolo_prune.errors import TraceError

NONE = -1
"""Label of a value that belongs to no channel."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What a host knows about its models and labels cannot see. The defaults suit any plain torch model.

    Attributes:
        outputs: Picks, from what the forward returns, what really leaves the model.
        resizes: Whether a module's split sizes follow its weights (its attributes are re-read after surgery), so that
            an explicit split of channels inside it is a tie and not a lock.
        locked_axes: Axes of a module, by (name relative to the module, dim, reason), that must keep their size.
        training_only: Whether a submodule path is dropped or merged before deployment, so that it costs no MACs.
    """

    outputs: Callable[[Any], Any] = lambda result: result
    resizes: Callable[[nn.Module], bool] = lambda _module: False
    locked_axes: Callable[[nn.Module], Sequence[tuple[str, int, str]]] = lambda _module: ()
    training_only: Callable[[str], bool] = lambda _path: False


@dataclass(frozen=True)
class Price:
    """A cost term before the axes have numbers; see `cost.CostTerm`."""

    coef: int
    axes: tuple[AxisKey, ...]
    area_power: int


@dataclass(frozen=True)
class Slices:
    """An axis as the trace names it: ids `start .. start + size - 1`."""

    start: int
    size: int
    role: Role

    def ids(self) -> Tensor:
        """Return the ids of the entries, shape (size,)."""
        return torch.arange(self.start, self.start + self.size)


@dataclass(frozen=True)
class CountTie:
    """Ids of each part of an equal split, and where it happens."""

    parts: tuple[IntArray, ...]
    where: str


class Facts:
    """Facts about one model.

    Args:
        model: The traced model; its tensors are known by their state-dict names.
        host: What the host knows.
    """

    def __init__(self, model: nn.Module, host: Host) -> None:
        self.host = host
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters())
        named = [*self.parameters.items(), *model.named_buffers()]
        self.names = {id(tensor): name for name, tensor in named}
        self.tracker = ModuleTracker()
        self.costing = False
        self.axes: dict[AxisKey, Slices] = {}
        self.id_count = 0
        self.equalities: list[tuple[IntArray, IntArray]] = []
        self.locks: list[tuple[IntArray, str]] = []
        self.ties: list[CountTie] = []
        self.prices: list[Price] = []
        self.norms: dict[str, str] = {}
        self.without_rule: Counter[str] = Counter()
        self.touched: set[str] = set()
        self._owners: dict[int, str] = {}
        self._labels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    # Where we are ---------------------------------------------------------------------------------------------------
    def path(self) -> str:
        """Return the path of the innermost running module; empty in the root."""
        return max(self.tracker.parents, key=len).partition(".")[2]

    def sizes_follow_weights(self) -> bool:
        """Return whether the running module re-reads its split sizes after surgery."""
        return self.host.resizes(self.modules[self.path()])

    def touch(self, tensors: Sequence[Tensor]) -> None:
        """Note which of the model's own tensors an operator used."""
        self.touched.update(self.names[id(tensor)] for tensor in tensors if id(tensor) in self.names)

    def concern(self, tensor: Tensor) -> bool:
        """Return whether a tensor is one of the model's own or carries labels."""
        return id(tensor) in self.names or tensor in self._labels

    # Labels of activations ------------------------------------------------------------------------------------------
    def label(self, tensor: Any) -> Tensor | None:
        """Return the companion of an activation, or of a 1-D parameter used as an operand; None if it has none."""
        if not isinstance(tensor, Tensor):
            return None
        known: Tensor | None = self._labels.get(tensor)
        if known is None and tensor.dim() == 1 and id(tensor) in self.names and tensor.is_floating_point():
            known = self.axis(self.names[id(tensor)], 0, len(tensor), Role.PRODUCER)
        return known

    def set_label(self, tensor: Tensor, label: Tensor) -> None:
        """Give an activation its companion, of the same shape."""
        if label.shape != tensor.shape:
            raise TraceError(f"companion of shape {tuple(label.shape)} for a value of shape {tuple(tensor.shape)}")
        self._labels[tensor] = label

    # Facts about slices ---------------------------------------------------------------------------------------------
    def axis(self, name: str, dim: int, size: int, role: Role) -> Tensor:
        """Return the ids of an axis, shape (size,), naming them on first sight."""
        key = (name, dim)
        if key not in self.axes:
            self.axes[key] = Slices(self.id_count, size, role)
            self._owners[self.id_count] = name
            self.id_count += size
        return self.axes[key].ids()

    def owner(self, first_id: int) -> str | None:
        """Return the tensor whose axis starts at an id."""
        return self._owners.get(first_id)

    def equate(self, first: Tensor, second: Tensor) -> None:
        """Record that labels of one shape name the same channels, entry by entry, where both name one."""
        different = (first != second) & (first >= 0) & (second >= 0)
        if different.any():
            pairs = torch.stack([first[different], second[different]]).numpy()
            self.equalities.append((pairs[0], pairs[1]))

    def lock(self, labels: Tensor, reason: str) -> None:
        """Record that the labelled channels must all stay."""
        ids = torch.unique(labels[labels >= 0]).numpy()
        if ids.size:
            self.locks.append((ids, reason))

    def tie(self, parts: Sequence[Tensor], operator: str) -> None:
        """Record that the parts must lose the same number of channels; parts without labels lock the others.

        Args:
            parts: Labels of each part, shape (channels of the part,).
            operator: What needs equal counts.
        """
        where = f"{operator} in {self.path() or 'the model'}"
        if any((part < 0).any() for part in parts):
            for part in parts:
                self.lock(part, f"{where} mixes channels with unlabelled values")
            return
        self.ties.append(CountTie(tuple(part.numpy() for part in parts), where))

    def price(self, coef: int, axes: Sequence[AxisKey], area_power: int) -> None:
        """Record what an operator of the deployed network costs."""
        if self.costing and not self.host.training_only(self.path()):
            self.prices.append(Price(coef, tuple(key for key in axes if key in self.axes), area_power))
