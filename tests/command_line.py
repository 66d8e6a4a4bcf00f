"""The command line inside the test's process, words for it, and what it leaves on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from yolo_prune.cli import VERBS, main

PRUNE = ("out=slim.pt", "target_macs=0.5")
"""What `prune` needs besides a model."""


KEY_VERBS = [name for name, verb in VERBS.items() if not verb.flags]
"""Commands that take `key=value`."""

MODEL_VERBS = [name for name in KEY_VERBS if name not in ("report", "compare")]
"""Those that read a checkpoint."""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


class Command:
    """Runs `yolo-prune` and captures what it prints."""

    def __init__(self, capsys) -> None:
        self.capsys = capsys

    def __call__(self, *words: object) -> Outcome:
        self.capsys.readouterr()
        code = main([str(word) for word in words])
        printed = self.capsys.readouterr()
        return Outcome(code, printed.out, printed.err)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes, and every folder under a name that ends in a slash."""
    paths = {path: path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {
        f"{name}/" if path.is_dir() else name: b"" if path.is_dir() else path.read_bytes()
        for path, name in paths.items()
    }


def write_yaml(path: Path, value: object) -> Path:
    path.write_text(yaml.safe_dump(value))
    return path


def run_settings(desk: Path, data: Path, /, **more: object) -> Path:
    """Write settings of `run` that are right but for what `more` says."""
    settings = {"model": "yolov8n.yaml", "data": str(data), "out": str(desk / "run"), "imgsz": 64}
    return write_yaml(
        desk / "run.yaml", {**settings, "train": {"epochs": 1}, "prune": {"target_macs": 0.5}, "formats": [], **more}
    )


def words_of(verb: str, model: Path, data: Path, desk: Path) -> list[str]:
    """Return words that make a verb read a checkpoint, all else being right."""
    more = {
        "inspect": [],
        "prune": [*PRUNE],
        "rewrite": ["out=plain.pt"],
        "search": [f"data={data}", "target_macs=0.5", "out=search"],
        "cliff": [f"data={data}", "out=cliff"],
        "sensitivity": [f"data={data}", "out=sensitivity"],
        "profile": ["out=profile", "imgsz=64"],
        "train": [f"data={data}", "epochs=1"],
        "finetune": [f"data={data}", "epochs=1"],
        "evaluate": [f"data={data}"],
        "export": ["out=artefacts"],
        "bundle": ["target=cpu", "out=bundle"],
    }
    if verb == "benchmark":
        return [verb, f"models=[{model}]", "imgsz=64"]
    if verb == "run":
        return [verb, str(run_settings(desk, data)), f"model={model}"]
    return [verb, f"model={model}", *more[verb]]
