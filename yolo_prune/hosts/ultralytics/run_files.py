"""Files in the folder of a training: written whole, brought to one epoch on resume, read to see what is left to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import strip_optimizer

from yolo_prune.errors import CheckpointError
from yolo_prune.files import new_file
from yolo_prune.hosts.replacing import replaced
from yolo_prune.hosts.slim import widths
from yolo_prune.hosts.ultralytics.checkpoints import unpickle
from yolo_prune.hosts.ultralytics.grafting_files import first_net, state_of_nets
from yolo_prune.hosts.ultralytics.networks import network_of
from yolo_prune.hosts.ultralytics.records import FILES


class WholeFile(type(Path())):  # type: ignore[misc]  # the path class of this system
    """A path whose bytes are written completely or not at all: the host overwrites `last.pt` where it stands."""

    def write_bytes(self, data: Any) -> int:
        """Write a file beside it, then rename."""
        with new_file(Path(self), replace=True) as temporary:
            return temporary.write_bytes(data)


def forget_run(folder: Path) -> None:
    """Delete what an earlier run left in a folder that is used again: it would be taken for this run's state."""
    for pattern in [name for names in FILES.values() for name in names]:
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def forget_best(trainer: Any) -> None:
    """Let a training look for its best checkpoint anew: what was best until now is another network, a larger one."""
    trainer.best_fitness = None
    trainer.stopper.best_fitness, trainer.stopper.best_epoch = 0.0, trainer.epoch


def renew_best(last: Path, best: Path, *, structure: Callable[[nn.Module], Any] = widths) -> None:
    """Replace a best checkpoint of other widths, or of another structure, than the last one by that.

    The host writes the last one first: killed in between, right after channels went, it leaves a best one of the
    larger network, with a fitness that no slim one may ever reach.
    """
    if best.is_file() and last.is_file() and structure(network_in(best)) != structure(network_in(last)):
        with new_file(best, replace=True) as temporary:
            temporary.write_bytes(last.read_bytes())


def network_in(checkpoint: Path) -> nn.Module:
    """Return the network that a checkpoint of a training holds, as it is stored.

    Raises:
        CheckpointError: It cannot be read.
    """
    content = unpickle(checkpoint)
    network: nn.Module = network_of(content.get("ema") or content["model"])
    return network


def strip_whole(file: str | Path, s: str = "", updates: dict[str, Any] | None = None) -> dict[str, Any]:
    """Do as the host's `strip_optimizer`, with its arguments, but write the file completely or not at all.

    Raises:
        CheckpointError: It cannot be read.
        OutputError: It cannot be written.
    """
    target = Path(s or file)
    with new_file(target, replace=True) as temporary:
        with replaced(LOGGER, disabled=True):  # it would name the temporary file
            content: dict[str, Any] = strip_optimizer(file, str(temporary), updates)
        if not content:
            raise CheckpointError(f"'{file}' cannot be read back", expected="the checkpoint that was just written")
    LOGGER.info(f"Optimizer stripped from {target}, {target.stat().st_size / 1e6:.1f}MB")
    return content


def stripped(folder: Path) -> Path:
    """Strip the checkpoints of a run that was killed after its last epoch, and return its best one."""
    left = [path for name in ("best.pt", "last.pt") if (path := folder / "weights" / name).is_file()]
    for path in left:
        strip_whole(path)
    return left[0]


def drop_rows(results: Path, *, after: int) -> None:
    """Drop the rows of epochs that a resumed run repeats: the host writes a row before the checkpoint.

    Args:
        results: The host's results.csv.
        after: Epochs that are done.
    """
    head, *rows = results.read_text(encoding="utf-8").splitlines() if results.is_file() else [""]
    done = [row for row in rows if int(row.split(",")[0]) <= after]
    if len(done) < len(rows):
        with new_file(results, replace=True) as temporary:
            temporary.write_text("\n".join([head, *done, ""]), encoding="utf-8")


def interrupted(folder: Path) -> Literal["nothing", "resumable", "finished"]:
    """Say what a training, or several side by side, left in its folder."""
    state = state_of_nets(folder)
    if state is not None:
        return state
    try:
        content = unpickle(folder / "weights" / "last.pt")
    except CheckpointError:  # absent, or cut off while it was written: there is nothing to go on from
        return "nothing"
    return "resumable" if is_resumable(content) else "finished"


def last_checkpoint(folder: Path) -> Path:
    """Return the checkpoint from which an interrupted training in a folder is resumed."""
    return (first_net(folder) or folder) / "weights" / "last.pt"


def is_resumable(content: Any) -> bool:
    """Return whether epochs are left; the host strips the training state when it finishes, but not if killed then."""
    if not content or content.get("optimizer") is None:
        return False
    return 0 <= int(content.get("epoch", -1)) < int(content["train_args"]["epochs"]) - 1
