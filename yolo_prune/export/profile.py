"""What timings of slim networks beside the dense one tell: of a single network, and of all widths on a device."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_prune.allocation.latency import LatencyFit
from yolo_prune.device.benchmark_record import BenchmarkEntry
from yolo_prune.device.machine import Machine
from yolo_prune.device.runtimes import RUNTIMES
from yolo_prune.device.runtimes.base import Precision
from yolo_prune.errors import ConfigError

RESULT = "profile.json"
"""Its file in the folder of its timings."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Latency of a slim artefact beside the dense one.

    Attributes:
        ratio: Median over rounds of slim / dense: what is left of the latency. A `SpeedUp` has it the other way round.
        p25: Lower quartile of these.
        p75: Upper quartile.
        slim_ms: Median.
        dense_ms: Median.
    """

    ratio: float
    p25: float
    p75: float
    slim_ms: float
    dense_ms: float

    @classmethod
    def between(cls, slim: BenchmarkEntry, dense: BenchmarkEntry) -> Timed:
        """Compare two entries of the same rounds."""
        ratios = np.asarray(slim.latencies_ms) / np.asarray(dense.latencies_ms)
        p25, ratio, p75 = (float(value) for value in np.percentile(ratios, [25, 50, 75]))
        return cls(ratio=ratio, p25=p25, p75=p75, slim_ms=slim.summary.median_ms, dense_ms=dense.summary.median_ms)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What latencies are measured of.

    Attributes:
        backend: One of `RUNTIMES`.
        imgsz_px: Side of the square input.
        threads: Of the runtime.
        precision: How artefacts store their weights; engines compute in it.
    """

    backend: str
    imgsz_px: int
    threads: int
    precision: Precision = "fp32"

    def in_words(self) -> str:
        """Name it in a line of text."""
        half = "" if self.precision == "fp32" else f", {self.precision}"
        return f"{self.backend}, {self.imgsz_px} px, {self.threads} threads{half}"


@dataclass(frozen=True, kw_only=True)
class Profile(Target):
    """What is known of the latency of a network on a device.

    Attributes:
        machine: What it was timed on.
        candidates: Networks that were timed.
        dense_ms: Median latency of the dense network.
        fit: What was learned.
    """

    machine: Machine
    candidates: int
    dense_ms: float
    fit: LatencyFit

    def require_side(self, imgsz_px: int) -> None:
        """Refuse to predict for another image side than that of the timings.

        Raises:
            ConfigError: It is another.
        """
        if imgsz_px != self.imgsz_px:
            raise ConfigError(
                f"imgsz={imgsz_px}",
                expected=f"{self.imgsz_px}, at which the profile was measured",
                remedy=f"imgsz={self.imgsz_px}, or another profile",
            )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read `profile.json`, or that of a folder.

        Raises:
            ConfigError: It cannot be read.
        """
        file = profile_file(path)
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            if value["backend"] not in RUNTIMES:
                raise ValueError(f"backend {value['backend']!r}, none of {', '.join(RUNTIMES)}")
            return cls(**{**value, "machine": Machine(**value["machine"]), "fit": LatencyFit.from_json(value["fit"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"cannot read profile '{file}': {error!r}",
                expected="what `yolo-prune profile` wrote",
                remedy="yolo-prune profile model=... measures one",
            ) from error


def profile_file(path: Path) -> Path:
    """Return the file of a profile, which may be named by its folder."""
    return path / RESULT if path.is_dir() else path
