"""One run of the engine for `bench_engine.py`: trace, groups, one global plan by magnitude for half the MACs, apply.

The slim model is a copy, so the memory holds both. The proof runs afterwards, timed apart.
"""

from __future__ import annotations

import itertools
import time

import torch
from measured_job import Job, Meter, Outcome, answer, tiny_network

from yolo_prune.allocation import Allocation, Budget, allocate
from yolo_prune.channels import BoolArray, ChannelGraph, trace
from yolo_prune.hosts.ultralytics.checkpoints import build_from_yaml
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, trace_side, verifier
from yolo_prune.importance import Evidence, score_channels
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.surgery import counted_macs


def planned(graph: ChannelGraph, model: torch.nn.Module, ratio: float) -> BoolArray:
    """Choose the channels to keep."""
    scores = score_channels(graph, Evidence(tensors=model.state_dict()), CRITERIA["l2"])
    return allocate(graph, scores, Budget(unit="macs", ratio=ratio), Allocation())


def measure(job: Job) -> Outcome:
    """Measure one model in this process."""
    model = build_from_yaml(f"{job.model}.yaml")
    first_use_s = warm_up()
    marks = []
    with Meter(job) as meter:
        marks.append(time.perf_counter())
        graph = trace_model(model)
        marks.append(time.perf_counter())
        keep = planned(graph, model, 0.5)
        marks.append(time.perf_counter())
        slim = slim_copy(model, graph, keep)
        marks.append(time.perf_counter())
    verifier(model, graph).verify(slim, keep).require()
    marks.append(time.perf_counter())
    steps = ("trace_s", "plan_s", "apply_s", "verify_s")
    image = torch.zeros(1, 3, trace_side(model), trace_side(model))
    return {
        **meter.figures,
        **{step: after - before for step, (before, after) in zip(steps, itertools.pairwise(marks), strict=True)},
        "first_use_s": first_use_s,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs_kept": counted_macs(slim, image) / counted_macs(model, image),
    }


def warm_up() -> float:
    """Do the whole job on a tiny network; return the seconds."""
    started, network = time.perf_counter(), tiny_network()
    graph = trace(network, torch.zeros(1, 3, 16, 16))
    slim_copy(network, graph, planned(graph, network, 0.9))
    return time.perf_counter() - started


if __name__ == "__main__":
    answer(measure, Job)
