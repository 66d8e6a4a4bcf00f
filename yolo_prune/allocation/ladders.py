"""What ties leave free: independent numbers, each with its ladder of widths that can be built.

A tie is a linear equation over removed channels. Where the equations of connected groups leave numbers t free that do
not meet in any group, every group removes m * t channels of one of them: all buildable states can be listed. In every
supported block this is so. Whatever is left is for `coupled`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np
import numpy.typing as npt

from yolo_prune.channels import ChannelGraph, IntArray, Tie
from yolo_prune.importance import FloatArray


@dataclass(frozen=True)
class Ladder:
    """States of groups that change together, from whole to smallest.

    Attributes:
        groups: Indices of the groups, shape (members,).
        removed: Removed channels of each group in each state, shape (states, members); the first row is 0, and no
            entry is smaller in a later row.
    """

    groups: IntArray
    removed: IntArray

    def nearest(self, wished: FloatArray) -> IntArray:
        """Return the state whose total is nearest to a wish, the larger one of two.

        Args:
            wished: Wished removal of each member, shape (members,).
        """
        return self.removed[np.abs(self.totals - wished.sum()).argmin()]

    @cached_property
    def totals(self) -> IntArray:
        """Removed channels of all members in each state, shape (states,)."""
        totals: IntArray = self.removed.sum(axis=1)
        return totals


def equations(ties: Sequence[Tie], groups: IntArray) -> npt.NDArray[np.float64]:
    """Return the ties as a matrix A with A @ removed = 0, shape (equations, groups)."""
    column = {int(group): index for index, group in enumerate(groups)}
    rows = []
    for tie in ties:
        parts = np.zeros((len(tie.sets), len(groups)))
        for row, part in zip(parts, tie.sets, strict=True):
            for group, entries in part:
                if group in column:  # groups that lose nothing are not asked
                    row[column[group]] += entries
        rows.append(parts[1:] - parts[0])
    return np.concatenate([np.zeros((0, len(groups))), *rows])


def independent(matrix: npt.NDArray[np.float64]) -> list[IntArray] | None:
    """Return whole-number vectors that span all x with `matrix @ x = 0`, no two of which share an entry.

    Args:
        matrix: Shape (equations, groups).

    Returns:
        Vectors of shape (groups,) without negative entries; None if there are no such vectors.
    """
    if not len(matrix):
        return list(np.eye(matrix.shape[1], dtype=np.int64))  # most groups are tied to none
    basis = [_whole(vector) for vector in _null_space(matrix)]
    spans = np.array(basis, dtype=np.int64).reshape(-1, matrix.shape[1])
    exact = not (spans @ matrix.T).any() and bool((spans >= 0).all())
    return basis if exact and ((spans > 0).sum(axis=0) <= 1).all() else None


def _null_space(matrix: npt.NDArray[np.float64]) -> Iterator[npt.NDArray[np.float64]]:
    """Yield one vector for each column that Gauss-Jordan elimination leaves free."""
    reduced = matrix.copy()
    pivots: list[int] = []
    for column, values in enumerate(matrix.T):
        row = len(pivots)
        below = np.abs(reduced[row:].T[column])
        if not len(below) or below.max() < 1e-9 * max(1.0, np.abs(values).max()):
            continue
        best = row + int(below.argmax())
        reduced[[row, best]] = reduced[[best, row]]
        pivot = reduced[row] / reduced[row][column]
        reduced -= np.outer(reduced.T[column], pivot)
        reduced[row] = pivot
        pivots.append(column)
    for free in sorted(set(range(matrix.shape[1])) - set(pivots)):
        vector = np.zeros(matrix.shape[1])
        vector[free] = 1.0
        vector[pivots] = -reduced.T[free][: len(pivots)]
        yield vector


def _whole(vector: npt.NDArray[np.float64]) -> IntArray:
    """Return the smallest whole-number multiple of a rational vector."""
    fractions = [Fraction(float(value)).limit_denominator(4096) for value in vector]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    return np.array([int(fraction * scale) for fraction in fractions], dtype=np.int64)


def ladder(groups: IntArray, steps: IntArray, widths: IntArray, floors: IntArray, lots: IntArray) -> Ladder:
    """List the states of groups that lose `steps * t` channels for a whole t.

    Args:
        groups: Indices of the groups, shape (members,).
        steps: Channels that each loses per t, shape (members,), at least 1.
        widths: Channels of each, shape (members,).
        floors: Fewest that each keeps, shape (members,).
        lots: Kept channels of each are a multiple of this, unless it stays whole, shape (members,).
    """
    largest = int(((widths - floors) // steps).min())
    removed = np.arange(largest + 1)[:, None] * steps
    buildable = ((widths - removed) % lots == 0).all(axis=1)
    buildable[0] = True
    return Ladder(groups, removed[buildable])


def head_ladder(
    graph: ChannelGraph,
    ties: Sequence[Tie],
    groups: IntArray,
    scores: FloatArray,
    *,
    max_fraction: float,
    floors: IntArray,
    lots: IntArray,
) -> Ladder | None:
    """List the states of attention that loses whole heads, the least important first.

    Args:
        graph: The channel graph.
        ties: The ties among the groups.
        groups: Indices of the groups, shape (members,).
        scores: One score per channel of the graph.
        max_fraction: Largest fraction of the heads that may go.
        floors: Fewest channels that each group keeps, shape (members,); those of a head go together or not at all.
        lots: As in `ladder`.

    Returns:
        None if these groups hold no heads, or heads that cannot go alone.
    """
    heads = max((tie for tie in ties if tie.rows == len(tie.sets)), key=_entries, default=None)
    if heads is None:
        return None
    matrix = equations([tie for tie in ties if not tie.rows], groups)
    position = {int(group): index for index, group in enumerate(groups)}
    members = [[position[index] for index, _ in part] for part in heads.sets]
    means = [np.mean([scores[graph.groups[groups[i]].channels].mean() for i in part]) for part in members]
    widths = graph.widths()[groups]
    in_heads = sorted({index for part in members for index in part})
    others = [index for index in range(len(groups)) if index not in in_heads]
    removed = np.zeros((len(members), len(groups)), dtype=np.int64)
    for state, _ in enumerate(removed):
        for head in np.argsort(means, kind="stable")[:state]:
            removed[state, members[head]] = widths[members[head]]
        # What is tied to the heads' sum, such as the block's width, follows from it.
        answer = np.linalg.lstsq(matrix[:, others], -matrix @ removed[state], rcond=None)[0]
        removed[state, others] = np.rint(answer).astype(np.int64)
        if (
            (matrix @ removed[state]).any()
            or (removed[state] < 0).any()
            or (removed[state, others] > widths[others]).any()
        ):
            return None
    kept = widths - removed
    buildable = (kept[:, others] % lots[others] == 0).all(axis=1) & (kept[:, others] >= floors[others]).all(axis=1)
    buildable &= np.arange(len(members)) <= len(members) * max_fraction + 1e-9
    buildable[0] = True
    return Ladder(groups, removed[buildable])


def _entries(tie: Tie) -> int:
    return sum(entries for part in tie.sets for _, entries in part)
