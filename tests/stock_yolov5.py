"""Run in a process of its own, where yolo_prune cannot be imported: what stock YOLOv5 makes of a slim checkpoint.

python stock_yolov5.py SCRIPT FLAG...: runs val, detect or export of PyPI's yolov5, with what its users do for it
to run with current torch, numpy and no huggingface_hub.
"""

import contextlib
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from fresh_process import Blocked


def main(script: str) -> None:
    sys.meta_path.insert(0, Blocked())
    with contextlib.suppress(ModuleNotFoundError):  # what has to happen
        import yolo_prune  # noqa: F401

        sys.exit("yolo_prune can be imported: the test proves nothing")
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    import numpy as np
    import torch

    np.trapz = np.trapezoid
    torch.set_num_threads(1)
    module = importlib.import_module(f"yolov5.{script}")
    for name in ("utils.downloads", "models.common"):
        importlib.import_module(f"yolov5.{name}").attempt_download_from_hub = lambda *_, **__: None
    module.main()
    assert not [name for name in sys.modules if name.startswith("yolo_prune")]


if __name__ == "__main__":
    del sys.argv[0]
    main(sys.argv[0])
