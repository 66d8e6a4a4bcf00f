"""One cut of a dense checkpoint by a peer, from file to file, in a process of its own: seconds and peak memory.

What is measured is one cut: a ratio that has to be found first is found before. The process of a peer that does not
finish is ended. Foreign classes are loaded in this process and in that of `bench_peers.py` alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from measured_job import Job, Meter, Outcome, answer
from peers import slimming, torch_pruned, torch_pruning_ratio

from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutJob(Job):
    """A cut.

    Attributes:
        peer: Who cuts.
        start: Dense checkpoint; of slimming, what its sparsity training made of it.
        out: Where the slim one shall stand.
        budget: Fraction of the MACs that is kept.
        imgsz_px: Image side at which they are counted.
        settings: Further settings of ours.
    """

    peer: str
    start: str
    out: str
    budget: float
    imgsz_px: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def cut(job: CutJob) -> Outcome:
    """Cut, and measure it."""
    start, out = Path(job.start), Path(job.out)
    if job.peer == "torch_pruning":
        with Meter(job):  # it may never end
            ratio = torch_pruning_ratio(start, job.budget, job.imgsz_px)
        with Meter(job) as meter:
            network = torch_pruned(start, ratio, job.imgsz_px)
            torch.save({"model": network.half(), "train_args": {}}, out)
        return {**meter.figures, "ratio": ratio}
    with Meter(job) as meter:
        if job.peer == "slimming":
            slimming(start, job.budget, job.imgsz_px, out)
        else:
            settings = {"target_macs": job.budget, "imgsz": job.imgsz_px, **job.settings}
            prune(PruneConfig(model=str(start), out=str(out), **settings))
    return meter.figures


if __name__ == "__main__":
    answer(cut, CutJob)
