"""A picture of batch-norm scales over the epochs of a sparsity training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def draw_scales(record: dict[str, Any], path: Path) -> None:
    """Draw how the scales of the penalised channels are distributed after each epoch, and what that would prune.

    Args:
        record: What a sparsity training writes: `epochs`, `silent_below`, `largest`.
        path: PNG file, written anew.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # drawn without a display or global state
    from matplotlib.figure import Figure

    epochs = record["epochs"]
    shares = np.array([epoch["histogram"] for epoch in epochs], dtype=float)
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1.0)
    numbers = [epoch["epoch"] for epoch in epochs]
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    extent = (numbers[0] - 0.5, numbers[-1] + 0.5, 0.0, record["largest"])
    image = upper.imshow(np.sqrt(shares.T), origin="lower", aspect="auto", extent=extent, cmap="viridis")
    figure.colorbar(image, ax=upper, label="share of channels (square root)")
    upper.axhline(record["silent_below"], color="white", linewidth=0.8, linestyle=":")
    upper.set(ylabel="batch-norm scale", title="Scales of the penalised channels (dotted: silent below)")
    lower.plot(numbers, [epoch["silent"] for epoch in epochs], label="silent channels")
    lower.plot(numbers, [epoch["macs"] for epoch in epochs], label="MACs without them")
    lower.set(xlabel="epoch", ylabel="fraction", ylim=(0.0, 1.05))
    lower.legend()
    figure.savefig(path, dpi=120)
