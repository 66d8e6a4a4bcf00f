"""Run in a process of its own: load slim checkpoints where yolo_prune cannot be imported and write their outputs.

python -I fresh_process.py FOLDER: reads FOLDER/*.pt and FOLDER/image.pth, writes FOLDER/*.out: the output tensors.
"""

from __future__ import annotations

import sys
from pathlib import Path


class Blocked:
    """Refuses to find yolo_prune, as an install that has never heard of it would."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:  # noqa: ARG002
        """Refuse the package and everything in it."""
        if name.partition(".")[0] == "yolo_prune":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def main(folder: Path) -> None:
    """Load every checkpoint of a folder and write what it answers."""
    sys.meta_path.insert(0, Blocked())
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
    sys.exit("yolo_prune can be imported: the test proves nothing")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
