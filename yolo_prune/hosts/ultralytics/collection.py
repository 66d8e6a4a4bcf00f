"""What training batches tell of a network's channels: the host's images, labels and loss, without its augmentation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.cfg import get_cfg
from ultralytics.data import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import TQDM

from yolo_prune.channels import ChannelGraph
from yolo_prune.errors import DataError
from yolo_prune.hosts.refusals import host_errors_as
from yolo_prune.hosts.ultralytics.checkpoints import require_deployable, task_of
from yolo_prune.hosts.ultralytics.distillation import bare_copy
from yolo_prune.hosts.ultralytics.evaluation import read_data, require_kpt_shape, require_split
from yolo_prune.importance import Evidence, collect
from yolo_prune.importance.evidence import Need


def collect_evidence(
    model: nn.Module,
    graph: ChannelGraph,
    *,
    needs: Collection[Need],
    data: Path,
    imgsz_px: int,
    batches: int,
    batch: int,
    workers: int,
    device: str = "cpu",
) -> Evidence:
    """Run letterboxed training images through a copy of a model and gather what criteria need of them.

    Norms keep the statistics of their training: those of a few batches would add noise to the gradients.

    Args:
        model: A model of the host; it is left as it is.
        graph: Its channel graph.
        needs: What is gathered.
        data: Data yaml.
        imgsz_px: Side of the images.
        batches: How many batches; fewer if the split has fewer.
        batch: Images per batch.
        workers: Loader processes.
        device: Where it runs.

    Raises:
        DataError: The yaml or its training split is missing, or does not fit the model.
        CheckpointError: A task that is pruned only.
    """
    require_deployable(model, str(data))
    require_kpt_shape(model, read_data(data), str(data))
    require_split(data, "train")
    with host_errors_as(
        DataError,
        f"Ultralytics cannot train on '{data}'",
        expected="images with labels of the model's classes",
        remedy="correct the data; --debug shows where it stopped",
    ):
        copy: Any = bare_copy(model).to(device)
        copy.args = get_cfg(overrides={"task": task_of(copy), "data": str(data), "imgsz": imgsz_px})
        copy.criterion = None
        loader = _training_images(copy, data, batch=batch, workers=workers)
        copy.train()
        for module in copy.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return collect(copy, graph, _first(loader, batches, device), _loss, needs=needs)


def _training_images(model: Any, data: Path, *, batch: int, workers: int) -> Any:
    """Return the host's loader of letterboxed training images in random, reproducible order."""
    description = check_det_dataset(str(data))
    if description["nc"] != model.model[-1].nc:
        raise DataError(
            f"'{data}' has {description['nc']} classes", expected=f"{model.model[-1].nc}, as the model was trained for"
        )
    settings = SimpleNamespace(**{**vars(model.args), "batch": batch, "workers": workers, "rect": False})
    stride = max(int(model.stride.max()), 32)
    images = build_yolo_dataset(settings, description["train"], batch, description, mode="val", stride=stride)
    torch.manual_seed(0)  # the loader's order
    return build_dataloader(images, min(batch, len(images)), workers, shuffle=True, pin_memory=False, device="cpu")


def _first(loader: Any, count: int, device: str) -> Iterator[dict[str, Any]]:
    """Yield the first batches of a loader as the host's loss wants them, with a progress bar."""
    count = min(count, len(loader))
    for _, batch in zip(range(count), TQDM(loader, total=count, desc="importance"), strict=False):
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        yield {**moved, "img": moved["img"].float() / 255}


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    loss: Tensor = model(batch)[0]
    return loss
