"""Writing files so that nothing of the user's is ever lost.

A file appears under its name complete or not at all: it is written under a temporary name beside it and then linked or
renamed. An existing file is never overwritten unless it is ours to replace.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from yolo_prune.errors import ConfigError, OutputError

Made = TypeVar("Made")

OURS = ".yolo_prune."
"""In the name of every temporary file and folder: what a user's hidden file is called nobody knows."""


def refuse_existing(path: Path) -> None:
    """Raise `OutputError` if `path` exists: to be called before long work, not only at its end."""
    if path.exists() or path.is_symlink():
        raise OutputError(
            f"output '{path}' already exists",
            expected="a path where nothing stands yet: files are never overwritten",
            remedy="choose another name or move the old file away",
        )


def require_writable(path: Path) -> None:
    """Raise `OutputError` if `path` exists or cannot be written: to be called before long work. Nothing is left."""
    refuse_existing(path)
    require_writable_folder(path)


def require_writable_folder(path: Path) -> None:
    """Raise `OutputError` if the folder of `path`, there or still to be made, cannot be written. Nothing is left."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def require_new_outputs(outputs: Mapping[str, str | None]) -> None:
    """Refuse outputs of one command that exist or that would overwrite each other: to be called before any work.

    Args:
        outputs: Path by the name of the setting; None where it is not given.

    Raises:
        ConfigError: Two of them are one file.
        OutputError: One of them exists.
    """
    paths = [Path(path) for path in outputs.values() if path]
    if len({path.resolve() for path in paths}) < len(paths):
        *names, last = (f"{name}=" for name in outputs)
        raise ConfigError(
            "two outputs have the same path", expected=f"a file of its own for {', '.join(names)} and {last}"
        )
    for path in paths:
        refuse_existing(path)


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error for an output that the file system refuses."""
    return OutputError(
        f"cannot write '{path}': {error.strerror or error}",
        expected="a writable folder with enough room",
        remedy="choose another output path or free space; no part of it was left behind",
    )


@contextlib.contextmanager
def parent_folders(path: Path) -> Iterator[None]:
    """Make the missing parent folders of `path`; on failure those that were made, and are empty, vanish again.

    Raises:
        OSError: A folder cannot be made.
    """
    missing = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it becomes `path`, on failure it vanishes.

    Args:
        path: Where the finished file shall stand. Missing parent folders are made.
        replace: Allow an earlier file of that name to be replaced (records and stage files of our own).

    Raises:
        OutputError: `path` exists and `replace` is false, the folder cannot be written, or the disk is full.
    """
    if not replace:
        refuse_existing(path)
    try:
        with parent_folders(path), _temporary_beside(path) as temporary:
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(0o644)  # mkstemp makes private files; a result is an ordinary one
            if replace:
                temporary.replace(path)
            else:
                _claim(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on failure it vanishes.

    Args:
        path: Where the finished folder shall stand. Missing parent folders are made.

    Raises:
        OutputError: `path` exists, or it cannot be written.
    """
    refuse_existing(path)
    try:
        with parent_folders(path):
            temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), dir=path.parent))
            try:
                yield temporary
                temporary.chmod(0o755)  # mkdtemp makes private folders; a result is an ordinary one
                refuse_existing(path)
                temporary.replace(path)  # of what came up meanwhile, an empty folder at most is replaced
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def temporary_prefix(path: Path) -> str:
    """Return how the names of temporary files and folders begin that are to become `path`."""
    return f".{path.stem}{OURS}"


def is_temporary(path: Path) -> bool:
    """Return whether a path has a name of `new_file` or `new_folder`; one without its process was left by a kill."""
    return re.fullmatch(rf"\..+{re.escape(OURS)}[a-z0-9_]{{8}}(\.[^.]+)?", path.name) is not None


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """Yield an empty file in the folder of `path` that vanishes at the end unless it was renamed."""
    handle, name = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _claim(temporary: Path, path: Path) -> None:
    """Give a finished file its name, failing if the name was taken meanwhile (a hard link is atomic and exclusive)."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        refuse_existing(path)
    except OSError:  # file systems without hard links (exFAT on an SD card)
        refuse_existing(path)
        temporary.replace(path)


def write_json(path: Path, value: Any, *, replace: bool = False) -> None:
    """Write `value` as indented JSON through `new_file`."""
    with new_file(path, replace=replace) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the JSON object that a run left in a file; None where there is none.

    Raises:
        ConfigError: It is damaged.
    """
    return from_record(path, dict)


def from_record(path: Path, make: Callable[[dict[str, Any]], Made]) -> Made | None:
    """Return what can be made of the JSON object that a run left in a file; None where there is none.

    Args:
        path: The file.
        make: May raise KeyError, TypeError or ValueError on what a run would not have written.

    Raises:
        ConfigError: It is damaged.
    """
    if not path.is_file():
        return None
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot read '{path}': {error!r}",
            expected="the record that the training wrote",
            remedy="put it back, or start a new training",
        ) from error


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append `value` as a line of JSON to an append-only record, in one write that reaches the disk.

    A last line that a kill cut off is closed first, so that it stays the only one that is lost.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as stream:
            torn = False
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                torn = stream.read(1) != b"\n"
            stream.write((("\n" if torn else "") + json.dumps(value) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an append-only record of JSON, without one that a kill cut off; an absent file has none."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
