"""Time and memory of the engine: trace + groups + plan + apply, each model in a process of its own.

python tools/bench_engine.py [models=[yolov8n,yolov8x]] [repeats=5] [json=FILE]

Memory is the peak of the whole process, interpreter, libraries and dense model included, before the proof (verify),
which is timed apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from yolo_prune.cli import execute, report
from yolo_prune.configuration import parse, setting
from yolo_prune.errors import YoloPruneError
from yolo_prune.report import render


@dataclasses.dataclass(kw_only=True)
class BenchConfig:
    """Settings of the benchmark."""

    models: list[str] = setting(["yolov8n", "yolov8s", "yolov8m", "yolov8l", "yolov8x"], help="yaml names, no suffix")
    repeats: int = setting(5, help="timed repetitions a model, each in a process of its own")
    json: str | None = setting(None, help="also write every figure to this JSON file; must not exist")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineTimes:
    """Figures of every process, by model."""

    figures: dict[str, list[dict[str, float]]]

    def to_json(self) -> dict[str, object]:
        """Return the figures as plain values."""
        return dict(self.figures)

    def table(self, *, markdown: bool = False) -> str:
        """Return the median of every figure, one row a model."""
        keys = list(next(iter(self.figures.values()))[0])
        rows = [
            [name, *(f"{statistics.median(run[key] for run in runs):.2f}" for key in keys)]
            for name, runs in self.figures.items()
        ]
        return render(["model", *keys], rows, markdown=markdown)


def measure(name: str) -> dict[str, float]:
    """Time one model in this process."""
    from yolo_prune.allocation import Allocation, Budget, allocate
    from yolo_prune.hosts.ultralytics.checkpoints import build_from_yaml
    from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, verifier
    from yolo_prune.importance import CRITERIA, score_channels

    model = build_from_yaml(f"{name}.yaml")
    marks = [time.perf_counter()]
    trace_model(build_from_yaml("yolov8n.yaml"))  # what torch loads and prepares on first use is shown apart
    first_use_s = time.perf_counter() - marks.pop()
    marks = [time.perf_counter()]
    graph = trace_model(model)
    marks.append(time.perf_counter())
    scores = score_channels(graph, dict(model.state_dict()), CRITERIA["l2"])
    keep = allocate(graph, scores, Budget(unit="macs", ratio=0.5), Allocation())
    marks.append(time.perf_counter())
    slim = slim_copy(model, graph, keep)
    marks.append(time.perf_counter())
    memory = peak_gb()
    verifier(model, graph).verify(slim, keep).require()
    marks.append(time.perf_counter())
    trace_s, plan_s, apply_s, verify_s = (after - earlier for earlier, after in itertools.pairwise(marks))
    return {
        "first use s": first_use_s,
        "trace s": trace_s,
        "plan s": plan_s,
        "apply s": apply_s,
        "engine s": trace_s + plan_s + apply_s,
        "verify s": verify_s,
        "peak GB": memory,
    }


def peak_gb() -> float:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def bench(config: BenchConfig) -> EngineTimes:
    """Measure all models in turns, so that a slow minute of the machine hits all of them."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in config.models}
    for turn in range(config.repeats):
        for name in config.models:
            command = [sys.executable, str(Path(__file__)), "measure", name]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures[name].append(json.loads(answer.strip().splitlines()[-1]))
            print(f"[{turn + 1}/{config.repeats}] {name}: {figures[name][-1]['engine s']:.2f} s", file=sys.stderr)
    return EngineTimes(figures=figures)


def main() -> int:
    """Run the benchmark; returns the exit code."""
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2])))
        return 0
    try:
        print(execute(bench, parse(BenchConfig, sys.argv[1:])[0]), end="")
    except YoloPruneError as error:
        return report(error, debug=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
