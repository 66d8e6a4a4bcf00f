"""How many channels go where: scores, a budget and constraints result in a keep mask."""

from yolo_prune.allocation.budget import PATHS, Allocation, Budget, allocate
from yolo_prune.allocation.constraints import ATTENTION, Constraints, WidthSolver

__all__ = ["ATTENTION", "PATHS", "Allocation", "Budget", "Constraints", "WidthSolver", "allocate"]
