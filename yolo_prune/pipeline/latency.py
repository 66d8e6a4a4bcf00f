"""`prune target_latency=`: widths for a measured latency, promised only when a whole artefact was timed.

A profile predicts; the plan that it leads to is exported and timed beside the dense network. Where prediction and
timing differ, the prediction is aimed anew by their quotient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeAlias

from yolo_prune.allocation import Allocation, Budget, allocate
from yolo_prune.allocation.budget import lowest_go, solver_for
from yolo_prune.allocation.latency import LatencyModel
from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.device.machine import Machine
from yolo_prune.errors import ConfigError, InfeasibleTargetError
from yolo_prune.export.profile import Profile, Timed
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.importance import FloatArray

WITHIN = 0.05
"""A measured latency is the target if it differs by at most this fraction."""

CLOSE = 0.02
"""One that differs by less is not worth another try."""

TRIES = 6
"""Networks that are timed for a target."""


class Timer(Protocol):
    """Times slim versions of one network."""

    def time(self, keep: BoolArray) -> Timed:
        """Return how long the network with these channels takes, beside the dense one."""
        ...


Timing: TypeAlias = Callable[[Checkpoint, ChannelGraph, Profile], AbstractContextManager[Timer]]
"""Opens what times slim networks as a profile was made."""


@dataclass(frozen=True, kw_only=True)
class LatencyOutcome:
    """What is known of the latency of a plan.

    Attributes:
        target: Fraction of the dense network's latency that was asked for.
        predicted: By the profile.
        timed: What a whole artefact took; None if nothing was timed.
        profile: What predicted.
    """

    target: float
    predicted: float
    timed: Timed | None
    profile: Profile

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {
            "target_latency": self.target,
            "predicted": self.predicted,
            "timed": asdict(self.timed) if self.timed else None,
            "backend": self.profile.backend,
            "imgsz_px": self.profile.imgsz_px,
            "threads": self.profile.threads,
            "precision": self.profile.precision,
            "machine": asdict(self.profile.machine),
        }

    def in_words(self) -> str:
        """Say what was measured, or that nothing was."""
        where = self.profile.in_words()
        if self.timed is None:
            return (
                f"latency on {where}: {self.predicted:.3f} of the dense model's is predicted and NOT confirmed; "
                f"time both on {self.profile.machine.cpu} with yolo-prune benchmark\n"
            )
        one = self.timed
        return (
            f"latency on {where}: {one.ratio:.3f} ({one.p25:.3f}..{one.p75:.3f}) of the dense model's, "
            f"{one.slim_ms:.1f} of {one.dense_ms:.1f} ms; predicted {self.predicted:.3f}\n"
        )


def keep_for_latency(
    source: Checkpoint,
    graph: ChannelGraph,
    scores: FloatArray,
    allocation: Allocation,
    *,
    target: float,
    profile: Profile,
    timing: Timing | None,
) -> tuple[BoolArray, LatencyOutcome]:
    """Choose the kept channels for a latency.

    Args:
        source: The dense checkpoint.
        graph: Its channel graph.
        scores: One score per channel, shape (channels,).
        allocation: How the budget is met.
        target: Fraction of the dense network's latency.
        profile: What predicts.
        timing: Opens what times; None leaves the prediction unconfirmed.

    Raises:
        ConfigError: The profile is of another network.
        InfeasibleTargetError: The floors do not allow the target, or timings never came near it.
    """
    model = LatencyModel(graph, profile.fit)

    def planned(aim: float) -> tuple[BoolArray, float]:
        keep = allocate(graph, scores, _budget(profile, aim, model), allocation)
        return keep, float(model.predict(graph.kept_widths(keep)))

    def narrowest() -> tuple[BoolArray, float]:
        kept = solver_for(graph, allocation.constraints, scores).smallest()
        return lowest_go(graph, scores, kept), float(model.predict(kept))

    try:
        keep, predicted = planned(target)
    except InfeasibleTargetError:
        if timing is None:
            raise
        keep, predicted = narrowest()  # the profile may be wrong, and what can be reached is worth a timing
    if timing is None:
        return keep, LatencyOutcome(target=target, predicted=predicted, timed=None, profile=profile)
    with timing(source, graph, profile) as timer:
        return _confirmed(planned, timer, keep, predicted, target=target, profile=profile)


def _confirmed(
    planned: Callable[[float], tuple[BoolArray, float]],
    timer: Timer,
    keep: BoolArray,
    predicted: float,
    *,
    target: float,
    profile: Profile,
) -> tuple[BoolArray, LatencyOutcome]:
    """Time plans and aim anew until one is close; return the closest whose second timing agrees.

    The first timing of it was picked because it was close, so it is too good to be told.
    """
    tried: list[tuple[float, BoolArray, float]] = []
    aim = target
    for number in range(1, TRIES + 1):
        ratio = timer.time(keep).ratio
        print(f"[{number}/{TRIES}] predicted {predicted:.3f}, measured {ratio:.3f}", flush=True)
        tried.append((ratio, keep, predicted))
        if _off(ratio, target) <= CLOSE:
            break
        aim *= target / ratio
        try:
            keep, predicted = planned(min(aim, 0.999))
        except InfeasibleTargetError:
            if number == 1 and predicted > target:
                raise _unreachable(target, measured=ratio, predicted=predicted) from None
            break  # what the floors allow was not enough
        if any((keep == known).all() for _, known, _ in tried):
            break
    tried.sort(key=lambda one: _off(one[0], target))
    for _, keep, predicted in (one for one in tried if _off(one[0], target) <= WITHIN):
        timed = timer.time(keep)
        print(f"timed again: {timed.ratio:.3f}", flush=True)
        if _off(timed.ratio, target) <= WITHIN:
            return keep, LatencyOutcome(target=target, predicted=predicted, timed=timed, profile=profile)
    raise InfeasibleTargetError(
        f"target_latency={target:g} was not confirmed: the nearest of {len(tried)} networks took {tried[0][0]:.3f} of "
        "the dense one's time at first",
        expected=f"a network within {WITHIN:.0%} of the target, twice",
        remedy="another target, lower min_channels or round_to, a larger profile, or a quieter machine",
    )


def _unreachable(target: float, *, measured: float, predicted: float) -> InfeasibleTargetError:
    return InfeasibleTargetError(
        f"target_latency={target:g} cannot be reached within the floors: the narrowest network took {measured:.3f} "
        f"of the dense one's time, {predicted:.3f} was predicted",
        expected=f"at least {measured:.3f}, the smallest that min_channels, max_fraction and round_to allow here",
        remedy="raise the target, or lower min_channels and round_to or raise max_fraction",
    )


def _off(ratio: float, target: float) -> float:
    return abs(ratio / target - 1.0)


def _budget(profile: Profile, aim: float, model: LatencyModel) -> Budget:
    return Budget(unit="latency", ratio=aim, imgsz_px=profile.imgsz_px, latency=model)


def require_same_machine(profile: Profile, here: Machine) -> None:
    """Refuse to confirm timings of one machine on another.

    Raises:
        ConfigError: They are two.
    """
    for key, known in asdict(profile.machine).items():
        if key != "python" and known != getattr(here, key):
            raise ConfigError(
                f"the profile was measured with {key}={known}, this is {getattr(here, key)}",
                expected="the machine of the profile, to confirm the latency",
                remedy="prune there, measure a profile here, or confirm=false to go without",
            )
