"""How strong the penalty of sparsity training is, and how its strength changes over the epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from yolo_prune.errors import ConfigError
from yolo_prune.importance.base import FloatArray

Mode: TypeAlias = Literal["proximal", "subgradient"]
Schedule: TypeAlias = Literal["constant", "linear", "cosine"]

MODES: tuple[str, ...] = get_args(Mode)
SCHEDULES: tuple[str, ...] = get_args(Schedule)


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How the scales of a training are penalised.

    Attributes:
        strength: s; None chooses and adapts it, so that `share` of the penalised channels reach zero.
        mode: See `ScalePenalty`.
        schedule: How the strength changes over the training; see `schedule_factor`.
        share: See `strength`.

    Raises:
        ConfigError: A value that is out of range or unknown.
    """

    strength: float | None = None
    mode: Mode = "proximal"
    schedule: Schedule = "constant"
    share: float = 0.5

    def __post_init__(self) -> None:
        for key, value, known in (("mode", self.mode, MODES), ("schedule", self.schedule, SCHEDULES)):
            if value not in known:
                raise ConfigError(f"unknown sparsity {key} '{value}'", expected=f"one of {', '.join(known)}")
        if self.strength is not None and not 0.0 < self.strength < math.inf:
            raise ConfigError(
                f"sparsity strength {self.strength:g}",
                expected="a number above 0, such as 0.001, or auto",
                remedy="leave it out to train without the penalty",
            )
        if not 0.0 < self.share < 1.0:
            raise ConfigError(f"sparsity share {self.share:g}", expected="a number above 0 and below 1")


def strength_of(word: str) -> float | None:
    """Return the strength that a user typed; None for `auto`.

    Raises:
        ConfigError: Neither a number nor `auto`.
    """
    try:
        return None if word == "auto" else float(word)
    except ValueError:
        raise ConfigError(f"sparsity strength '{word}'", expected="a number above 0, or auto") from None


def schedule_factor(schedule: Schedule, progress: float) -> float:
    """Return the share of the full strength that applies at a point of the training.

    Args:
        schedule: `constant` stays at 1; `linear` and `cosine` fall to 0.
        progress: Share of the training that is done, 0 to 1.
    """
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0


@dataclass(frozen=True)
class AutoStrength:
    """The strength that lets a share of the channels reach zero by the end of the training.

    With nothing against it a scale moves by `s * sum(lr)`, times `1 / (1 - momentum)` for a subgradient. The loss pulls
    back, so after each epoch the strength is set anew from what is left to move, what is left of the learning rates,
    and the share of the last epoch's movement that arrived.

    Attributes:
        share: Share of the penalised channels that shall reach zero.
    """

    share: float = 0.5

    def wish(self, norms: FloatArray) -> float:
        """Return how far a channel has to move so that the share of all moves to zero.

        Args:
            norms: The penalised channels' scales, shape (penalised,).
        """
        return float(np.quantile(norms, self.share))

    def strength(self, distance: float, lr_left: float, *, arrived: float = 1.0) -> float:
        """Return the strength that covers a distance.

        Args:
            distance: How far scales have to move.
            lr_left: Sum of the learning rates of the steps to come, times what momentum adds.
            arrived: Share of the nominal movement that is seen.
        """
        return distance / (max(lr_left, 1e-12) * min(max(arrived, MOST_RESISTANCE), 1.0))


MOST_RESISTANCE = 0.1
"""Least share of the nominal movement that is believed, so that one epoch of standstill multiplies by ten at most."""
