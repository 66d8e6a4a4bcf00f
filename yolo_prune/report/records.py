"""What a run folder holds, as a report shows it; `reading` fills these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MODELS = {
    "dense": "the model before pruning",
    "slim": "pruned and fine-tuned",
    "control": "the slim shapes, from random weights",
    "direct": "pruned once, without the method",
    "smaller": "the next smaller scale",
}
"""What a run trains, by the names of its records, in the order of tables."""

PRECISION = "mAP50-95"
"""Heading of the figure that stands for accuracy."""

HASHES = "files_sha256"
"""Key of the record of settings that is not one of them: hashes of the files that they name."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Order statistics of interleaved timings, in milliseconds."""

    median: float
    p5: float
    p25: float
    p75: float
    p95: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of a run.

    Attributes:
        name: One of `MODELS`.
        macs: Multiply-adds of a forward, batch 1; None where no record tells.
        params: Trainable parameters.
        epochs: Epochs that it was trained for within the run, as asked; one that patience ended had fewer.
        precisions: Mean average precisions by their headings, by split.
        latency_ms: By backend.
        speed_up: Record of the comparison with the dense model, by backend.
    """

    name: str
    macs: int | None
    params: int | None
    epochs: int
    precisions: Mapping[str, Mapping[str, float]]
    latency_ms: Mapping[str, Latency]
    speed_up: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far an exported artefact agrees with PyTorch; what an older record does not tell is empty or None."""

    artefact: str
    backend: str
    precision: str
    max_rel: float | None
    tolerance: float | None


@dataclass(frozen=True, kw_only=True)
class Width:
    """Output channels of a layer, or of a channel group; after is None where the slim model has no such layer."""

    name: str
    before: int
    after: int | None


@dataclass(frozen=True, kw_only=True)
class SparsityEpoch:
    """Scales of the penalised channels after an epoch; see `methods.slimming.health.EpochHealth`."""

    epoch: int
    strength: float
    silent: float
    macs: float
    histogram: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SparsityCourse:
    """A sparsity training.

    Attributes:
        model: Which of the run's models was trained so.
        silent_below: Scale below which a channel is called silent.
        largest: Upper end of the histograms, which begin at zero.
        epochs: In order; the first is the start.
    """

    model: str
    silent_below: float
    largest: float
    epochs: tuple[SparsityEpoch, ...]


@dataclass(frozen=True, kw_only=True)
class MethodCourse:
    """What a method of training did to a model.

    Attributes:
        model: Which of the run's models was trained so.
        method: A key of `methods.TOLD`.
        facts: What its record tells, as names and values in words.
        macs: Epochs, from 1, and the fraction of the start's MACs that is left after them; empty where none go.
    """

    model: str
    method: str
    facts: tuple[tuple[str, str], ...]
    macs: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A scored candidate of a search.

    Attributes:
        number: Its number.
        macs: At the image side of the search.
        params: Parameters.
        score: mAP50-95 on held-out training images, recalibrated, before any fine-tune.
        latency: Predicted fraction of the dense model's; None if no profile predicted it.
    """

    number: int
    macs: int
    params: int
    score: float
    latency: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A candidate that was scored and then fine-tuned."""

    recalibrated: float
    as_pruned: float
    fine_tuned: float


@dataclass(frozen=True, kw_only=True)
class Detections:
    """The detections of several models on one image.

    Attributes:
        image: Name of the image.
        pictures: File name, below the run's folder, and number of objects, by model.
        confidence: Least confidence that is drawn.
    """

    image: str
    pictures: Mapping[str, tuple[str, int]]
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run folder tells.

    Attributes:
        folder: The folder.
        settings: Those that it was made with.
        models: In the order of `MODELS`.
        splits: On which mAP was measured.
        backends: On which latency was measured.
        proof: max |silenced - sliced| of the cut in fp64; None if nothing was cut or no record tells.
        parity: Of every exported artefact.
        machine: What it was timed on.
        version: Of the package that made the run; empty in older records.
        widths: Before and after, in the order of the model.
        sparsity: Of every training that had a penalty.
        methods: Of every training that did something else to its network.
        search: Candidates of the search whose plan was applied.
        predicted_on: For what a profile predicted the latencies of these, in words.
        tuned: Candidates with what their fine-tunes brought.
        detections: One an image.
        missing: What is not there, in words.
    """

    folder: Path
    settings: Mapping[str, Any]
    models: tuple[Model, ...]
    splits: tuple[str, ...]
    backends: tuple[str, ...]
    proof: float | None = None
    parity: tuple[Parity, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    widths: tuple[Width, ...] = ()
    sparsity: tuple[SparsityCourse, ...] = ()
    methods: tuple[MethodCourse, ...] = ()
    search: tuple[Candidate, ...] = ()
    predicted_on: str = ""
    tuned: tuple[Tuned, ...] = ()
    detections: tuple[Detections, ...] = ()
    missing: tuple[str, ...] = ()

    def model(self, name: str) -> Model | None:
        """Return the model of that name, if the run has it."""
        return next((model for model in self.models if model.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "folder": str(self.folder)}
