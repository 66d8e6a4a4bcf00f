"""Stock Ultralytics in a process of its own, where yolo_prune cannot be imported: what it makes of slim checkpoints.

The process is kept for further folders, since its imports take seconds. python -I fresh_process.py: reads names of
folders, a line each. In each it loads every FOLDER/*.pt, gives it FOLDER/image.pth and writes the output tensors to
FOLDER/*.out; the answer is a line of JSON, null or what went wrong.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path


class Blocked:
    """Refuses to find yolo_prune, as an install that has never heard of it would."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:  # noqa: ARG002
        """Refuse the package and everything in it."""
        if name.partition(".")[0] == "yolo_prune":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


class FreshProcess:
    """The process, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def load(self, folder: Path) -> None:
        """Load every checkpoint of a folder and write what it answers.

        Raises:
            RuntimeError: What went wrong there.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = self._started()
        assert self._process.stdin is not None  # they are pipes
        assert self._process.stdout is not None
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        problem = json.loads(answer) if answer else "the process ended"
        if problem is not None:
            raise RuntimeError(f"stock Ultralytics on '{folder}': {problem}")

    def _started(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("ULTRALYTICS_SAFE_LOAD", None)  # stock as it comes, which alone loads torchvision's layers
        environment.pop("PYTHONPATH", None)
        process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        atexit.register(process.kill)
        return process


STOCK = FreshProcess()
"""The one process of whoever imports this."""


def answer_folder(folder: Path) -> None:
    """Load every checkpoint of a folder and write what it answers; yolo_prune must not be there."""
    import torch
    from torch.utils._pytree import tree_leaves
    from ultralytics import YOLO

    torch.set_num_threads(1)
    image = torch.load(folder / "image.pth")
    for file in sorted(folder.glob("*.pt")):
        model = YOLO(file).model.eval()
        with torch.no_grad():
            outputs = [leaf for leaf in tree_leaves(model(image)) if isinstance(leaf, torch.Tensor)]
        torch.save(outputs, file.with_suffix(".out"))
    assert not [name for name in sys.modules if name.startswith("yolo_prune")]
    try:
        import yolo_prune  # noqa: F401
    except ModuleNotFoundError:
        return
    raise AssertionError("yolo_prune can be imported: the test proves nothing")


def main() -> None:
    """Answer folders until no more come."""
    sys.meta_path.insert(0, Blocked())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the host prints
    for line in sys.stdin:
        try:
            answer_folder(Path(line.rstrip("\n")))
            problem = None
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        print(json.dumps(problem), file=answers, flush=True)


if __name__ == "__main__":
    main()
