"""How a search chooses its candidates: one class a strategy, one row each in `STRATEGIES`.

A strategy sees what was scored in the rounds before, so that it proposes the same candidates whoever scored them, in
whatever order, and however often the search was killed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from yolo_prune.channels import IntArray
from yolo_prune.errors import MissingDependencyError
from yolo_prune.search.sampling import Candidate, Sampler

ROUND = 8
"""Candidates that an informed strategy proposes at once: more may be scored side by side, fewer are better informed."""

UNINFORMED = 2 * ROUND
"""Random candidates before an informed strategy makes up its mind."""


class Strategy(Protocol):
    """Proposes candidates."""

    def __init__(self, sampler: Sampler) -> None:
        """Take what draws candidates within the budget."""
        ...

    def rounds(self, count: int) -> Iterator[range]:
        """Yield the numbers of the candidates of each round, `count` in all."""
        ...

    def propose(self, numbers: range, scored: Mapping[int, tuple[IntArray, float]]) -> list[Candidate]:
        """Return the candidates of a round.

        Args:
            numbers: Their numbers.
            scored: Widths, shape (groups,), and score of the candidates of the rounds before, by number.
        """
        ...


class RandomSearch:
    """The paper's: every candidate is drawn by itself, so all are one round."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def rounds(self, count: int) -> Iterator[range]:
        """Yield one round."""
        yield range(count)

    def propose(self, numbers: range, scored: Mapping[int, tuple[IntArray, float]]) -> list[Candidate]:  # noqa: ARG002
        """Return random candidates."""
        return [self._sampler.draw(number) for number in numbers]


class InformedSearch:
    """Optuna's tree-structured Parzen estimator over the ratios of sets of tied groups.

    Source: Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011. It begins with candidates of the random
    search. A proposal is moved onto the budget; what the estimator learns of is what was scored, not what it proposed.

    Raises:
        MissingDependencyError: Optuna is not installed.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler, self._optuna = sampler, _optuna()
        one = self._optuna.distributions.FloatDistribution(0.0, 1.0)
        self._space = {str(index): one for index in range(len(sampler.solver.units))}

    def rounds(self, count: int) -> Iterator[range]:
        """Yield the random candidates, then rounds of `ROUND`."""
        yield range(min(count, UNINFORMED))
        for first in range(UNINFORMED, count, ROUND):
            yield range(first, min(first + ROUND, count))

    def propose(self, numbers: range, scored: Mapping[int, tuple[IntArray, float]]) -> list[Candidate]:
        """Return the most promising candidates."""
        if numbers.start < UNINFORMED:
            return [self._sampler.draw(number) for number in numbers]
        study = self._study(numbers.start, [scored[number] for number in range(numbers.start)])
        asked = (study.ask(self._space).params for _ in numbers)
        ratios = (np.array([parameters[name] for name in self._space]) for parameters in asked)
        return [
            self._sampler.moved(number, self._sampler.of_groups(found))
            for number, found in zip(numbers, ratios, strict=True)
        ]

    def _study(self, start: int, scored: Sequence[tuple[IntArray, float]]) -> Any:
        """Return a study that knows some candidates; the estimator is made anew, so that a resumed one is the same."""
        seed = int(np.random.default_rng([self._sampler.seed, start]).integers(2**31))
        estimator = self._optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=UNINFORMED, multivariate=True, constant_liar=True
        )
        study = self._optuna.create_study(direction="maximize", sampler=estimator)
        solver = self._sampler.solver
        for kept, score in scored:
            parameters = {
                name: float(1.0 - kept[unit.groups].sum() / solver.widths[unit.groups].sum())
                for name, unit in zip(self._space, solver.units, strict=True)
            }
            study.add_trial(self._optuna.trial.create_trial(params=parameters, distributions=self._space, value=score))
        return study


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise MissingDependencyError("optuna", extra="search", purpose="search with strategy=informed") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


STRATEGIES: dict[str, type[Strategy]] = {"random": RandomSearch, "informed": InformedSearch}
"""Every strategy by the name that the user types."""
