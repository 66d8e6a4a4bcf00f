"""Which channels matter: one file a criterion, one row each in `CRITERIA`."""

from yolo_prune.importance.base import Criterion, FloatArray, Normalization, Reduction, score_channels
from yolo_prune.importance.bn_scale import BN_SCALE
from yolo_prune.importance.magnitude import L1, L2

CRITERIA: dict[str, Criterion] = {criterion.name: criterion for criterion in (BN_SCALE, L1, L2)}
"""Every criterion by the name that the user types."""

__all__ = ["CRITERIA", "Criterion", "FloatArray", "Normalization", "Reduction", "score_channels"]
