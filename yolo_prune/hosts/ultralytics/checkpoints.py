"""Checkpoints of the host: read them without running their code, write slim ones that stock Ultralytics loads."""

from __future__ import annotations

import importlib
import re
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import BaseModel, torch_safe_load

from yolo_prune.errors import CheckpointError
from yolo_prune.files import sha256
from yolo_prune.hosts.refusals import first_line, host_errors_as, require_imgsz
from yolo_prune.hosts.slim import (
    MARKER,
    Checkpoint,
    checkpoint_content,
    lineage,
    mark,
    slim_content,
    unfinished,
    write_checkpoint,
)
from yolo_prune.plan import Cost, PrunePlan

LICENSE = "AGPL-3.0 (https://ultralytics.com/license)"
"""What the host writes into its checkpoints."""

SUPPORTED_TASKS = ("detect", "segment", "pose", "obb", "classify")
"""Tasks whose models can be pruned."""

DEPLOYED_TASKS = ("detect", "segment", "pose", "obb")
"""Tasks whose models can be fine-tuned, evaluated and exported with parity as well."""


def read_checkpoint(path: Path, *, in_training: bool = False) -> Checkpoint:
    """Read a checkpoint that can be pruned.

    The file is unpickled with the host's allow-list of torch and host classes: foreign code in it never runs.

    Args:
        path: The file.
        in_training: Accept a network that still has what a method adds to it while it is trained.

    Raises:
        CheckpointError: No such file, not a checkpoint, damaged, foreign classes, fused, a task without support, or a
            network in the middle of a training that changes it.
    """
    content = unpickle(path)
    module = (content.get("ema") or content.get("model")) if isinstance(content, dict) else None
    if not isinstance(module, nn.Module):
        raise CheckpointError(
            f"'{path}' holds no model",
            expected="a checkpoint with an Ultralytics model under 'ema' or 'model'",
            remedy="save the model itself, as `YOLO.save` does, not its state_dict",
        )
    if isinstance(module, DistillationModel):
        module = module.student_model
    model = _require_prunable(module, str(path))
    method = unfinished(model)
    if method is not None and not in_training:
        raise CheckpointError(
            f"'{path}' is in the middle of a training with method={method}, and has that method's structures",
            expected="a checkpoint of a training that has finished",
            remedy="go on with `yolo-prune train resume=true model=` its last.pt",
        )
    dtype = next(model.parameters()).dtype
    train_args = content.get("train_args")
    return Checkpoint(
        path=path,
        sha256=sha256(path),
        model=model.float().eval(),
        stored_dtype=dtype,
        train_args=dict(train_args) if isinstance(train_args, dict) else {},
    )


def read_deployable(path: Path, *, imgsz_px: int) -> Checkpoint:
    """Read a checkpoint for a command that deploys it, at a side of its input.

    Raises:
        CheckpointError: As `read_checkpoint`, or a task that is pruned only.
        ConfigError: The network's stride does not divide the side.
    """
    source = read_checkpoint(path)
    model: Any = source.model
    require_deployable(model, str(path))
    require_imgsz(imgsz_px, stride=int(model.stride.max()))
    return source


def load_model(name: str, *, in_training: bool = False) -> nn.Module:
    """Return the model of a checkpoint file, or one built from a yaml name.

    Raises:
        CheckpointError: As in `read_checkpoint` and `build_from_yaml`.
    """
    if name.endswith((".yaml", ".yml")):
        return build_from_yaml(name)
    return read_checkpoint(Path(name), in_training=in_training).model


def build_from_yaml(name: str) -> nn.Module:
    """Build a model with random weights from one of the host's yaml names (or a yaml file).

    Raises:
        CheckpointError: No such yaml, or a task without support.
    """
    from ultralytics import RTDETR, YOLO

    expected = "a model yaml of Ultralytics, such as yolov8n.yaml"
    with host_errors_as(CheckpointError, f"cannot build '{name}'", expected=expected):
        model = RTDETR(name).model if "rtdetr" in Path(name).stem else YOLO(name, verbose=False).model
    return _require_prunable(model, name).float().eval()


def write_slim(
    path: Path,
    slim: nn.Module,
    source: Checkpoint,
    plan: PrunePlan,
    *,
    dtype: torch.dtype,
    folded: bool = False,
    recalibrated: int = 0,
) -> None:
    """Write a slim checkpoint that stock Ultralytics loads, with its provenance in the marker attribute.

    Args:
        path: A new file.
        slim: The slim model; it is left as it is.
        source: The checkpoint that it was cut from.
        plan: The plan that was applied.
        dtype: Type of the stored weights; the source's own loses nothing if weights were only selected.
        folded: Whether constants of removed channels were folded in, for the record.
        recalibrated: Batches on which batch norms were recalibrated, for the record.

    Raises:
        OutputError: `path` exists or cannot be written.
    """
    content = slim_content(slim, source, plan, dtype=dtype, folded=folded, recalibrated=recalibrated)
    write_checkpoint(path, {**content, **_own_content(source)})


