"""How many channels go where: scores, a budget and constraints result in a keep mask."""

from yolo_prune.allocation.budget import Allocation, Budget, allocate
from yolo_prune.allocation.constraints import ATTENTION, Constraints, WidthSolver
from yolo_prune.allocation.paths import PATHS

__all__ = ["ATTENTION", "PATHS", "Allocation", "Budget", "Constraints", "WidthSolver", "allocate"]
