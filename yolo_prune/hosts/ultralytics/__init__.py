"""The Ultralytics host: the only package that imports `ultralytics`."""

from __future__ import annotations

import os

# The host reads these once, when it is first imported, so they have to stand before any module of this package imports
# it. `setdefault`: who sets them has a reason.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # the host would otherwise pip-install what an export lacks
os.environ.setdefault("YOLO_OFFLINE", "1")  # and look for newer versions and for weights on the network
os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")  # a checkpoint may name torch and host classes, never run code
