"""What training images tell of a network: of its channels by the loss, of its norms by what flows through them."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import DEFAULT_CFG_DICT, TQDM

from yolo_prune.channels import ChannelGraph
from yolo_prune.errors import CheckpointError, DataError
from yolo_prune.hosts.refusals import host_errors_as
from yolo_prune.hosts.ultralytics.augmentation import AUGMENTATION, AugmentedImages
from yolo_prune.hosts.ultralytics.checkpoints import DEPLOYED_TASKS, task_of
from yolo_prune.hosts.ultralytics.evaluation import read_data, require_kpt_shape, require_split
from yolo_prune.hosts.ultralytics.networks import bare_copy
from yolo_prune.importance import Criterion, Evidence, FloatArray, collect, score_channels
from yolo_prune.importance.evidence import Need
from yolo_prune.search import recalibrate

GAINS = ("box", "cls", "dfl", "pose", "kobj", "rle", "angle")
"""Training keys of the host that weigh the parts of its loss."""


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """Training images as the model was trained on them: augmented, in random order, but the same ones every time.

    Attributes:
        data: Data yaml.
        imgsz_px: Side of the images.
        batches: How many batches; fewer if the split has fewer.
        batch: Images per batch.
        workers: Loader processes.
        device: Where models run on them.
        description: What the host's trainer made of the data yaml; read anew if absent.
    """

    data: Path
    imgsz_px: int
    batches: int
    batch: int
    workers: int
    device: str = "cpu"
    description: Mapping[str, Any] | None = None


def images_of(trainer: Any, *, batches: int) -> TrainingImages:
    """Return the images of a training that runs, for what is measured between its epochs."""
    return TrainingImages(
        data=Path(trainer.args.data),
        imgsz_px=int(trainer.args.imgsz),
        batches=batches,
        batch=min(trainer.train_loader.batch_size, 16),  # in float32, beside what training holds on its device
        workers=0,
        device=str(trainer.device),
        description=trainer.data,
    )


def collect_evidence(
    model: nn.Module, graph: ChannelGraph, images: TrainingImages, *, needs: Collection[Need]
) -> Evidence:
    """Run training images through a copy of a model and gather what criteria need of them.

    Norms keep the statistics of their training: those of a few batches would add noise to the gradients.

    Args:
        model: A model of the host; it is left as it is.
        graph: Its channel graph.
        images: What it looks at.
        needs: What is gathered.

    Raises:
        DataError: The yaml or its training split is missing, or does not fit the model.
        CheckpointError: A task that is pruned only.
    """
    copy = bare_copy(model).to(images.device)
    batches = training_batches(copy, images)
    copy.args = get_cfg(overrides={**trained_with(model, GAINS), "task": task_of(copy), "imgsz": images.imgsz_px})
    copy.criterion = None
    copy.train()
    for module in copy.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return collect(copy, graph, batches, _loss, needs=needs)


def scored_on(model: nn.Module, graph: ChannelGraph, criterion: Criterion, images: TrainingImages) -> FloatArray:
    """Return one score per channel, shape (channels,), by training images where the criterion needs some.

    Args:
        model: A model of the host; it is left as it is.
        graph: Its channel graph.
        criterion: Scores channels.
        images: What it looks at.

    Raises:
        DataError: The yaml or its training split is missing, or does not fit the model.
        CheckpointError: A task that is pruned only.
    """
    needs = criterion.needs
    evidence = collect_evidence(model, graph, images, needs=needs) if needs else Evidence.of(model)
    return score_channels(graph, evidence, criterion)


def trained_with(model: Any, keys: Iterable[str]) -> dict[str, Any]:
    """Return the training settings that a model was, or is, trained with; none where it does not say."""
    arguments = getattr(model, "args", None) or {}
    known = arguments if isinstance(arguments, Mapping) else vars(arguments)
    return {key: known[key] for key in keys if key in DEFAULT_CFG_DICT and known.get(key) is not None}


def recalibrate_on(model: nn.Module, images: TrainingImages) -> int:
    """Measure a model's batch-norm statistics anew on training images, in place; return the number of batches.

    Raises:
        DataError: The yaml or its training split is missing, or does not fit the model.
        CheckpointError: A task that is pruned only.
    """
    copy = bare_copy(model).to(images.device)
    count = recalibrate(copy, training_batches(copy, images), lambda network, batch: network(batch["img"]))
    measured = dict(copy.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(measured[name])
    return count


def training_batches(model: Any, images: TrainingImages) -> Iterator[dict[str, Any]]:
    """Return augmented batches as the host's loss wants them, with a progress bar.

    Raises:
        DataError: The yaml or its training split is missing, or does not fit the model.
        CheckpointError: A task that is pruned only.
    """
    return first_batches(shuffled(augmented_images(model, images), images), images)


def shuffled(dataset: Any, images: TrainingImages) -> DataLoader[Any]:
    """Return a loader that makes the same batches in any number of processes, which the host's own does not."""
    return DataLoader(
        dataset,
        batch_size=images.batch,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        num_workers=images.workers,
        collate_fn=dataset.collate_fn,
    )


