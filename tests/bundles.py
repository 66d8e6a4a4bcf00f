"""Bundles for tests: made once a session, copied before anything is done to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from yolo_prune.device.detections import letterbox
from yolo_prune.device.runner import main
from yolo_prune.device.sources import read_image
from yolo_prune.export.pytorch_runtime import PyTorchRuntime
from yolo_prune.pipeline.bundle import BundleConfig, bundle

IMGSZ_PX = 64
NAME = "räk smörgås"
"""A folder's name as people give them."""


def talkative(checkpoint: Path, image: Path, out: Path) -> Path:
    """Write a copy of a detector that finds something of class 2 in every cell of an image: best score 0.6.

    Random weights alone score next to nothing, in boxes that cover the whole image. Here nothing hangs on a rounding
    error: every score is far above the usual threshold, and no two boxes overlap enough to suppress one another.
    """
    content = torch.load(checkpoint, weights_only=False)
    head = content["model"].model[-1]
    with PyTorchRuntime().load(checkpoint, imgsz_px=IMGSZ_PX, threads=1) as session:
        scores = session(letterbox(read_image(image), IMGSZ_PX)[0])[0][:, 4 + 2]
    best = float(scores[..., : (IMGSZ_PX // 8) ** 2].max())  # of the finest level, whose anchors come first
    for raised, scoring, distances in zip((True, False, False), head.cv3, head.cv2, strict=True):
        scoring[-1].bias[2] += math.log(0.6 / 0.4) - math.log(best / (1 - best)) + 20.0 if raised else 0.0
        scoring[-1].bias -= 20.0
        distances[-1].weight *= 0.3
        distances[-1].bias.view(4, -1)[:, :3] += 4.0  # 0 to 2 cells from the centre
    torch.save(content, out)
    return out


def make(model: Path, out: Path, target: str, **more: Any) -> Path:
    return bundle(BundleConfig(model=str(model), target=target, out=str(out), imgsz=IMGSZ_PX, images=2, **more)).out


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bundle.json").read_text(encoding="utf-8"))


def assert_same(detections: list[dict[str, Any]], boxes: Any) -> None:
    """Compare what a runner printed with the host's boxes, in any order: within a pixel, and half precision's score."""
    found = np.array([[*one["box"], one["score"], one["class"]] for one in detections])
    expected = boxes.data.numpy()
    assert found.shape == expected.shape
    gaps = np.abs(found[:, None, :4] - expected[None, :, :4]).max(axis=2)
    rows, columns = linear_sum_assignment(gaps)
    assert gaps[rows, columns].max() <= 1
    assert np.abs(found[rows, 4] - expected[columns, 4]).max() <= 0.01
    assert (found[rows, 5] == expected[columns, 5]).all()


class Runner:
    """Runs the command line of a bundle in this process and captures what it prints."""

    def __init__(self, capsys) -> None:
        self.capsys = capsys

    def __call__(self, folder: Path, *words: object) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = main(folder, [str(word) for word in words])
        printed = self.capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err

    def refused(self, folder: Path, *words: object, code: int = 2) -> str:
        found, _, err = self(folder, *words)
        assert found == code
        assert "error: " in err
        return err

    def lines(self, folder: Path, *words: object) -> list[dict[str, Any]]:
        code, out, err = self(folder, "detect", *words)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]
