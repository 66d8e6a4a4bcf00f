"""Filters that others can stand in for (He et al., Filter Pruning via Geometric Median, 2019).

Distances depend on fan-in and width, so they are divided by their group's mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yolo_prune.importance.base import FilterCriterion


def distances(matrix: Tensor) -> Tensor:
    """Return the sum of each row's distances to the other rows, eq. 4 of the paper, float64 of shape (rows,).

    A filter near the geometric median of its layer is replaceable, however large it is.
    """
    # Not by matrix products, which lose the digits of small distances.
    return torch.cdist(matrix, matrix, compute_mode="donot_use_mm_for_euclid_dist").double().sum(dim=1)


FPGM = FilterCriterion("fpgm", distances)
