"""What the hooks of sparsity training cost: steps with and without them, in turns, on one model in one process.

OMP_NUM_THREADS=1 python tools/bench_training.py [model=yolov8n.yaml] [imgsz=320] [batch=16] [steps=30] [json=FILE]

A step is what the host's trainer does: forward, loss, backward, clip, optimizer, EMA. Ratios are of neighbouring steps,
of which every second pair is the other way round, so that a slow minute of the machine hits both.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ultralytics.cfg import get_cfg
from ultralytics.utils.torch_utils import ModelEMA

from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, setting
from yolo_prune.device.machine import describe_machine
from yolo_prune.hosts.ultralytics.checkpoints import load_model
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.methods.slimming.penalty import ScalePenalty, penalised_channels
from yolo_prune.methods.slimming.strength import MODES
from yolo_prune.report import render


@dataclasses.dataclass(kw_only=True)
class BenchConfig:
    """Settings of the benchmark."""

    model: str = setting("yolov8n.yaml", help="checkpoint or yaml name of a detector")
    imgsz: int = setting(320, help="image side", unit="px")
    batch: int = setting(16, help="batch size", unit="images")
    steps: int = setting(30, help="pairs of steps of each mode")
    device: str = setting("cpu", help="device of the model")
    json: str | None = json_setting("every figure")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Seconds of each step, by mode: pairs of (without, with)."""

    config: dict[str, Any]
    machine: dict[str, Any]
    pairs: Mapping[str, list[tuple[float, float]]]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """Return one row a mode."""
        rows = []
        for mode, pairs in self.pairs.items():
            seconds = np.array(pairs)
            ratios = np.quantile(seconds[:, 1] / seconds[:, 0], (0.25, 0.5, 0.75))
            medians = 1e3 * np.median(seconds, axis=0)
            rows.append([mode, *(f"{value:.1f}" for value in medians), "{1:.3f} ({0:.3f}..{2:.3f})".format(*ratios)])
        return render(["mode", "ms without", "ms with", "ratio: median (quartiles)"], rows)


class Steps:
    """Training steps of one model on one batch."""

    def __init__(self, config: BenchConfig) -> None:
        model: Any = load_model(config.model)
        model.args = SimpleNamespace(**vars(get_cfg()))
        self.model = model.to(config.device).train().requires_grad_(True)
        self.graph = trace_model(load_model(config.model))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
        self.ema = ModelEMA(self.model)
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(config.batch, 3, config.imgsz, config.imgsz, generator=generator)
        boxes = torch.rand(4 * config.batch, 4, generator=generator) * 0.4 + 0.3
        self.batch = {
            "img": images.to(config.device),
            "batch_idx": torch.arange(config.batch).repeat_interleave(4).float().to(config.device),
            "cls": torch.zeros(4 * config.batch, 1, device=config.device),
            "bboxes": boxes.to(config.device),
        }

    def penalty(self, mode: Any) -> ScalePenalty:
        """Return a penalty that is not attached yet."""
        chosen = penalised_channels(self.graph)
        penalty = ScalePenalty(self.graph, dict(self.model.named_parameters()), chosen, mode=mode)
        penalty.strength = 1e-3
        return penalty

    def step(self) -> float:
        """Take a step and return its seconds."""
        started = time.perf_counter()
        loss, _ = self.model(self.batch)
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)
        if self.batch["img"].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def bench(config: BenchConfig) -> StepFigures:
    """Take pairs of steps with every mode."""
    steps, pairs = Steps(config), {}
    for mode in MODES:
        penalty = steps.penalty(mode)
        steps.step()
        pairs[mode] = [_pair(steps, penalty, first=bool(turn % 2)) for turn in range(config.steps)]
    machine = describe_machine({package: version(package) for package in ("torch", "ultralytics")})
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "json"}
    return StepFigures(config=settings, machine=dataclasses.asdict(machine), pairs=pairs)


def _pair(steps: Steps, penalty: ScalePenalty, *, first: bool) -> tuple[float, float]:
    """Return the seconds of a step without and of one with the hooks; `first`: the one with them comes first."""
    seconds = {}
    for hooked in (first, not first):
        if hooked:
            penalty.attach(steps.optimizer)
        seconds[hooked] = steps.step()
        penalty.detach()
    return seconds[False], seconds[True]


if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n")[0]
    sys.exit(script(summary, BenchConfig, lambda config: execute(bench, config)))
