"""Records of channel groups, which the table, the JSON and the picture of `inspect` show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Member:
    """One axis that removing a channel cuts.

    Attributes:
        tensor: State-dict name of a parameter or buffer.
        dim: Its dimension.
        entries_per_channel: How many entries of the dimension one channel takes.
    """

    tensor: str
    dim: int
    entries_per_channel: int


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One channel group.

    Attributes:
        name: The group's name.
        width: Its channels.
        members: The axes that a channel of it cuts.
        lock: Why it cannot be cut; empty if it can.
        ties: Where it needs the same count as another group.
        macs_per_channel: MACs that removing one channel frees.
        params_per_channel: Parameters that removing one channel frees.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    lock: str
    ties: tuple[str, ...]
    macs_per_channel: int
    params_per_channel: int

    @property
    def state(self) -> str:
        """Whether it may be cut: `locked`, `tied` or `free`."""
        return "locked" if self.lock else "tied" if self.ties else "free"

    def tensors(self) -> list[str]:
        """Return the tensors that a channel cuts, each once."""
        return list(dict.fromkeys(member.tensor for member in self.members))

    def layers(self) -> list[str]:
        """Return the module paths of these tensors, each once; a tensor of the model itself stands for itself."""
        return list(dict.fromkeys(name.rpartition(".")[0] or name for name in self.tensors()))


def shortened(names: Sequence[str], *, at_most: int) -> str:
    """Return the first names, and how many more there are: `a, b +3`."""
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" +{more}" if more > 0 else "")
