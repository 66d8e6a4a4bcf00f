"""What a user may say of ResRep."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from yolo_prune.allocation import Constraints
from yolo_prune.allocation.budget import require_ratio
from yolo_prune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ResRepOptions:
    """How a network is made to forget.

    Attributes:
        target: Fraction of the MACs that is left in the end.
        strength: Weight of the group lasso, the paper's lambda; None chooses it.
        momentum: Momentum of the compactors; None chooses it.
        interval: Optimizer steps between new masks, until they settle.
        constraints: Floors and multiples.

    Raises:
        ConfigError: A number that is out of range.
    """

    target: float
    strength: float | None = None
    momentum: float | None = None
    interval: int = 10
    constraints: Constraints = field(default_factory=Constraints)

    def __post_init__(self) -> None:
        require_ratio("macs", self.target)
        if self.strength is not None and not 0.0 < self.strength < math.inf:
            raise ConfigError(f"resrep.strength={self.strength:g}", expected="a number above 0, such as 1e-4, or auto")
        if self.momentum is not None and not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"resrep.momentum={self.momentum:g}", expected="at least 0 and below 1, or auto")
        if self.interval < 1:
            raise ConfigError(f"resrep.interval={self.interval}", expected="1 or more optimizer steps")
