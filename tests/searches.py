"""Words of searches that are small enough for tests, and what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yolo_prune.files import read_lines


def words_for(model: Path, data: Path, out: Path, *, verb: str = "search", **more: Any) -> list[str]:
    settings = {"imgsz": 64, "batches": 2, "batch": 4, "held_out": 0.25, **more}
    if verb == "search":
        settings = {"target_macs": 0.5, "candidates": 3, **settings}
    return [verb, f"model={model}", f"data={data}", f"out={out}", *(f"{k}={v}" for k, v in settings.items())]


def numbered(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a folder's record, by number."""
    return sorted(read_lines(folder / "candidates.jsonl"), key=lambda line: line["number"])


def require_a_winner(lines: list[dict[str, Any]]) -> None:
    """Agreement about scores that are all alike, or about the first candidate, would say little."""
    scores = [line["score"] for line in lines]
    assert len(set(scores)) == len(scores)
    assert max(scores) > max(0.0, scores[0])
