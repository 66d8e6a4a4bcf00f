"""Changing a model by a keep mask: slice it, silence it, prove that both agree, fold what is left."""

from yolo_prune.surgery.apply import KeptEntries, Reread, apply
from yolo_prune.surgery.fold import Folding, fold_constants
from yolo_prune.surgery.mask import silence
from yolo_prune.surgery.verify import TOLERANCE, Verification, Verifier, counted_macs

__all__ = [
    "TOLERANCE",
    "Folding",
    "KeptEntries",
    "Reread",
    "Verification",
    "Verifier",
    "apply",
    "counted_macs",
    "fold_constants",
    "silence",
]
