"""`prune`: a slim, proven checkpoint of the Ultralytics host."""

from __future__ import annotations

from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint, write_slim
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, verifier
from yolo_prune.pipeline.pruning import PruneConfig, PruneResult, PruningHost, prune_with

ULTRALYTICS = PruningHost(read=read_checkpoint, trace=trace_model, cut=slim_copy, verifier=verifier, write=write_slim)


def prune(config: PruneConfig) -> PruneResult:
    """Prune a checkpoint, prove the result, then write it.

    Raises:
        YoloPruneError: Bad input (nothing is written), or a proof that failed (nothing is written).
    """
    return prune_with(ULTRALYTICS, config)
