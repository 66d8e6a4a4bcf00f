"""Checkpoints of classic YOLOv5: read with an allow-list, written so that its own val, detect and export load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo_prune.errors import CheckpointError
from yolo_prune.files import sha256
from yolo_prune.hosts.slim import Checkpoint, slim_content, write_checkpoint
from yolo_prune.hosts.yolov5.reading import load
from yolo_prune.hosts.yolov5.source import Classic
from yolo_prune.plan import PrunePlan


def read_checkpoint(classic: Classic, path: Path) -> Checkpoint:
    """Read a checkpoint that can be pruned; foreign code in it never runs.

    Raises:
        CheckpointError: No such file, not a checkpoint, damaged, foreign classes, fused, or no detector.
    """
    content = load(classic, path)
    module = (content.get("ema") or content.get("model")) if isinstance(content, dict) else None
    model = _require_prunable(classic, module, path)
    dtype = next(model.parameters()).dtype
    return Checkpoint(
        path=path, sha256=sha256(path), model=model.float().eval(), stored_dtype=dtype, train_args=_options(content)
    )


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
    """Write a slim checkpoint as train.py leaves its best.pt, with its provenance in the marker attribute.

    Args:
        path: A new file.
        slim: The slim model; it is left as it is.
        source: The checkpoint that it was cut from.
        plan: The plan that was applied.
        dtype: Type of the stored weights.
        folded: Whether constants of removed channels were folded in, for the record.
        recalibrated: Batches on which batch norms were recalibrated, for the record.

    Raises:
        OutputError: `path` exists or cannot be written.
    """
    content = slim_content(slim, source, plan, dtype=dtype, folded=folded, recalibrated=recalibrated)
    content["model"].requires_grad_(False)
    write_checkpoint(path, {**content, "opt": source.train_args, "git": None})


def require_trainable(model: nn.Module, path: Path) -> None:
    """Refuse a slim model whose batch norms were folded away.

    Raises:
        CheckpointError: It is fused.
    """
    blocks = [module for module in model.modules() if hasattr(module, "forward_fuse")]
    if any(not hasattr(block, "bn") for block in blocks):
        raise CheckpointError(
            f"'{path}' is fused: its batch norms were folded into the convolutions",
            expected="a checkpoint as training saves it",
            remedy="use best.pt or last.pt of the training run",
        )


def _options(content: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that a checkpoint was trained with, where it tells them."""
    options = content.get("opt")
    return dict(options) if isinstance(options, dict) else {}


def _require_prunable(classic: Classic, module: Any, path: Path) -> Any:
    """Refuse what holds no detector of the classic code, and fused ones."""
    code = classic.module("models.yolo")
    if not isinstance(module, code.DetectionModel):
        raise CheckpointError(
            f"'{path}' holds {'no model' if module is None else f'a {type(module).__name__}'}",
            expected="a checkpoint with a detector of classic YOLOv5 under 'ema' or 'model'",
            remedy="prune other models with `yolo-prune prune`",
        )
    head = module.model[-1]
    if isinstance(head, code.Segment) or not isinstance(head, code.Detect):
        raise CheckpointError(
            f"'{path}' is a model with head {type(head).__name__}", expected="a detector: other tasks are not supported"
        )
    if any(isinstance(layer, nn.MultiheadAttention) for layer in module.modules()):
        raise CheckpointError(
            f"'{path}' has transformer blocks (C3TR), whose widths torch checks by numbers of its own",
            expected="a detector without them, such as yolov5s",
        )
    require_trainable(module, path)
    return module
