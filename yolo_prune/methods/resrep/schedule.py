"""When rows are masked, how fast they learn, and whether they will be gone in the end: known before the first epoch.

The update of a masked row depends on nothing but its own size: with learning rate lr, momentum mu and strength s,
`v <- mu v + s x / (|x| + eps)`, `x <- x - lr v`, along the row's direction. So what is left of it at the end of the
training can be computed from the learning rates of all steps.

Near zero x is thrown back and forth by about `lr s / (1 - mu)`. In the last part of the training the compactors'
learning rate therefore falls geometrically, until that is far below what counts as zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from yolo_prune.channels import IntArray
from yolo_prune.errors import ConfigError
from yolo_prune.importance import FloatArray

EPS = 1e-6
"""Added to norms that divide: a row of zeros stays zero, and the pull is even where a row is as good as gone."""

GONE = 1e-5
"""A row with a smaller norm makes nothing (paper, section 3.4)."""

SIMULATED = 1e-6
"""What a simulated row has to fall below: a tenth of `GONE`, for what rounding to half precision may add."""

RIPPLE = 1e-7
"""What `lr s / (1 - mu)` is at the last step."""

MASK_FROM, MASK_LATEST, MASK_SHARE, TAIL_FROM = 0.05, 0.3, 0.2, 0.8
"""Shares of the training: masking begins after warm-up, but in between the first two, and lasts the third; the tail
begins at the fourth. Without a long warm-up masks settle at 25%, where the paper's authors have it end."""

MOMENTA = (0.99, 0.95, 0.9, 0.5, 0.0)
"""What is tried, in this order: the paper's, then others for fewer steps, since a row answers after 1 / (1 - mu)."""

MULTIPLES = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
"""Of the strength with which a row of norm 1 first reaches zero as the tail begins: what is tried, in this order."""

FEWEST_ROWS, MOST_ROWS, ROW_STEPS = 5, 1000, 2_000_000
"""How many rows are simulated: so many that all their steps together are the last number. Each norm arrives at another
moment of the oscillation, and over few steps the tail is so steep that it stops some of them only."""

MOST_STEPS = 2_000_000
"""Steps behind which no longer training is looked for."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """The iterations of one training, as the host runs them.

    Attributes:
        epochs: Epochs.
        batches: Batches of an epoch; an iteration is a batch.
        warmup_epochs: Epochs in which the learning rate rises from 0 and the gathered batches from 1; the last epoch is
            none of them.
        accumulate: Batches that an optimizer step gathers after that.
        lr: Learning rate that `factor` multiplies.
        factor: From the epoch to its multiple.
    """

    epochs: int
    batches: int
    warmup_epochs: float
    accumulate: int
    lr: float
    factor: Callable[[float], float]

    @property
    def iterations(self) -> int:
        """Number of iterations."""
        return self.epochs * self.batches

    @property
    def warmup(self) -> int:
        """Number of iterations of warm-up."""
        return round(min(self.warmup_epochs, max(self.epochs - 1, 0)) * self.batches)

    @property
    def mask_from(self) -> int:
        """First iteration at which rows may be masked."""
        return round(np.clip(self.warmup, MASK_FROM * self.iterations, MASK_LATEST * self.iterations))

    @property
    def mask_until(self) -> int:
        """Iteration from which the masks stay as they are."""
        return min(self.mask_from + round(MASK_SHARE * self.iterations), self.iterations - 1)

    @property
    def tail_from(self) -> int:
        """Iteration from which the learning rate of compactors falls faster than the host's."""
        return max(round(TAIL_FROM * self.iterations), self.mask_until)

    @cached_property
    def rates(self) -> FloatArray:
        """Learning rate of compactors at every iteration, without the tail, shape (iterations,)."""
        rates = np.repeat([self.lr * self.factor(epoch) for epoch in range(self.epochs)], self.batches)
        ramp = np.arange(min(self.warmup + 1, self.iterations))
        rates[ramp] *= ramp / max(self.warmup, 1) if self.warmup else 1.0
        return rates

    @cached_property
    def steps(self) -> IntArray:
        """Iterations that end with an optimizer step, ascending."""
        found, last = [], -1
        for iteration in range(min(self.warmup + 1, self.iterations) if self.warmup else 0):
            gathered = max(1, round(np.interp(iteration, [0, self.warmup], [1, self.accumulate])))
            if iteration - last >= gathered:
                found.append(iteration)
                last = iteration
        after = np.arange(max(last + self.accumulate, len(found) and self.warmup + 1), self.iterations, self.accumulate)
        return np.concatenate([np.array(found, dtype=np.int64), after])

    def kept(self, iteration: int, target: float) -> float:
        """Return the fraction of the MACs that masks leave at an iteration: it falls evenly from 1 to the target."""
        done = (iteration - self.mask_from) / max(self.mask_until - self.mask_from, 1)
        return 1.0 - (1.0 - target) * float(np.clip(done, 0.0, 1.0))

    def tail(self, pull: Pull) -> FloatArray:
        """Return what multiplies each iteration's rate so that the last ripple is `RIPPLE`, shape (iterations,)."""
        last = float(self.rates[-1]) * pull.strength / (1.0 - pull.momentum)
        end = min(1.0, RIPPLE / last) if last > 0.0 else 1.0
        behind = np.arange(self.iterations) - self.tail_from
        return end ** np.clip(behind / max(self.iterations - 1 - self.tail_from, 1), 0.0, 1.0)

    def stretched(self, epochs: int) -> Course:
        """Return a training of more epochs with the same schedule."""
        factor, ratio = self.factor, self.epochs / epochs
        return dataclasses.replace(self, epochs=epochs, factor=lambda epoch: factor(epoch * ratio))


