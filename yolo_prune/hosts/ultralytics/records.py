"""What each method of training leaves in the folder of a run: what it is resumed from, and what a new run forgets."""

from __future__ import annotations

from yolo_prune.methods.slimming.course import PICTURE, RECORD, TABLE

FILES = {
    "pruning": ("pruning.json", "pruning_step*.json"),
    "sparsity": (RECORD, TABLE, PICTURE),
    "resrep": ("resrep.json", "resrep_plan.json", "weights/compactors.pt"),
    "stripes": ("stripes.json",),
    "grafting": ("grafting.json",),
    "unstructured": ("zeros.json",),
}
"""Names, or patterns of names, in the run's folder by the name of the method; the record comes first."""