def write_rewritten(path: Path, model: nn.Module, source: Checkpoint, *, before: Cost, after: Cost, kind: str) -> None:
    """Write a checkpoint of a model that was rewritten, not cut; its marker says from what.

    Weights that were added up are new numbers, which half precision would round again: it is widened to float32.

    Args:
        path: A new file.
        model: The rewritten model; its marker is replaced.
        source: The checkpoint that it was made from.
        before: What the source's model costs.
        after: What the rewritten one costs.
        kind: Name of the rewriting, for the record.

    Raises:
        OutputError: `path` exists or cannot be written.
    """
    wide = torch.promote_types(source.stored_dtype, torch.float32)
    if hasattr(model, MARKER):
        delattr(model, MARKER)  # the source's: its plan is none of this model
    costs = {"before": asdict(before), "after": asdict(after)}
    mark(model, source_sha256=source.sha256, lineage=lineage(source), rewriting=kind, **costs)
    write_checkpoint(path, {**checkpoint_content(model.to(wide)), **_own_content(source)})


def _own_content(source: Checkpoint) -> dict[str, Any]:
    """Return what checkpoints of this host hold besides."""
    return {"train_args": source.train_args, "version": _host_version(), "license": LICENSE}


def is_fused(model: Any) -> bool:
    """Return whether convolutions lost their batch norms (the host's own test asks for complete fusion)."""
    from ultralytics.nn.modules.conv import Conv

    blocks = [module for module in model.modules() if isinstance(module, Conv)]
    return any(not hasattr(block, "bn") for block in blocks)


def require_deployable(model: nn.Module, name: str) -> None:
    """Refuse a model whose task is pruned only.

    Raises:
        CheckpointError: The task is none of `DEPLOYED_TASKS`.
    """
    task = task_of(model)
    if task not in DEPLOYED_TASKS:
        raise CheckpointError(
            f"'{name}' is a model for task '{task}': it can be inspected and pruned only",
            expected=f"for this command, one of: {', '.join(DEPLOYED_TASKS)}",
            remedy="evaluate and export the slim checkpoint with stock Ultralytics, which loads it",
        )


def unpickle(path: Path) -> Any:
    """Return what a checkpoint file holds; torch and host classes are built, other code never runs.

    Raises:
        CheckpointError: No such file, not a checkpoint, damaged, or foreign classes.
    """
    if not path.is_file():  # the host would look for it on the network
        raise CheckpointError(f"no file '{path}'", expected="a .pt checkpoint of Ultralytics", remedy="check the path")
    try:
        _allow_torchvision(path)
        return torch_safe_load(str(path), safe_only=True)[0]
    except Exception as error:  # damaged and foreign files reach the host's loader as half a dozen types
        raise CheckpointError(
            f"cannot read '{path}': {_what_is_wrong(path, error)}",
            expected="a complete .pt checkpoint of Ultralytics that names torch and Ultralytics classes only",
            remedy="check that the file is complete and was saved by stock Ultralytics; its code was not run",
        ) from error


def _allow_torchvision(path: Path) -> None:
    """Let the restricted unpickler build the torchvision layers that a checkpoint names: backbones of `TorchVision`.

    The host's own list has its transforms only. Nothing but subclasses of `nn.Module` is let in.
    """
    if not zipfile.is_zipfile(path):
        return
    allowed: list[Any] = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
        module, _, leaf = name.rpartition(".")
        if module.startswith(("torchvision.models.", "torchvision.ops.")):
            found = getattr(importlib.import_module(module), leaf, None)
            if isinstance(found, type) and issubclass(found, nn.Module):
                allowed.append(found)
    torch.serialization.add_safe_globals(allowed)


def _require_prunable(model: nn.Module, name: str) -> nn.Module:
    """Refuse fused models, tasks without support, and modules that are no model of the host."""
    if not isinstance(model, BaseModel):
        raise CheckpointError(
            f"'{name}' holds a {type(model).__name__}",
            expected="a model of Ultralytics",
            remedy="use best.pt or last.pt of a training run",
        )
    task = task_of(model)
    if task not in SUPPORTED_TASKS:
        raise CheckpointError(
            f"'{name}' is a model for task '{task}'",
            expected=f"one of: {', '.join(SUPPORTED_TASKS)}",
            remedy="use a checkpoint of one of these tasks",
        )
    if is_fused(model):
        raise CheckpointError(
            f"'{name}' is fused: its batch norms were folded into the convolutions",
            expected="a checkpoint as training saves it",
            remedy="use best.pt or last.pt of the training run",
        )
    return model


def task_of(model: nn.Module) -> str:
    """Return the task that a model is for; one that was not trained yet does not say."""
    from ultralytics.nn.tasks import guess_model_task

    return str(getattr(model, "task", None) or guess_model_task(model))


def _what_is_wrong(path: Path, error: Exception) -> str:
    """Say in words why a file cannot be unpickled; the loaders' own words are about their insides."""
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    foreign = re.search(r"GLOBAL (\S+)", f"{error} {error.__cause__}")
    if foreign and foreign[1].startswith(("models.yolo.", "yolov5.")):
        return f"it names '{foreign[1]}': it is classic YOLOv5's, for which there is `yolo-prune yolov5`"
    if foreign:
        return f"it names '{foreign[1]}', which belongs to neither torch nor Ultralytics"
    with path.open("rb") as stream:
        start = stream.read(2)
    if start == b"PK":  # an archive's directory stands at its end
        whole = zipfile.is_zipfile(path)
        return f"{type(error).__name__}: {first_line(error)}" if whole else "it is cut off or damaged"
    return "it is not a checkpoint" if start else "it is empty"


def _host_version() -> str:
    from ultralytics import __version__ as version

    return str(version)
