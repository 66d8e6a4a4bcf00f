"""What a benchmark found: written as JSON, read back, and shown as rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Mapping, Sequence

from yolo_prune.device.conditions import Conditions
from yolo_prune.device.image_to_boxes import ImageToBoxes
from yolo_prune.device.machine import Machine
from yolo_prune.device.memory import PeakMemory
from yolo_prune.device.timings import LatencySummary, SpeedUp
from yolo_prune.errors import ConfigError


@dataclass(frozen=True)
class BenchmarkEntry:
    """What is known of one artefact.

    Attributes:
        name: The caller's name for it.
        backend: Name of the runtime, with the variant.
        latencies_ms: Forward passes alone: one latency a round, in order.
        size_bytes: On disk; None in records that are older than this figure, as for the next two.
        memory: Resident memory; None where it was not measured.
        image_to_boxes: The whole way; None where it was not measured.
    """

    name: str
    backend: str
    latencies_ms: tuple[float, ...]
    size_bytes: int | None = None
    memory: PeakMemory | None = None
    image_to_boxes: ImageToBoxes | None = None

    @property
    def summary(self) -> LatencySummary:
        """Order statistics of the forward passes."""
        return LatencySummary.of(self.latencies_ms)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value; the summaries are included for readers."""
        value = {**asdict(self), "summary": asdict(self.summary)}
        if self.image_to_boxes is not None:
            whole = self.image_to_boxes
            summary = {stage: asdict(figures) for stage, figures in whole.summary.items()}
            value["image_to_boxes"] = {**asdict(whole), "summary": summary}
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BenchmarkEntry:
        """Undo `to_json`."""
        known = {key: item for key, item in value.items() if key != "summary"}
        memory, whole = known.get("memory"), known.get("image_to_boxes")
        stages = {key: tuple(times_ms) for key, times_ms in (whole or {}).items() if key != "summary"}
        parts = {
            "latencies_ms": tuple(known["latencies_ms"]),
            "memory": PeakMemory(**memory) if memory else None,
            "image_to_boxes": ImageToBoxes(**stages) if whole else None,
        }
        return cls(**{**known, **parts})


@dataclass(frozen=True)
class BenchmarkReport:
    """The latencies of several artefacts, timed in turns.

    Attributes:
        imgsz_px: Side of the square input.
        threads: CPU threads of every runtime.
        runs: Timed rounds.
        warmup: Untimed rounds before them.
        machine: What it was measured on.
        entries: One an artefact, in the caller's order.
        batch: Images in a call.
        conditions: What the machine did meanwhile; None in older records.
    """

    imgsz_px: int
    threads: int
    runs: int
    warmup: int
    machine: Machine
    entries: tuple[BenchmarkEntry, ...]
    batch: int = 1
    conditions: Conditions | None = None

    def entry(self, name: str) -> BenchmarkEntry:
        """Return the entry of that name, or raise `ConfigError`."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        known = ", ".join(f"'{entry.name}'" for entry in self.entries)
        raise ConfigError(f"no entry '{name}' in the benchmark", expected=f"one of {known}", remedy="correct the name")

    def speed_up(self, name: str, baseline: str, *, to_boxes: bool = False) -> SpeedUp:
        """Compare an entry with a baseline.

        Args:
            name: The entry.
            baseline: What it is compared with.
            to_boxes: Compare the whole way from an image to boxes instead of forward passes.

        Raises:
            ConfigError: One of them is not in the report or was not timed so, or they ran on different backends, whose
                difference would be taken for the model's.
        """
        entry, reference = self.entry(name), self.entry(baseline)
        if entry.backend != reference.backend:
            raise ConfigError(
                f"'{name}' ran on {entry.backend}, '{baseline}' on {reference.backend}",
                expected="a baseline on the same backend",
                remedy="benchmark the baseline's artefact for that backend too",
            )
        times_ms, baseline_ms = (_latencies_ms(one, to_boxes=to_boxes) for one in (entry, reference))
        return SpeedUp.between(name, times_ms, baseline=baseline, baseline_ms=baseline_ms)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value; summaries and warnings are included for readers."""
        warnings = self.conditions.warnings() if self.conditions else []
        return {**asdict(self), "entries": [entry.to_json() for entry in self.entries], "warnings": warnings}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BenchmarkReport:
        """Undo `to_json`; what older versions did not measure is left open.

        Raises:
            ConfigError: It is not the record of a benchmark, or one of a newer version.
        """
        try:
            conditions = value.get("conditions")
            parts = {
                "machine": Machine(**value["machine"]),
                "entries": tuple(BenchmarkEntry.from_json(item) for item in value["entries"]),
                "conditions": Conditions.from_json(conditions) if conditions else None,
            }
            return cls(**{key: item for key, item in {**value, **parts}.items() if key != "warnings"})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"cannot read the record of a benchmark: {error!r}",
                expected="what this version of yolo-prune or an older one wrote",
                remedy="measure again, or read it with the version that wrote it",
            ) from error


def _latencies_ms(entry: BenchmarkEntry, *, to_boxes: bool) -> Sequence[float]:
    """Return what is compared of an entry."""
    if not to_boxes:
        return entry.latencies_ms
    if entry.image_to_boxes is None:
        raise ConfigError(f"'{entry.name}' was not timed from image to boxes", remedy="benchmark it with boxes=true")
    return entry.image_to_boxes.latencies_ms
