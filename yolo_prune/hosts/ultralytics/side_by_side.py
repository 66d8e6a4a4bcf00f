"""Trainings side by side in one process: exactly one runs at a time, and none notices the others.

Each is a thread that is used as a coroutine: it runs until it hands over, and while it waits, whatever of the process
it would have had for itself (random numbers, switches of torch, variables that the host sets) is put away for it. So
the result depends on no clock.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch

Result = TypeVar("Result")

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED")
"""What the host sets in the environment when it seeds a training, and removes when one ends."""


class AbandonedError(BaseException):
    """Raised in a training that waits while another one failed; nobody's handler of errors shall take it for one."""


@dataclass(frozen=True, kw_only=True)
class ProcessState:
    """What a training takes for its own though the whole process has it."""

    python_rng: Any
    numpy_rng: Any
    torch_rng: torch.Tensor
    cuda_rngs: list[torch.Tensor]
    deterministic: tuple[bool, bool, bool, bool, bool]
    variables: dict[str, str | None]

    @classmethod
    def capture(cls) -> ProcessState:
        """Return what stands now."""
        return cls(
            python_rng=random.getstate(),
            numpy_rng=np.random.get_state(),
            torch_rng=torch.get_rng_state(),
            cuda_rngs=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            deterministic=(
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                torch.backends.cudnn.deterministic,
                torch.backends.cudnn.benchmark,
                torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]  # set by a class
            ),
            variables={name: os.environ.get(name) for name in VARIABLES},
        )

    def restore(self) -> None:
        """Make it stand again."""
        random.setstate(self.python_rng)
        np.random.set_state(self.numpy_rng)
        torch.set_rng_state(self.torch_rng)
        if self.cuda_rngs:
            torch.cuda.set_rng_state_all(self.cuda_rngs)
        enabled, warn_only, cudnn, benchmark, fill = self.deterministic
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn, benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        for name, value in self.variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Turn(Generic[Result]):
    """One training that hands over at points that it names.

    Args:
        work: What it does; it is given the turn, to pause by.
        name: For the thread.

    Attributes:
        point: Where it paused last; None before that, and once it has ended.
        ended: Whether it came to its end.
    """

    def __init__(self, work: Callable[[Turn[Result]], Result], name: str) -> None:
        self.point: int | None = None
        self.ended = False
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self._abandoned = False
        self._go, self._handed_over = threading.Semaphore(0), threading.Semaphore(0)
        self._state = ProcessState.capture()
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    @property
    def result(self) -> Result:
        """What the work returned, once it has ended."""
        return self._result[0]

    def advance(self) -> None:
        """Let it run to its next point, or to its end.

        Raises:
            BaseException: Whatever it raised.
        """
        self._go.release()
        self._handed_over.acquire()
        if self._error is not None:
            raise self._error

    def pause(self, point: int) -> None:
        """Hand over; called by the work itself. Returns at the next turn, with the process as it was."""
        self._state, self.point = ProcessState.capture(), point
        self._handed_over.release()
        self._go.acquire()
        self.require_wanted()
        self.point = None
        self._state.restore()

    def require_wanted(self) -> None:
        """End the work if nobody waits for it any more; called by the work itself.

        Raises:
            AbandonedError: Nobody does.
        """
        if self._abandoned:
            raise AbandonedError

    def abandon(self) -> None:
        """End the work where it stands, and wait until it has."""
        self._abandoned = True
        self._go.release()
        self._thread.join()

    def _run(self, work: Callable[[Turn[Result]], Result]) -> None:
        self._go.acquire()
        try:
            self.require_wanted()
            self._state.restore()
            self._result.append(work(self))
        except BaseException as error:
            self._error = error
        self.ended, self.point = True, None
        self._handed_over.release()


Work: TypeAlias = Callable[[Turn[Result]], Result]


def run_side_by_side(works: Sequence[Work[Result]], meet: Callable[[int], None]) -> list[Result]:
    """Run works in turns, so that all pause at a point before any goes on.

    Args:
        works: What is done side by side. Each pauses at the same rising points; one that comes to a point a second
            time, because it did an epoch again, is sent on at once.
        meet: Called with each point, while all pause there.

    Returns:
        What each returned.

    Raises:
        BaseException: What one of them, or `meet`, raised; the others are ended then.
    """
    before = ProcessState.capture()
    turns = [Turn(work, name=f"side_by_side_{index}") for index, work in enumerate(works, 1)]
    reached = -1
    try:
        while True:
            for turn in turns:
                _advance_beyond(turn, reached)
            points = {turn.point for turn in turns}
            if points == {None}:
                return [turn.result for turn in turns]
            if len(points) > 1 or (point := points.pop()) is None:
                raise RuntimeError(f"works pause at different points: {[turn.point for turn in turns]}")
            meet(point)
            reached = point
    finally:
        for turn in turns:
            turn.abandon()
        before.restore()


def _advance_beyond(turn: Turn[Any], reached: int) -> None:
    """Let a work run until it pauses beyond a point, or ends."""
    turn.advance()
    while turn.point is not None and turn.point <= reached:
        turn.advance()
