"""Pictures for README, which are the same bytes for the same figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg  # drawn without a display or global state
from matplotlib.figure import Figure

from yolo_prune.files import new_file


@contextlib.contextmanager
def svg_picture(path: Path, *, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure of a size in inches; at the end it is an SVG file, written anew."""
    with matplotlib.rc_context({"svg.hashsalt": "yolo_prune", "svg.fonttype": "none"}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with new_file(path, replace=True) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
