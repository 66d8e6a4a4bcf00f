"""Bundles for tests: made once a session, copied before anything is done to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from yolo_prune.device.runner import main
from yolo_prune.pipeline.bundle import BundleConfig, bundle

IMGSZ_PX = 64
NAME = "räk smörgås"
"""A folder's name as people give them."""


def make(model: Path, out: Path, target: str, **more: Any) -> Path:
    return bundle(BundleConfig(model=str(model), target=target, out=str(out), imgsz=IMGSZ_PX, images=2, **more)).out


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bundle.json").read_text(encoding="utf-8"))


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