@dataclass(frozen=True, kw_only=True)
class Pull:
    """How rows are pulled to zero.

    Attributes:
        strength: Weight of the group lasso, the paper's lambda.
        momentum: Momentum of the compactors.
    """

    strength: float
    momentum: float


def travel(rates: FloatArray, momentum: float) -> float:
    """Return how far strength 1 moves a row that stood still, on its way to zero.

    Args:
        rates: Learning rates of the steps, shape (steps,).
        momentum: Momentum.
    """
    if len(rates) == 0:
        return 0.0
    grown = (1.0 - momentum ** np.arange(1, len(rates) + 1)) / (1.0 - momentum)
    return float(rates @ grown)


def simulate(rates: FloatArray, pull: Pull, starts: FloatArray) -> FloatArray:
    """Return the norms of masked rows after some steps.

    Args:
        rates: Learning rates of the steps, shape (steps,).
        pull: Strength and momentum.
        starts: Norms before the first of them, shape (rows,).
    """
    if len(starts) <= FEWEST_ROWS:
        return np.array([_simulated(rates.tolist(), pull, start) for start in starts.tolist()])
    x, velocity = np.array(starts, dtype=np.float64), np.zeros(len(starts))
    for rate in rates.tolist():
        velocity = pull.momentum * velocity + pull.strength * x / (np.abs(x) + EPS)
        x = x - rate * velocity
    return np.abs(x)


def _simulated(rates: list[float], pull: Pull, start: float) -> float:
    """Return what is left of one row: plain numbers are several times as fast as arrays as short as a few rows."""
    x, velocity, strength, momentum = start, 0.0, pull.strength, pull.momentum
    for rate in rates:
        velocity = momentum * velocity + strength * x / (abs(x) + EPS)
        x -= rate * velocity
    return abs(x)


def forgetting_rates(course: Course, pull: Pull) -> FloatArray:
    """Return the learning rates of the steps from the end of masking on, shape (steps,)."""
    steps = course.steps[course.steps >= course.mask_until]
    return (course.rates * course.tail(pull))[steps]


def is_enough(course: Course, pull: Pull) -> bool:
    """Return whether rows that are masked last, at norms up to 1, are gone when the training ends."""
    if pull.strength * _travel_before_tail(course, pull.momentum) < 1.0 - 1e-9:
        return False
    rates = forgetting_rates(course, pull)
    rows = int(np.clip(ROW_STEPS // len(rates), FEWEST_ROWS, MOST_ROWS))
    return bool(simulate(rates, pull, np.linspace(1.0, 0.001, rows)).max() < SIMULATED)


def _travel_before_tail(course: Course, momentum: float) -> float:
    steps = course.steps[(course.steps >= course.mask_until) & (course.steps < course.tail_from)]
    return travel(course.rates[steps], momentum)


def choose(course: Course, *, strength: float | None, momentum: float | None) -> Pull:
    """Return how hard rows have to be pulled: the given values, or the gentlest ones that suffice.

    Args:
        course: The training.
        strength: The paper's lambda; None takes the smallest one whose row of norm 1 is gone when the tail begins.
        momentum: None takes the largest of `MOMENTA` with which that can be.

    Raises:
        ConfigError: The training is too short; the message names the epochs that would do.
    """
    found = _first(course, strength, momentum)
    if found is not None:
        return found
    given = {"resrep.strength": strength, "resrep.momentum": momentum}
    words = [f"{key}={'auto' if value is None else f'{value:g}'}" for key, value in given.items()]
    helps = [key for key, value in given.items() if value is not None]
    raise ConfigError(
        f"{len(course.steps)} optimizer steps in {course.epochs} epochs are too few for {' '.join(words)}: masked rows "
        "would not be zero at the end",
        expected=_needed(course, strength, momentum),
        remedy="more epochs, nbs= as small as batch= (a step for each batch), or a larger lr0"
        + (f"; or leave out {' and '.join(helps)}" if helps else ""),
    )


def _first(course: Course, strength: float | None, momentum: float | None) -> Pull | None:
    for mu in MOMENTA if momentum is None else (momentum,):
        way = _travel_before_tail(course, mu)
        if way <= 0.0:
            continue
        for candidate in [multiple / way for multiple in MULTIPLES] if strength is None else [strength]:
            pull = Pull(strength=candidate, momentum=mu)
            if is_enough(course, pull):
                return pull
    return None


def _needed(course: Course, strength: float | None, momentum: float | None) -> str:
    """Say how many epochs would do, found by looking at longer trainings."""

    def suffices(epochs: int) -> bool:
        return _first(course.stretched(epochs), strength, momentum) is not None

    low, high = course.epochs, 2 * course.epochs
    while not suffices(high):
        low, high = high, 2 * high
        if high * course.batches > MOST_STEPS:
            return f"more than {low} epochs with these settings"
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return f"epochs={high} or more with these settings"
