"""The command line inside the test's process, and what it leaves on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from yolo_prune.cli import main


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
