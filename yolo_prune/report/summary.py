"""The one table of a run: what was dense, what is slim, what the control says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yolo_prune.device.timings import SpeedUp
from yolo_prune.report.table import quantity, render


def summarize(summary: Mapping[str, Any], *, markdown: bool = False) -> str:
    """Render the summary of a run: one row a model, then the speed-ups.

    Args:
        summary: The content of `summary.json`.
        markdown: Markdown instead of lines drawn for a terminal.
    """
    splits = list(next(iter(summary["evaluations"].values())))
    backends = list(summary["speed_up"])
    columns = ["", "MACs", "params"]
    columns += [
        f"{metric} {split}" for split in splits for metric in precisions(summary["evaluations"]["dense"][split])
    ]
    columns += [f"{backend} ms" for backend in backends]
    rows = [_row(summary, name, splits, backends) for name in summary["costs"]]
    return render(columns, rows, markdown=markdown) + _notes(summary)


def _row(summary: Mapping[str, Any], name: str, splits: list[str], backends: list[str]) -> list[str]:
    cost = summary["costs"][name]
    row = [name, quantity(cost["macs"]), quantity(cost["params"])]
    evaluations = summary["evaluations"][name]
    row += [f"{value:.3f}" for split in splits for value in precisions(evaluations[split]).values()]
    for backend in backends:
        latency = summary["latency_ms"].get(f"{name}_{backend}")
        row.append(f"{latency['median_ms']:.1f} ({latency['p5_ms']:.1f}..{latency['p95_ms']:.1f})" if latency else "-")
    return row


def precisions(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean average precisions of an evaluation, of boxes and of what else its task predicts, by headings."""
    parts = {"": figures, **{f"{kind} ": figures[kind] for kind in ("mask", "pose") if kind in figures}}
    return {
        prefix + heading: float(part[key])
        for prefix, part in parts.items()
        for key, heading in (("map50", "mAP50"), ("map50_95", "mAP50-95"))
    }


def _notes(summary: Mapping[str, Any]) -> str:
    """Say in words what the table's figures are, and which speed-ups are separable."""
    settings, dense, slim = summary["settings"], summary["costs"]["dense"], summary["costs"]["slim"]
    lines = [
        "",
        f"MACs and latency at {settings['imgsz']} px, batch 1; latency: median (p5..p95) of {settings['runs']} "
        f"interleaved runs, {settings['threads']} threads, {summary['machine']['cpu']}.",
        f"Slim keeps {slim['macs'] / dense['macs']:.1%} of the MACs and {slim['params'] / dense['params']:.1%} of the "
        f"parameters; {_proof(summary['verification'])}.",
    ]
    for backend, ratio in summary["speed_up"].items():
        lines.append(f"{backend}: {in_words(ratio)}")
    for name, accuracy in summary.get("accuracy", {}).items():  # a run of an earlier version has none
        pair = f"{accuracy['artefact']:.3f}, PyTorch {accuracy['pytorch']:.3f}"
        lines.append(f"{name}: mAP50-95 {pair} on split '{accuracy['split']}', square inputs")
    return "\n".join(lines) + "\n"


def _proof(verification: Mapping[str, Any]) -> str:
    error = verification.get("max_abs_error")
    return "no channel went, so there was nothing to verify" if error is None else f"verified to {error:.1e} in fp64"


def in_words(speed_up: Mapping[str, Any]) -> str:
    """Return a speed-up with its quartiles and what may be said of it; "faster" only where the intervals part."""
    return SpeedUp(**speed_up).in_words()
