"""What a trace collects, and the small vocabulary in which the operator rules speak.

Entries of parameter axes are named by consecutive ids; companions of activations hold such ids. Facts about ids are
recorded as arrays and solved once, at the end (`channels.assemble`). Longer than the files of this house are: it is one
object, whose parts share its state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from yolo_prune.channels.graph import AxisKey, IntArray, Role
from yolo_prune.channels.labels import IDS, ids, spread
from yolo_prune.channels.running import RunningModule
from yolo_prune.channels.tensors import parameters_and_buffers
from yolo_prune.errors import TraceError

OUTPUT = "reaches the model's output"
"""Why channels that leave the model are locked."""

IMAGE = "reads the image"
"""Why the input channels of the first layers are locked."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What a host knows about its models and labels cannot see. The defaults suit any plain torch model.

    Attributes:
        outputs: Picks, from what the forward returns, what really leaves the model.
        resizes: Whether a module's sizes follow its weights (its attributes are re-read after surgery), so that an
            explicit split or view of channels inside it is a tie and not a lock.
        loses_rows: Whether a module that `resizes` also re-reads its number of rows of channels (attention's heads), so
            that whole rows may go.
        ties: Axes of a module, (name relative to the module, dim), that must lose the same number of entries.
        rescaled: Entries of a module's vectors, by (names relative to the module, entries), whose values grow by the
            square root of the kept share, because the forward divides by the root of their number.
        training_only: Whether a submodule path is dropped or merged before deployment, so that it costs no MACs.
        apart: Whether a submodule path, if no forward runs it, is known to read no channel of the network.
        areal: Whether a submodule path works on rows of all cells of several maps: their number grows with the image's
            area, which such a row does not show.
    """

    outputs: Callable[[Any], Any] = lambda result: result
    resizes: Callable[[nn.Module], bool] = lambda _module: False
    loses_rows: Callable[[nn.Module], bool] = lambda _module: False
    ties: Callable[[nn.Module], Sequence[Sequence[tuple[str, int]]]] = lambda _module: ()
    rescaled: Callable[[nn.Module], Sequence[tuple[Sequence[str], Sequence[int]]]] = lambda _module: ()
    training_only: Callable[[str], bool] = lambda _path: False
    apart: Callable[[str], bool] = lambda _path: False
    areal: Callable[[str], bool] = lambda _path: False


@dataclass(frozen=True)
class Price:
    """A cost term before the axes have numbers; see `cost.CostTerm`.

    Attributes:
        coef: MACs per pair of entries.
        sizes: Axes, or ids of the entries that are counted.
        area_power: Growth with the image's area; None where only a second run can tell.
        call: Which call of a priced operator this was.
        place: The module that made it.
    """

    coef: int
    sizes: tuple[AxisKey | IntArray, ...]
    area_power: int | None
    call: int
    place: str


@dataclass(frozen=True)
class Slices:
    """An axis as the trace names it: ids `start .. start + size - 1`; see `graph.Axis` for `groups`."""

    start: int
    size: int
    role: Role
    groups: int = 1

    def ids(self) -> Tensor:
        """Return the ids of the entries, shape (size,)."""
        return torch.arange(self.start, self.start + self.size)


@dataclass(frozen=True)
class CountTie:
    """Ids of each part that must lose the same number of entries, and where.

    Attributes:
        parts: Ids of each part; an id may stand in several, or more than once in one.
        where: Operator and module.
        rows: Number of rows of the rectangle whose rows the parts are (see `graph.Tie`); 0 if they are none.
        blocks: Number of groups of the convolution whose groups the parts are; 0 if they are none.
    """

    parts: tuple[IntArray, ...]
    where: str
    rows: int = 0
    blocks: int = 0


class Facts:
    """Facts about one model.

    Args:
        model: The traced model; its tensors are known by their state-dict names.
        host: What the host knows.
    """

    def __init__(self, model: nn.Module, host: Host) -> None:
        self.host = host
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters, self.buffers = parameters_and_buffers(model)
        self.names = {id(tensor): name for name, tensor in (self.parameters | self.buffers).items()}
        self.running = RunningModule(self.modules)
        self.costing = False
        self.image: tuple[int, ...] = ()  # height and width of the traced one
        self.fixed_planes = False  # whether some plane has a size that the image does not decide
        self.written_split = False  # whether the running split has a size that is written in Python
        self.calls: list[int] = []  # MACs of each priced call of inference
        self.axes: dict[AxisKey, Slices] = {}
        self.id_count = 0
        self.equalities: list[tuple[IntArray, IntArray]] = []
        self.locks: list[tuple[IntArray, str]] = []
        self.ties: list[CountTie] = []
        self.rescales: list[tuple[tuple[AxisKey, ...], IntArray]] = []
        self.prices: list[Price] = []
        self.norms: dict[str, str] = {}
        self.without_rule: dict[str, list[IntArray]] = defaultdict(list)
        self.touched: set[str] = set()
        self.misused: dict[str, str] = {}
        self.read_as_weights: set[str] = set()
        self._rows: set[bytes] = set()
        self._owners: dict[int, str] = {}
        self._labels: dict[int, Tensor] = {}
        self._views: dict[int, str] = {}
        self._planes: dict[int, tuple[Tensor, Tensor]] = {}
        self._images: set[int] = set()
        self._calls: dict[Hashable, int] = {}
        self._known_of_calls: dict[int, list[tuple[Tensor | None, str | None]]] = {}

    # Where we are ---------------------------------------------------------------------------------------------------
    def path(self) -> str:
        """Return the path of the innermost running module; empty in the root."""
        return self.running.path

    def place(self) -> str:
        """Return the same for a reader."""
        return self.path() or "the model"

    def sizes_follow_weights(self) -> bool:
        """Return whether the running module re-reads its sizes after surgery."""
        return self.host.resizes(self.modules[self.path()])

    def rows_may_go(self) -> bool:
        """Return whether whole rows of channels may leave the running module."""
        return self.host.loses_rows(self.modules[self.path()])

    def concern(self, tensor: Tensor) -> bool:
        """Return whether a tensor is one of the model's own, a view of one, or carries labels."""
        return id(tensor) in self.names or id(tensor) in self._labels or id(tensor) in self._views

    def note_image(self, value: Tensor) -> None:
        """Note that a value is the image, or was made of it without anything of the model's own."""
        self._images.add(id(value))

    def is_image(self, value: Tensor) -> bool:
        """Return whether a value is the image, scaled or cut up perhaps, before any layer."""
        return id(value) in self._images

    def forget_value(self, identity: int) -> None:
        """Let go of what is known of a value that is gone: another one may get its id."""
        self._labels.pop(identity, None)
        self._views.pop(identity, None)
        self._images.discard(identity)

    def forget_calls(self) -> None:
        """Let go of what only another forward could use; the solution of the facts needs as much memory."""
        self._calls.clear()
        self._known_of_calls.clear()
        self._planes.clear()

    # The model's own tensors ----------------------------------------------------------------------------------------
    def note_use(self, tensors: Sequence[Tensor], operator: str) -> None:
        """Note which of the model's own tensors an operator used, after its rule ran.

        A weight that no rule read as a weight may not change: whatever happened to it depends on its size.
        """
        for tensor in tensors:
            name = self.names.get(id(tensor)) or self.view_of(tensor)
            if name is None:
                continue
            self.touched.add(name)
            if name in self.parameters and _is_weight(self.parameters[name]) and name not in self.read_as_weights:
                self.misused.setdefault(name, f"is also used by {operator} in {self.place()}")
        self.read_as_weights.clear()

    def weight(self, tensor: Tensor) -> str | None:
        """Return the name of a parameter that the running rule reads as a weight."""
        name = self.names.get(id(tensor))
        if name is not None:
            self.read_as_weights.add(name)
        return name

    def transposed_weight(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter of which a tensor is the transpose, read as a weight."""
        name = self.view_of(tensor)
        if name is not None:
            self.read_as_weights.add(name)
        return name

    def view_of(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter of which a tensor is the transpose."""
        return self._views.get(id(tensor))

    def is_matrix(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a matrix of the model: the weight of a linear layer, of one feature perhaps."""
        return tensor.dim() == 2 and id(tensor) in self.names

    def set_transposed(self, tensor: Tensor, parameter: Tensor) -> None:
        """Note that a tensor is the transpose of a matrix of the model."""
        name = self.weight(parameter)
        if name is not None:
            self._views[id(tensor)] = name

    # Labels of activations ------------------------------------------------------------------------------------------
    def label(self, tensor: Any) -> Tensor | None:
        """Return the companion of an activation, or of a vector of the model used as an operand; None if it has none.

        A vector is a parameter with one dimension of more than one entry, such as a shape of (1, C, 1, 1).
        """
        if not isinstance(tensor, Tensor):
            return None
        known = self._labels.get(id(tensor))
        name = self.names.get(id(tensor)) if known is None and tensor.is_floating_point() else None
        dim = _vector_dim(tensor) if name is not None else None
        if name is None or dim is None:
            return known
        return self.axis(name, dim, tensor.shape[dim], Role.PRODUCER).ids().view(tensor.shape)

    def set_label(self, tensor: Tensor, label: Tensor) -> None:
        """Give an activation its companion, of the same shape."""
        if label.shape != tensor.shape:
            raise TraceError(f"companion of shape {tuple(label.shape)} for a value of shape {tuple(tensor.shape)}")
        self._labels[id(tensor)] = label

    def set_planes(self, tensor: Tensor, channels: Tensor) -> None:
        """Give an activation one label a plane, from labels of shape (C,) along dim 1."""
        label = spread(channels, tensor)
        self._planes[id(label)] = (label, channels)
        self.set_label(tensor, label)

    def planes(self, label: Tensor) -> Tensor | None:
        """Return the labels along dim 1, shape (C,), of a companion that is known to have one label a plane."""
        known = self._planes.get(id(label))
        return None if known is None else known[1]

    def number(self, signature: Hashable) -> int:
        """Return the number of a call: the same for the same operator on what the same calls gave."""
        return self._calls.setdefault(signature, len(self._calls))

    def remember(self, call: int, results: Sequence[Tensor]) -> None:
        """Keep what is known of a call's results: labels, and of what weight they are the transpose."""
        self._known_of_calls[call] = [(self._labels.get(id(value)), self.view_of(value)) for value in results]

    def recall(self, call: int, results: Sequence[Tensor]) -> bool:
        """Let a call's results be known as an equal call's are; return whether there was one."""
        known = self._known_of_calls.get(call)
        if known is None:
            return False
        for value, (label, weight) in zip(results, known, strict=True):
            if label is not None:
                self.set_label(value, label)
            if weight is not None:
                self._views[id(value)] = weight
        return True

    # Facts about slices ---------------------------------------------------------------------------------------------
    def axis(self, name: str, dim: int, size: int, role: Role, *, groups: int = 1) -> Slices:
        """Return an axis, naming its entries on first sight.

        Args:
            name: The tensor's.
            dim: Its dimension.
            size: Its entries.
            role: What it does to channels.
            groups: Of a grouped convolution, which cuts an axis of inputs into as many.

        One that produces channels here and reads some there can lose none: masking knows one of the two.
        """
        key = (name, dim)
        if key not in self.axes:
            self.axes[key] = Slices(self.id_count, size, role, groups)
            self._owners[self.id_count] = name
            self.id_count += size
        known = self.axes[key]
        if known.role is not role:
            self.lock(known.ids(), f"reads channels and produces some, as {self.place()} uses {name}")
        return known

    def owner(self, first_id: int) -> str | None:
        """Return the tensor whose axis starts at an id."""
        return self._owners.get(first_id)

    def equate(self, first: Tensor, second: Tensor) -> None:
        """Record that labels of one shape name the same channels, entry by entry, where both name one."""
        planes = self.planes(first), self.planes(second)
        if planes[0] is not None and planes[1] is not None and first.shape == second.shape:
            first, second = planes  # type: ignore[assignment]  # a plane says once what its entries would repeat
        one, other = first.numpy(), second.numpy()
        named = (one >= 0) & (other >= 0)
        if named.all():
            self.equalities.append((one.ravel() & IDS, other.ravel() & IDS))
        elif named.any():
            self.equalities.append((one[named] & IDS, other[named] & IDS))

    def equate_axes(self, axes: Iterable[Slices], labels: Tensor, otherwise: str) -> None:
        """Record which channels the entries of axes of one size belong to; those without one are locked.

        Args:
            axes: The axes.
            labels: Shape (size of each axis,).
            otherwise: Why entries without a channel are locked.
        """
        channels = labels.numpy()
        named = channels >= 0
        all_named = named.all()
        channels = (channels if all_named else channels[named]) & IDS
        for axis in axes:
            entries = np.arange(axis.start, axis.start + axis.size)
            self.equalities.append((entries if all_named else entries[named], channels))
            if not all_named:
                self.locks.append((entries[~named], otherwise))

    def lock(self, labels: Tensor, reason: str) -> None:
        """Record that the labelled channels must all stay."""
        if labels.numel():
            channels = np.unique(labels.numpy())
            self.locks.append((channels[channels >= 0] & IDS, reason))

    def lock_without_rule(self, labels: Sequence[Tensor], operator: str) -> None:
        """Record a call of an operator without a rule, and that the labelled channels it touches must all stay."""
        self.without_rule[operator].append(np.concatenate([ids(label).flatten().numpy() for label in labels]))
        for label in labels:
            self.lock(label, f"enters {operator} in {self.place()}")

    def tie(self, parts: Sequence[Tensor], operator: str, *, rows: int = 0, blocks: int = 0) -> None:
        """Record that the parts must lose the same number of entries; parts without labels lock the others.

        Args:
            parts: Labels of each part, shape (entries of the part,).
            operator: What needs equal counts.
            rows: See `CountTie`.
            blocks: See `CountTie`.
        """
        where = f"{operator} in {self.place()}"
        if any((part < 0).any() for part in parts):
            for part in parts:
                self.lock(part, f"{where} mixes channels with unlabelled values")
            return
        self.ties.append(CountTie(tuple(part.numpy() & IDS for part in parts), where, rows, blocks))

    def note_rows(self, rows: Iterable[Tensor]) -> None:
        """Remember rows of channels, ids in order, shape (entries,) each, that lie side by side in a tensor."""
        self._rows |= {ids(row).numpy().tobytes() for row in rows}

    def are_rows(self, rectangle: Tensor) -> bool:
        """Return whether each line of labels, shape (lines, entries), is a known row."""
        return all(ids(line.contiguous()).numpy().tobytes() in self._rows for line in rectangle)

    def price(self, coef: int, sizes: Sequence[AxisKey | Tensor], area_power: int | None) -> None:
        """Record what an operator of the deployed network costs.

        Args:
            coef: MACs per pair of entries of `sizes`.
            sizes: Axes of parameters (those that carry no channel are left out), or labels, alone, whose entries are
                counted.
            area_power: How the cost grows with the image's area; None to have it measured.
        """
        if self.costing and not self.host.training_only(self.path()):
            counted: list[AxisKey | IntArray] = []
            for size in sizes:
                if isinstance(size, Tensor):
                    entries = ids(size.flatten()).numpy()
                    unlabelled = int((entries < 0).sum())
                    if unlabelled:  # they stay, whatever goes
                        self.prices.append(Price(coef * unlabelled, (), area_power, len(self.calls), self.place()))
                    counted.append(entries[entries >= 0])
                elif size in self.axes:
                    counted.append(size)
            self.prices.append(Price(coef, tuple(counted), area_power, len(self.calls), self.place()))


def _vector_dim(tensor: Tensor) -> int | None:
    """Return the only dimension with more than one entry; that of a 1-D tensor in any case."""
    if tensor.dim() == 1:
        return 0
    long = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    return long[0] if len(long) == 1 else None


def _is_weight(parameter: Tensor) -> bool:
    """Return whether a parameter has filters, so that one of its axes reads other channels than the other produces."""
    return _vector_dim(parameter) is None and parameter.numel() > 1
