"""Which channels matter: one file a kind of criterion, one row each in `BUILT_IN`."""

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
from yolo_prune.importance.sensitivity import FISHER, TAYLOR, TAYLOR_SCALE, LossChange
from yolo_prune.importance.similarity import FPGM

BUILT_IN: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (L1, L2, FPGM, LAMP, BN_SCALE, TAYLOR, TAYLOR_SCALE, FISHER, APOZ, HRANK, RANDOM)
}
"""Every criterion of ours by the name that the user types; `plugged.CRITERIA` has those of other packages as well."""

__all__ = [
    "BUILT_IN",
    "Criterion",
    "Evidence",
    "FilterCriterion",
    "FloatArray",
    "LossChange",
    "Normalization",
    "Reduction",
    "collect",
    "filters",
    "score_channels",
]
