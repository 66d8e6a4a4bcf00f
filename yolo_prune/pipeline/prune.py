"""`prune`: a slim, proven checkpoint of the Ultralytics host."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

from torch import nn

from yolo_prune.channels import ChannelGraph
from yolo_prune.export.profile import Profile
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint, write_slim
from yolo_prune.hosts.ultralytics.collection import TrainingImages, collect_evidence, recalibrate_on
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, verifier
from yolo_prune.importance import Evidence
from yolo_prune.importance.evidence import Need
from yolo_prune.pipeline.latency import require_same_machine
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.pipeline.pruning import PruneResult, PruningHost, prune_with
from yolo_prune.pipeline.timing import Beside, this_machine, timing_beside

RUNS = 60
"""Timed rounds of a network whose latency is promised."""


def _collect(model: nn.Module, graph: ChannelGraph, needs: Collection[Need], config: PruneConfig) -> Evidence:
    return collect_evidence(model, graph, _images(config, config.batches, config.imgsz), needs=needs)


def _recalibrate(model: nn.Module, config: PruneConfig, imgsz_px: int) -> int:
    return recalibrate_on(model, _images(config, config.recalibrate, imgsz_px))


def _images(config: PruneConfig, batches: int, imgsz_px: int) -> TrainingImages:
    return TrainingImages(
        data=Path(str(config.data)),
        imgsz_px=imgsz_px,
        batches=batches,
        batch=config.batch,
        workers=config.workers,
    )


@contextlib.contextmanager
def _timing(source: Checkpoint, graph: ChannelGraph, profile: Profile) -> Iterator[Beside]:
    require_same_machine(profile, this_machine(profile.backend))
    with timing_beside(source, graph, profile, runs=RUNS) as beside:
        yield beside


ULTRALYTICS = PruningHost(
    read=read_checkpoint,
    trace=trace_model,
    cut=slim_copy,
    verifier=verifier,
    write=write_slim,
    collect=_collect,
    recalibrate=_recalibrate,
    timing=_timing,
)


def prune(config: PruneConfig) -> PruneResult:
    """Prune a checkpoint, prove the result, then write it.

    Raises:
        YoloPruneError: Bad input (nothing is written), or a proof that failed (nothing is written).
    """
    return prune_with(ULTRALYTICS, config)
