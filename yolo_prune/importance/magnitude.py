"""Filter norms: how much weight a channel's filters carry (Li et al., Pruning Filters for Efficient ConvNets, 2017).

Norms depend on the fan-in, so they are divided by their group's mean.
"""

from __future__ import annotations

from functools import partial

import torch

from yolo_prune.importance.base import FilterCriterion

L1 = FilterCriterion("l1", partial(torch.linalg.vector_norm, ord=1, dim=1))
L2 = FilterCriterion("l2", partial(torch.linalg.vector_norm, ord=2, dim=1))
