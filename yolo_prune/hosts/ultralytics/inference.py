"""A checkpoint as the host runs it: fused, float32, in evaluation mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from yolo_prune.errors import CheckpointError
from yolo_prune.hosts.ultralytics.checkpoints import unpickle
from yolo_prune.hosts.ultralytics.refusals import loading


def load_for_inference(path: Path, *, end_to_end: bool | None = None) -> nn.Module:
    """Load a checkpoint the way the host's `AutoBackend` does before it predicts.

    Args:
        path: A `.pt` checkpoint of the host.
        end_to_end: For twin heads (v10, 26): true selects the one-to-one head, whose output (1, k, 6) needs no NMS,
            false the one-to-many head, whose output is (1, 4 + classes, anchors); None keeps the checkpoint's own mode.

    Returns:
        The model on the CPU: batch norms fused into convolutions, float32, no gradients. Called with images
        (B, 3, H, W) in [0, 1] it returns the decoded predictions, alone or first of a tuple; for task segment these are
        a tuple themselves, with the prototypes (B, masks, H / 4, W / 4) second.

    Raises:
        CheckpointError: The file is missing, is not a checkpoint of the host, or has no head of the wanted kind.
    """
    model = _load(path)
    if end_to_end is not None and hasattr(model, "end2end"):
        model.end2end = end_to_end
    if end_to_end is not None and is_end_to_end(model) != end_to_end:
        raise CheckpointError(
            f"checkpoint '{path.name}' has no {'one-to-one' if end_to_end else 'one-to-many'} head",
            expected="a checkpoint with the head that the artefact was exported from",
            remedy="compare the artefact with the checkpoint that it was made of, before fusion",
        )
    return model.fuse(verbose=False).float().eval().requires_grad_(False)


def is_end_to_end(model: nn.Module) -> bool:
    """Return whether a host model answers with final detections (1, k, 6 or more), not with one column per anchor."""
    return bool(getattr(model, "end2end", False))


def task_rows(model: Any) -> dict[str, list[int]]:
    """Return which rows of the decoded predictions hold what besides box and class scores, behind which they come.

    Args:
        model: A model of the host.

    Returns:
        Rows, counted from 0, by name: `mask_coefficients` (segment), `angles` in radians (obb), `key_points` in pixels
        and their `visibility` (pose; the latter if a key point has three values). Empty for detection.
    """
    head = model.model[-1]
    if hasattr(head, "kpt_shape"):
        count, values = head.kpt_shape
        rows = {"key_points": [row for row in range(count * values) if row % values < 2]}
        return rows | ({"visibility": list(range(2, count * values, 3))} if values == 3 else {})
    for name, attribute in (("mask_coefficients", "nm"), ("angles", "ne")):
        if hasattr(head, attribute):
            return {name: list(range(getattr(head, attribute)))}
    return {}


def _load(path: Path) -> Any:
    """Read the model of a checkpoint, unfused."""
    from ultralytics.nn.tasks import load_checkpoint

    unpickle(path)  # the host itself would run foreign code, unless told otherwise before it was first imported
    with loading(path):
        model, _ = load_checkpoint(path)
    return model
