"""Magnitude that compares between layers.

Source: Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, 2021, eq. 2, with filters as weights. The
largest filter of each layer scores 1, so that no layer is emptied by a global ranking.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from yolo_prune.importance.base import FilterCriterion, FloatArray


def lamp(squares: FloatArray) -> FloatArray:
    """Return each value over the sum of those that are not smaller, itself included; 0 for 0. Shape (n,)."""
    ascending = np.sort(squares)
    sums = np.cumsum(ascending[::-1])[::-1]  # at i: of the values from i on
    not_smaller = sums[np.searchsorted(ascending, squares, side="left")]
    return np.divide(squares, not_smaller, out=np.zeros_like(squares), where=squares > 0)


def scores(matrix: Tensor) -> Tensor:
    """Return the score of each row by its squared norm, float64 of shape (rows,)."""
    return torch.from_numpy(lamp(matrix.double().square().sum(dim=1).numpy()))


LAMP = FilterCriterion("lamp", scores, normalization="none")
