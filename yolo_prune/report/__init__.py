"""Reads records and nothing else, and shows them: tables, pages and plots."""

from yolo_prune.report.table import quantity, render

__all__ = ["quantity", "render"]
