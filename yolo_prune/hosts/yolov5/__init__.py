"""The host of classic YOLOv5: the only package that imports its code, a repository's or that of PyPI's `yolov5`."""

from __future__ import annotations

import os

# The classic code reads these when it is first imported. `setdefault`: who sets them has a reason.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # it would otherwise pip-install what its requirements name
os.environ.setdefault("YOLOv5_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_OFFLINE", "1")
