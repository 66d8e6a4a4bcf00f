"""One process at a time in a folder that work goes on in: two would undo each other's files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from yolo_prune.errors import OutputError
from yolo_prune.files import cannot_write

LOCK = ".lock"
"""Its file in the folder. It is empty and stays: what counts is the system's lock on it, which ends with a process."""


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes while the block runs. A process that is killed lets go.

    Args:
        folder: The folder; it is made where it is missing.

    Raises:
        OutputError: Another process works in it, or it cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"another process works in '{folder}'",
            expected="one process at a time in a folder",
            remedy="let it end, or choose another folder",
        ) from error
    except NotImplementedError:
        pass  # a file system without locks, as some network disks are: as good as before there was one
    except OSError as error:
        raise cannot_write(folder / LOCK, error) from error
    try:
        yield
    finally:
        lock.release()
