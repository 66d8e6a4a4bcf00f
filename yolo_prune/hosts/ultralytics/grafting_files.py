"""Files of a run whose networks are grafted: its record, and how networks side by side come back to one epoch.

A run of several networks has a folder for each. While one network has saved an epoch and another has not yet, the
checkpoints of the epoch before are there too: whenever it stops, there is an epoch that all have.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from yolo_prune import files
from yolo_prune.errors import CheckpointError
from yolo_prune.files import new_file, write_json
from yolo_prune.hosts.ultralytics.checkpoints import unpickle
from yolo_prune.hosts.ultralytics.records import FILES

(RECORD,) = FILES["grafting"]
"""What a run leaves in its folder: its settings, what was grafted after each epoch, and which network was the best."""

CHECKPOINTS = ("last", "best")
"""Names of a network's checkpoints in the order in which they are kept; they are restored in the other one."""


def grafting_record(folder: Path) -> dict[str, Any] | None:
    """Return the record in a folder; None without one.

    Raises:
        ConfigError: It is damaged.
    """
    return files.read_record(folder / RECORD)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a run."""
    write_json(folder / RECORD, record, replace=True)


def note_epoch(folder: Path, epoch: int, grafted: Any) -> None:
    """Add to the record what was grafted after an epoch, counted from 1; what a resumed run repeats is replaced."""
    record = grafting_record(folder) or {}
    done = [row for row in record["epochs"] if row["epoch"] < epoch]
    write_record(folder, {**record, "epochs": [*done, {"epoch": epoch, "grafted": grafted}]})


def run_folder(folder: Path) -> Path:
    """Return the folder of the run that a network's folder belongs to; the folder itself where it is no such."""
    record = grafting_record(folder.parent)
    return folder.parent if record is not None and folder.name in record["nets"] else folder


def epochs_done(net: Path) -> int:
    """Return the epochs that a network's last checkpoint has behind it; 0 without one."""
    return _epochs_in(_checkpoint(net, "last"))


def keep_previous(net: Path) -> None:
    """Copy the checkpoints of a network's folder before they are replaced by those of the next epoch."""
    for name in CHECKPOINTS:
        if _checkpoint(net, name).is_file():
            _copy(_checkpoint(net, name), _previous(net, name))


def go_back(nets: Sequence[Path]) -> int:
    """Bring all networks back to the last epoch that every one has saved; return how many epochs are done then.

    Whatever stops it half way, it can be done again.

    Raises:
        CheckpointError: There is no such epoch.
    """
    done = [epochs_done(net) for net in nets]
    common = min(done)
    for net, epochs in zip(nets, done, strict=True):
        if epochs > common:
            _restore_previous(net, common)
    return common


def forget_previous(nets: Sequence[Path]) -> None:
    """Delete the checkpoints that were kept for going back."""
    for net in nets:
        for name in CHECKPOINTS:
            _previous(net, name).unlink(missing_ok=True)


def forget_nets(folder: Path, nets: Sequence[Path]) -> None:
    """Delete the checkpoints of an earlier run in a folder that is used again."""
    (folder / "weights" / "best.pt").unlink(missing_ok=True)
    forget_previous(nets)
    for net in nets:
        for name in CHECKPOINTS:
            _checkpoint(net, name).unlink(missing_ok=True)


def state_of_nets(folder: Path) -> Literal["nothing", "resumable", "finished"] | None:
    """Say what a run of several networks left in its folder; None where there is no such run."""
    record = grafting_record(folder)
    if record is None or not record["nets"]:
        return None
    if (folder / "weights" / "best.pt").is_file():
        return "finished"
    return "resumable" if min(epochs_done(folder / name) for name in record["nets"]) else "nothing"


def first_net(folder: Path) -> Path | None:
    """Return the folder of the first network of a run of several; None where there is no such run."""
    record = grafting_record(folder)
    return folder / next(iter(record["nets"])) if record is not None and record["nets"] else None


def _restore_previous(net: Path, common: int) -> None:
    """Put the kept checkpoints back; the last one comes last, since it says whether there is anything to do."""
    if _epochs_in(_previous(net, "last")) != common:
        raise CheckpointError(
            f"'{net}' has no checkpoint of epoch {common}, the last one that every network has saved",
            expected=f"it in '{_previous(net, 'last').name}' or 'last.pt'",
            remedy="start the training anew",
        )
    if _previous(net, "best").is_file():
        _copy(_previous(net, "best"), _checkpoint(net, "best"))
    else:
        _checkpoint(net, "best").unlink(missing_ok=True)
    _copy(_previous(net, "last"), _checkpoint(net, "last"))


def _epochs_in(checkpoint: Path) -> int:
    if not checkpoint.is_file():
        return 0
    content = unpickle(checkpoint)
    stripped = content.get("optimizer") is None  # the host strips the training state when it finishes
    return int(content["train_args"]["epochs"]) if stripped else int(content["epoch"]) + 1


def _checkpoint(net: Path, name: str) -> Path:
    return net / "weights" / f"{name}.pt"


def _previous(net: Path, name: str) -> Path:
    return net / "weights" / f"previous_{name}.pt"


def _copy(source: Path, target: Path) -> None:
    with new_file(target, replace=True) as temporary:
        shutil.copyfile(source, temporary)
