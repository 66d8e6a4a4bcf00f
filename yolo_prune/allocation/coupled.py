"""Ties that leave several numbers free in one group: a small integer programme, solved by scipy's HiGHS.

Such ties arise where an equal split cuts concatenated features at another place than their borders. HiGHS is
deterministic and ends; staying whole is always a solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yolo_prune.channels import IntArray
from yolo_prune.errors import InfeasibleTargetError
from yolo_prune.importance import FloatArray


@dataclass(frozen=True)
class Coupled:
    """Groups whose removed channels x satisfy `matrix @ x = 0`.

    Attributes:
        groups: Indices of the groups, shape (members,).
        matrix: Shape (equations, members).
        widths: Channels of each, shape (members,).
        floors: Fewest that each keeps, shape (members,).
        lot: Kept channels are a multiple of this, or all.
    """

    groups: IntArray
    matrix: npt.NDArray[np.float64]
    widths: IntArray
    floors: IntArray
    lot: int

    def nearest(self, wished: FloatArray) -> IntArray:
        """Return the removal with the least sum of distances to the wished one.

        Args:
            wished: Channels that shall go, shape (members,).

        Returns:
            Channels that go, shape (members,).

        Raises:
            InfeasibleTargetError: No widths satisfy the ties, which no network has: keeping all of it does.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp  # 30 MB, and few networks have such ties

        size, zero, one = len(self.widths), np.zeros(len(self.widths)), np.ones(len(self.widths))
        # Variables: lots kept, whether whole, distance. Kept channels = lot * lots + width * whole.
        kept = np.hstack([self.lot * np.eye(size), np.diag(self.widths.astype(float)), np.zeros((size, size))])
        distance = np.hstack([np.zeros((size, 2 * size)), np.eye(size)])
        goal = self.widths - wished
        lots_unless_whole = np.hstack([np.eye(size), np.diag(self.widths // self.lot), np.zeros((size, size))])
        most = (self.widths // self.lot).astype(float)
        answer = milp(
            np.concatenate([zero, zero, one]),
            integrality=np.concatenate([one, one, zero]),
            bounds=Bounds(0.0, np.concatenate([most, one, np.full(size, np.inf)])),
            constraints=[
                LinearConstraint(self.matrix @ kept, self.matrix @ self.widths, self.matrix @ self.widths),
                LinearConstraint(kept, self.floors, self.widths),
                LinearConstraint(lots_unless_whole, 0.0, most),
                LinearConstraint(distance - kept, -goal, np.inf),
                LinearConstraint(distance + kept, goal, np.inf),
            ],
        )
        if answer.x is None:
            raise InfeasibleTargetError(
                f"no widths satisfy the ties of these {size} channel groups: {answer.message}",
                expected="a solution; keeping every channel is one",
                remedy="please report the model's yaml",
            )
        return self.widths - np.rint(kept @ answer.x).astype(np.int64)
