"""Make the types of TensorRT readable for the type checker: `python tools/tensorrt_types.py`, as `make types` does.

The package `tensorrt-stubs` holds the signatures of TensorRT 10.13, generated from its bindings. A few of them are not
Python, and mypy then reads none of the file. The repaired copy lies in `.typings`, where `mypy_path` finds it.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / ".typings"
REPAIRS = {
    " in: list[": " in_: list[",  # a keyword as a parameter's name
    "power: Weights = None, channel_axis: int)": "power: Weights = None, channel_axis: int = ...)",  # after defaults
}


def main() -> None:
    """Write the copy."""
    for file in importlib.metadata.files("tensorrt-stubs") or ():
        if file.suffix == ".pyi":
            text = file.read_text(encoding="utf-8")
            for wrong, right in REPAIRS.items():
                text = text.replace(wrong, right)
            copy = OUT / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
