"""Runtimes that tell their makers what is run with them, over the network: here they do not.

A device need not have a network, its owner was not asked, and both leave files in the user's home.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Iterator

_TELLING = "openvino_telemetry"


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Keep runtimes that are first imported within from it, for the life of the process.

    ONNX Runtime sends, from 1.29 on and not on Windows alone, what its Privacy.md lists; it reads this variable when it
    is imported, and processes that we start inherit it. A value that the user has set stays. OpenVINO sends every
    import through a package of its own, in whose absence it takes a stub.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    missing = _TELLING not in sys.modules
    if missing:
        sys.modules[_TELLING] = None  # type: ignore[assignment]  # how Python notes what cannot be imported
    try:
        yield
    finally:
        if missing:
            sys.modules.pop(_TELLING, None)
