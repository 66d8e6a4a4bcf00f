"""Which plan is best: candidates are cut, their batch norms recalibrated, and scored.

Source: Li et al., EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning, 2020.
"""

from yolo_prune.search.recalibration import recalibrate

__all__ = ["recalibrate"]
