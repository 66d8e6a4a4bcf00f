"""How stripes are pruned: the penalty on skeletons, the threshold, and the target with its schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from yolo_prune.errors import ConfigError
from yolo_prune.methods.stripes.ranking import StripeFloors


@dataclass(frozen=True, kw_only=True)
class StripeOptions:
    """How stripes are pruned.

    Attributes:
        strength: alpha, the penalty on skeletons; None chooses it by how far it moves a skeleton, see `distance`.
        threshold: delta: a stripe dies when its skeleton, one at the start, comes down to it.
        target: Fraction of the start's MACs that is left, counted in living stripes; None leaves it to the threshold.
        floors: What the target does not take.

    Raises:
        ConfigError: A value that is out of range.
    """

    strength: float | None = None
    threshold: float = 0.01
    target: float | None = None
    floors: StripeFloors = field(default_factory=StripeFloors)

    def __post_init__(self) -> None:
        if self.strength is not None and not 0.0 < self.strength < math.inf:
            raise ConfigError(f"stripes.strength={self.strength:g}", expected="a number above 0, or auto")
        for key, value in (
            ("stripes.threshold", self.threshold), ("target_macs", self.target),
        ):  # fmt: skip
            if value is not None and not 0.0 < value < 1.0:
                raise ConfigError(f"{key}={value:g}", expected="a number above 0 and below 1")

    def distance(self) -> float:
        """Return how far a skeleton that the loss does not hold back comes down, from 1, in the time for it.

        Without a target it dies. With one the ranking decides, to which a skeleton that fell by a half says enough; the
        penalty weakens all stripes but the strongest, and would otherwise leave little to choose from.
        """
        return 1.0 - self.threshold if self.target is None else 0.5

    def kept_in(self, epoch: int, epochs: int) -> float:
        """Return the fraction of the start's MACs that may be left in an epoch: as much goes in each of the first half.

        Args:
            epoch: Number of the epoch, from 0.
            epochs: Epochs of the training.
        """
        if self.target is None:
            return 1.0
        return 1.0 - (1.0 - self.target) * min(1.0, (epoch + 1) / falling_epochs(epochs))


def falling_epochs(epochs: int) -> int:
    """Return the epochs in which stripes go for a target; the network recovers in the others."""
    return max(epochs // 2, 1)
