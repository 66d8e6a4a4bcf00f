"""`profile`: how the latency of a network depends on its widths, on one device and backend, by timing candidates.

Every timed candidate is a line of `timings.jsonl` in a folder, which is only ever appended to; `profile.json` beside it
is what was learned, which `prune target_latency=` reads, on this machine or another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_prune.allocation import Constraints, WidthSolver
from yolo_prune.allocation.budget import lowest_go
from yolo_prune.allocation.latency import FEWEST, MULTIPLES, LatencyFit, fit_latency, structure_of
from yolo_prune.channels import ChannelGraph, IntArray
from yolo_prune.configuration import json_setting, require_choice, require_least, setting
from yolo_prune.device.benchmark import require_measurable
from yolo_prune.export.profile import RESULT, Profile, Target
from yolo_prune.files import write_json
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.hosts.ultralytics.checkpoints import read_deployable
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.pipeline.artefacts import FORMAT_OF, Variant
from yolo_prune.pipeline.benchmark import THREADS
from yolo_prune.pipeline.record import Record
from yolo_prune.pipeline.timing import this_machine, timing_beside
from yolo_prune.report import render

RECORD = "timings.jsonl"

PROBES = 16
"""Candidates of all multiples, which show the one that matters; the others have that one."""

NARROWEST = 0.1
"""Least fraction of a group that a candidate keeps, where its floor allows that."""


@dataclass(kw_only=True)
class ProfileConfig:
    """Settings of `profile`."""

    model: str = setting(help="checkpoint (.pt) whose slim versions are timed")
    out: str = setting(help="folder of the timings; one that exists goes on")
    backend: str = setting("onnxruntime", help=f"what runs them: {', '.join(FORMAT_OF)}")
    imgsz: int = setting(640, help="image side", unit="px")
    threads: int = setting(**THREADS)
    half: bool = setting(False, help="16-bit weights; engines compute in 16 bit")
    candidates: int = setting(40, help="networks that are timed")
    runs: int = setting(30, help="timed runs of each, in turn with the dense network")
    seed: int = setting(0, help="seed of the widths")
    json: str | None = json_setting("the profile")


@dataclass(frozen=True, kw_only=True)
class ProfileResult:
    """A profile, and the timings that it was made of."""

    profile: Profile
    lines: list[dict[str, Any]]
    path: Path
    model: str

    def to_json(self) -> dict[str, Any]:
        """Return the profile and the timings as plain values."""
        return {"profile": self.profile.to_json(), "timings": self.lines}

    def table(self) -> str:
        """Return how well timings are predicted, by how much was cut."""
        fit, rows = self.profile.fit, []
        for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01)):
            some = [line for line in self.lines if low <= line["macs_kept"] < high]
            if some:
                ratios = [line["ratio"] for line in some]
                place, seen = f"{low:.0%}..{min(high, 1.0):.0%}", f"{min(ratios):.3f}..{max(ratios):.3f}"
                rows.append([place, str(len(some)), seen])
        return (
            render(["MACs kept", "candidates", "latency, of the dense network's"], rows)
            + f"{self.profile.in_words()}, {self.profile.machine.cpu}: dense {self.profile.dense_ms:.1f} ms\n"
            + f"a candidate that the others predict: off by {fit.error:.1%} (median), {fit.worst:.1%} at most; "
            + f"widths count as padded to multiples of {fit.multiple}\n"
            + f"yolo-prune prune model={self.model} profile={self.path} target_latency=0.6 out=slim.pt\n"
        )


def profile(config: ProfileConfig) -> ProfileResult:
    """Time candidates and fit their latencies.

    Raises:
        YoloPruneError: Bad input, or a folder of other timings; what was timed stays.
    """
    require_choice("backend", config.backend, FORMAT_OF)
    target = Target(
        backend=config.backend, imgsz_px=config.imgsz, threads=config.threads,
        precision="fp16" if config.half else "fp32",
    )  # fmt: skip
    Variant(format=FORMAT_OF[target.backend], precision=target.precision, imgsz_px=config.imgsz).require_possible()
    require_measurable(threads=config.threads, runs=config.runs)
    require_least(config, candidates=PROBES + FEWEST, seed=0)
    source = read_deployable(Path(config.model), imgsz_px=config.imgsz)
    model: Any = source.model
    graph, machine, folder = trace_model(model), this_machine(config.backend), Path(config.out)
    settings = {
        "structure": structure_of(graph),
        "machine": asdict(machine),
        **asdict(target),
        "seed": config.seed,
    }
    with Record(folder, RECORD, settings, results=(RESULT,)) as record:
        wanted = [number for number in range(config.candidates) if number not in record.lines]
        if wanted:
            _time(config, target, source, graph, wanted, record)
        known = record.in_order()
        multiple = _multiple(graph, record)
        aligned = [line for line in known if line["multiple"] % multiple == 0]
        found = Profile(
            **asdict(target), machine=machine, candidates=len(known),
            dense_ms=float(np.median([line["dense_ms"] for line in known])),
            fit=_fitted(graph, aligned, [multiple]),
        )  # fmt: skip
        write_json(folder / RESULT, found.to_json(), replace=True)
    return ProfileResult(profile=found, lines=known, path=folder / RESULT, model=config.model)


def _time(
    config: ProfileConfig,
    target: Target,
    source: Checkpoint,
    graph: ChannelGraph,
    numbers: list[int],
    record: Record,
) -> None:
    """Time candidates, and append each to the record."""
    whole = float(graph.cost.macs(graph.widths(), imgsz_px=config.imgsz))
    scores = np.random.default_rng(config.seed).random(graph.channel_count)
    with timing_beside(source, graph, target, runs=config.runs) as beside:
        best: int | None = None
        for number in numbers:
            if number >= PROBES and best is None:
                best = _multiple(graph, record)
            widths, multiple = drawn(graph, seed=config.seed, number=number, multiple=best)
            timed = beside.time(lowest_go(graph, scores, widths))
            line = {
                "number": number,
                **asdict(timed),
                "multiple": multiple,
                "macs_kept": float(graph.cost.macs(widths, imgsz_px=config.imgsz)) / whole,
                "widths": widths.tolist(),
            }
            record.add(line)
            print(
                f"candidate {number + 1} of {config.candidates}: {line['macs_kept']:.0%} of the MACs, "
                f"{timed.ratio:.3f} of the latency",
                flush=True,
            )


def _multiple(graph: ChannelGraph, record: Record) -> int:
    """Return the multiple that the first candidates, which have all of them, speak for."""
    return _fitted(graph, record.in_order()[:PROBES], MULTIPLES).multiple


def _fitted(graph: ChannelGraph, lines: list[dict[str, Any]], multiples: Sequence[int]) -> LatencyFit:
    widths, ratios = np.array([line["widths"] for line in lines]), np.array([line["ratio"] for line in lines])
    return fit_latency(graph, widths, ratios, multiples=multiples)


def drawn(graph: ChannelGraph, *, seed: int, number: int, multiple: int | None = None) -> tuple[IntArray, int]:
    """Return the widths of a candidate, and what they are multiples of.

    As a whole it lies anywhere from nearly dense to narrow, each group by itself around that.

    Args:
        graph: The channel graph.
        seed: Of all candidates.
        number: Of this one.
        multiple: Of its widths; drawn if None.
    """
    generator = np.random.default_rng([seed, number])
    chosen = int(generator.choice(MULTIPLES))
    multiple = multiple or chosen
    solver = WidthSolver(graph, Constraints(min_channels=multiple, max_fraction=1.0 - NARROWEST, round_to=multiple))
    kept = generator.uniform(NARROWEST, 1.0) * generator.uniform(0.6, 1.4, size=len(solver.widths))
    return solver.settle(solver.widths * np.clip(kept, NARROWEST, 1.0)), multiple