def augmented_images(model: Any, images: TrainingImages, indices: Sequence[int] | None = None) -> AugmentedImages:
    """Return training images as the model was trained on them; as the host augments by default if it does not say.

    Args:
        model: Says how.
        images: Which dataset, and how large.
        indices: Which of its images; all by default.

    Raises:
        DataError: The yaml or its training split is missing, or does not fit the model.
        CheckpointError: A task that is pruned only.
    """
    dataset = training_dataset(model, images, augmented=True)
    return AugmentedImages(dataset, range(len(dataset)) if indices is None else indices)


def training_dataset(model: Any, images: TrainingImages, *, augmented: bool = False) -> Any:
    """Return the host's dataset of training images: letterboxed as it validates, or augmented as the model was trained.

    Raises:
        DataError: The yaml or its training split is missing, or does not fit the model.
        CheckpointError: A task that is pruned only.
    """
    data = images.data
    if task_of(model) not in DEPLOYED_TASKS:
        raise CheckpointError(
            f"training images of data={data} for a model of task '{task_of(model)}'",
            expected=f"one of: {', '.join(DEPLOYED_TASKS)}",
            remedy="leave data= out: criteria that look at weights only prune it",
        )
    require_kpt_shape(model, images.description or read_data(data), str(data))
    if images.description is None:
        require_split(data, "train")
    with host_errors_as(
        DataError,
        f"Ultralytics cannot train on '{data}'",
        expected="images with labels of the model's classes",
        remedy="correct the data; --debug shows where it stopped",
    ):
        description = dict(images.description or check_det_dataset(str(data)))
        if description["nc"] != model.model[-1].nc:
            raise DataError(
                f"'{data}' has {description['nc']} classes",
                expected=f"{model.model[-1].nc}, as the model was trained for",
            )
        single = images.description is not None and description["nc"] == 1  # the trainer may have made one of many
        overrides = {"task": task_of(model), "imgsz": images.imgsz_px, "single_cls": single}
        settings = get_cfg(overrides={**trained_with(model, AUGMENTATION if augmented else ()), **overrides})
        mode, stride = "train" if augmented else "val", max(int(model.stride.max()), 32)
        return build_yolo_dataset(settings, description["train"], images.batch, description, mode=mode, stride=stride)


def first_batches(loader: Any, images: TrainingImages) -> Iterator[dict[str, Any]]:
    """Yield the first batches of a loader as models want them, with a progress bar."""
    count = min(images.batches, len(loader))
    state = random.getstate()  # the host's dataset draws from it, and so does a training that goes on afterwards
    try:
        for _, batch in zip(range(count), TQDM(loader, total=count, desc="training images"), strict=False):
            moved = {k: value.to(images.device) if isinstance(value, Tensor) else value for k, value in batch.items()}
            yield {**moved, "img": moved["img"].float() / 255}
    finally:
        random.setstate(state)


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    loss: Tensor = model(batch)[0]
    return loss
