"""Which channels matter: one file a kind of criterion, one row each in `CRITERIA`."""

from yolo_prune.importance.base import (
    Criterion,
    FilterCriterion,
    FloatArray,
    Normalization,
    Reduction,
    filters,
    score_channels,
)
from yolo_prune.importance.bn_scale import BN_SCALE
from yolo_prune.importance.chance import RANDOM
from yolo_prune.importance.evidence import Evidence, collect
from yolo_prune.importance.feature_maps import APOZ, HRANK
from yolo_prune.importance.lamp import LAMP
from yolo_prune.importance.magnitude import L1, L2
from yolo_prune.importance.plugged import plugged_criteria
from yolo_prune.importance.sensitivity import FISHER, TAYLOR, TAYLOR_SCALE, LossChange
from yolo_prune.importance.similarity import FPGM

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (L1, L2, FPGM, LAMP, BN_SCALE, TAYLOR, TAYLOR_SCALE, FISHER, APOZ, HRANK, RANDOM)
}
CRITERIA |= plugged_criteria(taken=CRITERIA)
"""Every criterion by the name that the user types, those of other packages among them."""

BY_FILTERS = frozenset(name for name, one in CRITERIA.items() if isinstance(one, (FilterCriterion, LossChange)))
"""Criteria that score the filters of weights, and so can score the slices that read them as well."""

__all__ = [
    "BY_FILTERS",
    "CRITERIA",
    "Criterion",
    "Evidence",
    "FloatArray",
    "Normalization",
    "Reduction",
    "collect",
    "filters",
    "score_channels",
]
