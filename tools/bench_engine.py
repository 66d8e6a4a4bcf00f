"""Time and memory of the engine, beside Torch-Pruning's.

python tools/bench_engine.py [models=[yolov8n,yolov8x]] [repeats=5] [peer=false] [json=FILE]

Ours is trace, groups, one global plan by L2 magnitude for half the MACs, and apply; theirs is the nearest that
Torch-Pruning offers (see `torch_pruning_peer.py`). Each run is a process of its own and the two take turns. What is not
timed, alike for both: imports, building the model, and what torch loads on first use, which is shown apart.
Torch-Pruning gets the model as it comes and, where it fails on that, the model with C2f split. A failure is a row of
the table and is not repeated. Linux only. The host's yolov5n.yaml to yolov5x.yaml build yolov5nu to yolov5xu.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from engine_figures import AS_IT_IS, OURS, SPLIT, EngineFigures, failure
from measured_job import Job, Outcome, outcome_of
from source import engine_hash

from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, setting
from yolo_prune.device.machine import describe_machine
from yolo_prune.errors import MissingDependencyError

HERE = Path(__file__).parent
MODELS = [*(f"yolov5{scale}" for scale in "nsmlx"), *(f"yolov8{scale}" for scale in "nsmlx"), "yolo11n", "yolo26n"]


@dataclasses.dataclass(kw_only=True)
class BenchConfig:
    """Settings of the benchmark."""

    models: list[str] = setting(MODELS, help="yaml names, no suffix")
    repeats: int = setting(5, help="turns, each of one process a model and side")
    peer: bool = setting(True, help="also measure Torch-Pruning")
    threads: int = setting(1, help="threads of torch")
    limit_s: float = setting(120.0, help="longest that a job may take", unit="s")
    limit_gb: float = setting(12.0, help="most memory that a process may hold", unit="GB")
    json: str | None = json_setting("every figure")


def bench(config: BenchConfig) -> EngineFigures:
    """Measure all models in turns, so that a slow minute of the machine hits all of them.

    Raises:
        MissingDependencyError: Torch-Pruning is asked for and not installed.
    """
    if config.peer and importlib.util.find_spec("torch_pruning") is None:
        raise MissingDependencyError("torch-pruning", extra="bench", purpose="measure it too, unless peer=false")
    models: dict[str, dict[str, list[Outcome]]] = {name: {} for name in config.models}
    for turn in range(config.repeats):
        for name, sides in models.items():
            for side in due(sides, peer=config.peer):
                outcome = run(config, name, side)
                sides.setdefault(side, []).append(outcome)
                said = outcome.get("failure") or f"{outcome['seconds']:.2f} s"
                print(f"[{turn + 1}/{config.repeats}] {name}, {side}: {said}", file=sys.stderr, flush=True)
    packages = ("torch", "ultralytics", *(["torch-pruning"] if config.peer else []))
    machine = describe_machine({package: version(package) for package in packages})
    return EngineFigures(
        machine=dataclasses.asdict(machine), threads=config.threads, models=models, engine=engine_hash()
    )


def due(sides: dict[str, list[Outcome]], *, peer: bool) -> Iterator[str]:
    """Yield the sides of a model that have a run in this turn: none that failed, and the split once it is needed."""
    order = (OURS, AS_IT_IS) if peer else (OURS,)
    yield from (side for side in order if not failure(sides.get(side, ())))
    if failure(sides.get(AS_IT_IS, ())) and not failure(sides.get(SPLIT, ())):
        yield SPLIT


def run(config: BenchConfig, name: str, side: str) -> Outcome:
    """Measure one side of one model once."""
    job = Job(model=name, threads=config.threads, limit_s=config.limit_s, limit_gb=config.limit_gb, split=side == SPLIT)
    return outcome_of(HERE / ("engine_job.py" if side == OURS else "torch_pruning_peer.py"), job)


if __name__ == "__main__":
    sys.exit(script("Time and memory of the engine.", BenchConfig, lambda config: execute(bench, config)))
