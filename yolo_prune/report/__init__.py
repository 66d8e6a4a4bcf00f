"""Reads records, shows them: tables here, pages later."""

from yolo_prune.report.table import quantity, render

__all__ = ["quantity", "render"]
