"""Artefacts of many models beside PyTorch: the table by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from bench_export import Cell, ExportFigures, require_any

from yolo_prune.errors import ConfigError
from yolo_prune.pipeline.artefacts import Variant

CELL = Cell(
    model="slim", sha256="0", data="coco", split="val", imgsz_px=320, format="ncnn", precision="int8", images=16,
    calibration=64,
)  # fmt: skip


def line(**more: Any) -> dict[str, Any]:
    boxes = {"iou": 0.7, "expected": 63, "found": 60, "answered": 52, "backed": 51}
    losses = {"box": 0.01, "mask": 0.0316}
    return {
        "cell": dataclasses.asdict(CELL), "macs": 544_000_000, "params": 2_000_000, "bytes": 3_260_000,
        "parity": {"max_rel": 0.92, "boxes": boxes}, "error": None, "seconds": 1, "machine": {},
        "accuracy": {"pytorch": 0.3824, "artefact": 0.3724, "losses": losses, "limit": 0.03}, **more,
    }  # fmt: skip


def row(record: dict[str, Any]) -> str:
    return ExportFigures(records=[record]).table().splitlines()[2]


def test_the_table_by_hand():
    """The largest loss is shown, of whatever kind, and both counts of boxes."""
    for cell in ("slim, coco 320 px", "544M", "ncnn", "int8", "3.3", "9e-01", "60/63 and 51/52", "0.3724", "0.3824"):
        assert cell in row(line())
    assert "+0.0316" in row(line())
    assert row(line()).endswith("yes")


def test_the_summary_by_hand():
    other = line(accuracy={"pytorch": 0.38, "artefact": 0.39, "losses": {"box": -0.01}, "limit": 0.03}, error="no")
    told = ExportFigures(records=[line(), other]).table().splitlines()[-1]
    assert told == "1 of 2 artefacts agree. mAP50-95 beside PyTorch's: int8 -0.0100 to +0.0100."


def test_one_that_disagrees_or_cannot_be_compared_says_no():
    assert row(line(error="it loses too much")).endswith("NO")
    silent = row(line(error="not finite", parity=None, accuracy=None))
    assert silent.endswith("NO")
    assert "60/63" not in silent


def test_what_this_machine_lacks_is_left_out(capsys, monkeypatch):
    def needs(variant: Variant) -> None:
        if (variant.format, variant.precision) == ("ncnn", "int8"):
            raise ConfigError("no ncnn2int8", expected="it")

    monkeypatch.setattr(Variant, "require_possible", needs)
    other = dataclasses.replace(CELL, format="onnx")
    assert require_any([CELL, other]) == [other]
    assert capsys.readouterr().err == "left out: ncnn int8: no ncnn2int8\n"
    with pytest.raises(ConfigError, match="no ncnn2int8"):
        require_any([CELL])


def test_rotated_boxes_are_not_matched():
    assert " and " not in row(line(parity={"max_rel": 0.1, "boxes": None}))
