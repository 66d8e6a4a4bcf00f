"""Latency targets beside what a fresh process measured: the table by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench_latency import Cell, LatencyFigures

CELL = Cell(
    model="m", data="d", backend="ncnn", imgsz_px=320, threads=2, target=0.5, allocation="uniform", criterion="l2",
    epochs=0, seed=0,
)  # fmt: skip


def line(ratio: float, **more: Any) -> dict[str, Any]:
    fresh = {"ratio": ratio, "p25": ratio - 0.01, "p75": ratio + 0.01}
    return {
        "cell": dataclasses.asdict(CELL), "predicted": 0.5, "confirmed": 0.49, "fresh": fresh, "macs_kept": 0.4, **more,
    }  # fmt: skip


def test_the_table_by_hand():
    """.51 where .5 was asked for is 2% more."""
    row = LatencyFigures(records=[line(0.51)]).table().splitlines()[2]
    for cell in ("ncnn, 320 px, 2 threads", "0.510 (0.500..0.520)", "+2.0%", "40.0%"):
        assert cell in row


def test_what_was_fine_tuned_is_shown_with_how_fast_it_is():
    tuned = {"by_latency": {"map50_95": 0.5, "ratio": 0.51}, "by_macs": {"map50_95": 0.4, "ratio": 0.52}}
    row = LatencyFigures(records=[line(0.51, **tuned)]).table().splitlines()[2]
    assert "0.500 at 0.510" in row
    assert "0.400 at 0.520" in row
