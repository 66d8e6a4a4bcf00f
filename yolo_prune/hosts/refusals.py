"""Refusing bad input, whatever the host: its errors in our words, and sizes that it would change silently."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from yolo_prune.errors import ConfigError, YoloPruneError


@contextlib.contextmanager
def host_errors_as(kind: type[YoloPruneError], failure: str, *, expected: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever the host raises into one error.

    Args:
        kind: The error to raise.
        failure: What failed; the host's own words follow it.
        expected: See `YoloPruneError`.
        remedy: See `YoloPruneError`.

    Raises:
        YoloPruneError: Of that kind.
    """
    try:
        yield
    except YoloPruneError:
        raise
    except Exception as error:
        raise kind(f"{failure}: {first_line(error)}", expected=expected, remedy=remedy) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without the host's decoration."""
    return str(error).strip().split("\n")[0].removeprefix("ERROR ❌️ ") or type(error).__name__


def require_imgsz(imgsz_px: int, *, stride: int = 32) -> None:
    """Refuse an image side that the host would change with a warning only.

    Raises:
        ConfigError: `imgsz_px` is not a positive multiple of `stride`.
    """
    if imgsz_px < stride or imgsz_px % stride:
        nearest = stride * max(1, round(imgsz_px / stride))
        raise ConfigError(
            f"imgsz={imgsz_px}", expected=f"a multiple of the model's stride {stride}", remedy=f"imgsz={nearest}"
        )
