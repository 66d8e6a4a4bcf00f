"""What a run folder holds, as a report shows it: typed, checked once, and whole or not.

A run that was killed, or that an older version made, lacks parts; the report says which. A part that is there and
damaged is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from yolo_prune.errors import ConfigError
from yolo_prune.files import read_lines
from yolo_prune.report.summary import in_words

Made = TypeVar("Made")

MODELS = {
    "dense": "the model before pruning",
    "slim": "pruned and fine-tuned",
    "control": "the slim shapes, from random weights",
    "direct": "pruned once, without the method",
    "smaller": "the next smaller scale",
}
"""What a run trains, by the names of its records, in the order of tables."""

HASHES = "files_sha256"
"""Key of the record of settings that is not one of them: hashes of the files that they name."""

PART = {"map50": "mAP50", "map50_95": "mAP50-95"}


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
class Candidate:
    """A scored candidate of a search: mAP50-95 on held-out training images, recalibrated, before any fine-tune."""

    number: int
    macs: int
    params: int
    score: float


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
        search: Candidates of the search whose plan was applied.
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
    search: tuple[Candidate, ...] = ()
    tuned: tuple[Tuned, ...] = ()
    detections: tuple[Detections, ...] = ()
    missing: tuple[str, ...] = ()

    def model(self, name: str) -> Model | None:
        """Return the model of that name, if the run has it."""
        return next((model for model in self.models if model.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "folder": str(self.folder)}


def read_run(folder: Path, *, search: Path | None = None, tuned: Path | None = None) -> Run:
    """Read the records of a run.

    Args:
        folder: Of the run.
        search: Folder of a search; by default that of the plan which the run applied, if it is there.
        tuned: Record of candidates that were scored and fine-tuned (`tools/bench_search.py`).

    Raises:
        ConfigError: No run, or a damaged record.
    """
    settings = read(folder / "run.json", dict)
    if settings is None:
        raise ConfigError(f"'{folder}' holds no run: no 'run.json'", expected="the folder that `run` calls out=")
    summarized = folder / "summary.json"
    summary = read(summarized, dict) or read_part(folder / "stages", lambda: _unfinished(folder))
    models = read_part(summarized, lambda: _models(summary, settings))
    applied = read_part(folder / "run.json", lambda: _search_of(settings))
    courses = [read(folder / name / "sparsity.json", _course_of(name)) for name in ("dense", "slim")]
    found = Run(
        folder=folder,
        settings=settings,
        models=models,
        splits=tuple(dict.fromkeys(split for model in models for split in model.precisions)),
        backends=tuple(dict.fromkeys(backend for model in models for backend in model.latency_ms)),
        proof=read_part(summarized, lambda: _number(summary.get("verification") or {}, "max_abs_error")),
        parity=read_part(summarized, lambda: _parities(summary.get("parity") or {})),
        machine=read_part(summarized, lambda: dict(summary.get("machine") or {})),
        version=str(summary.get("version", "")),
        widths=_widths(folder),
        sparsity=tuple(course for course in courses if course is not None),
        search=_candidates(search if search is not None else applied, required=search is not None),
        tuned=_tuned(tuned),
        detections=read(folder / "stages" / "detections.json", _detections) or (),
    )
    return _with_missing(found)


def read(path: Path, make: Callable[[Any], Made]) -> Made | None:
    """Return what can be made of a record; None where there is none.

    Raises:
        ConfigError: It is damaged.
    """
    if not path.is_file():
        return None
    return read_part(path, lambda: make(json.loads(path.read_text(encoding="utf-8"))))


def read_part(path: Path, make: Callable[[], Made]) -> Made:
    """Return what `make` makes of a record, or raise `ConfigError` where it is not what a run writes."""
    try:
        return make()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"cannot read '{path}': {error!r}",
            expected="the record that the run wrote",
            remedy="put it back, or run the same command again in a new folder",
        ) from error


def _unfinished(folder: Path) -> dict[str, Any]:
    """Return of a run without a summary what its stages tell."""
    stages = folder / "stages"
    evaluations = {name: read(stages / f"evaluate_{name}.json", dict) for name in MODELS}
    pruned: dict[str, Any] = read(stages / "prune.json", dict) or read(stages / "pruned.json", dict) or {}
    plan, rewritten = pruned.get("plan") or {}, read(stages / "rewrite.json", dict) or {}
    costs = {"dense": rewritten.get("before") or plan.get("before"), "slim": plan.get("after")}
    exports = {
        path.stem.removeprefix("export_"): read(path, dict) or {} for path in sorted(stages.glob("export_*.json"))
    }
    return {
        "costs": {name: cost for name, cost in costs.items() if cost},
        "verification": pruned.get("verification"),
        "evaluations": {name: found for name, found in evaluations.items() if found},
        "parity": {name: record["parity"] for name, record in exports.items() if record and "parity" in record},
    }


def _models(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Model, ...]:
    costs, evaluations = summary.get("costs") or {}, summary.get("evaluations") or {}
    others = [name for name in {**costs, **evaluations} if name not in MODELS]
    return tuple(_model(name, summary, settings) for name in (*MODELS, *others) if name in costs or name in evaluations)


def _model(name: str, summary: Mapping[str, Any], settings: Mapping[str, Any]) -> Model:
    cost = (summary.get("costs") or {}).get(name) or {}
    splits = (summary.get("evaluations") or {}).get(name) or {}
    timings = {
        entry.removeprefix(f"{name}_"): _latency(found)
        for entry, found in (summary.get("latency_ms") or {}).items()
        if entry.startswith(f"{name}_")
    }
    against = summary.get("speed_up") if name == "slim" else (summary.get("control_speed_up") or {}).get(name)
    return Model(
        name=name,
        macs=None if "macs" not in cost else int(cost["macs"]),
        params=None if "params" not in cost else int(cost["params"]),
        epochs=epochs_of(name, settings),
        precisions={split: _precisions(figures) for split, figures in splits.items()},
        latency_ms=timings,
        speed_up={backend: _speed_up(found) for backend, found in (against or {}).items()},
    )


def _latency(found: Mapping[str, Any]) -> Latency:
    return Latency(**{key: float(found[f"{key}_ms"]) for key in ("median", "p5", "p25", "p75", "p95")})


def _speed_up(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a comparison, of which something can be said."""
    in_words(found)
    return dict(found)


def _parities(found: Mapping[str, Any]) -> tuple[Parity, ...]:
    return tuple(
        Parity(
            artefact=str(record.get("artefact", name)),
            backend=str(record.get("backend", "")),
            precision=str(record.get("precision", "")),
            max_rel=_number(record, "max_rel"),
            tolerance=_number(record, "tolerance"),
        )
        for name, record in found.items()
    )


def _number(record: Mapping[str, Any], key: str) -> float | None:
    return None if record.get(key) is None else float(record[key])


def _precisions(figures: Mapping[str, Any]) -> dict[str, float]:
    found = {heading: float(figures[key]) for key, heading in PART.items()}
    for kind in ("mask", "pose"):
        if kind in figures:
            found |= {f"{kind} {heading}": float(figures[kind][key]) for key, heading in PART.items()}
    return found


def epochs_of(name: str, settings: Mapping[str, Any]) -> int:
    """Return how many epochs a run asks for, for one of its models."""
    first, second = (int((settings.get(key) or {}).get("epochs") or 0) for key in ("train", "finetune"))
    return {"dense": first, "control": second}.get(name, first + second)


def _widths(folder: Path) -> tuple[Width, ...]:
    """Return the widths of all layers; of a run of an older version those of the groups that its plan narrows."""
    found = read(folder / "stages" / "widths.json", _layers)
    return found or read(folder / "stages" / "prune.json", _groups) or ()


def _layers(record: Mapping[str, Any]) -> tuple[Width, ...]:
    after = {name: int(width) for name, width in record["slim"].items()}
    return tuple(Width(name=name, before=int(width), after=after.get(name)) for name, width in record["dense"].items())


def _groups(record: Mapping[str, Any]) -> tuple[Width, ...]:
    groups = record["plan"].get("groups", {})
    return tuple(
        Width(name=name, before=int(group["width"]), after=len(group["keep"])) for name, group in groups.items()
    )


def _course_of(model: str) -> Callable[[Mapping[str, Any]], SparsityCourse]:
    def course(record: Mapping[str, Any]) -> SparsityCourse:
        return SparsityCourse(
            model=model,
            silent_below=float(record["silent_below"]),
            largest=float(record["largest"]),
            epochs=tuple(_sparsity_epoch(epoch) for epoch in record["epochs"]),
        )

    return course


def _sparsity_epoch(epoch: Mapping[str, Any]) -> SparsityEpoch:
    return SparsityEpoch(
        epoch=int(epoch["epoch"]),
        strength=float(epoch["strength"]),
        silent=float(epoch["silent"]),
        macs=float(epoch["macs"]),
        histogram=tuple(int(count) for count in epoch["histogram"]),
    )


def _search_of(settings: Mapping[str, Any]) -> Path | None:
    """Return the folder of the plan that a run applied."""
    plan = (settings.get("prune") or {}).get("plan")
    return None if plan is None else Path(str(plan)).parent


def _candidates(folder: Path | None, *, required: bool) -> tuple[Candidate, ...]:
    path = None if folder is None else folder / "candidates.jsonl"
    if path is None or not path.is_file():
        if required:
            raise ConfigError(f"'{folder}' holds no search: no 'candidates.jsonl'", expected="what `search` calls out=")
        return ()
    return read_part(path, lambda: tuple(map(_candidate, read_lines(path))))


def _candidate(line: Mapping[str, Any]) -> Candidate:
    return Candidate(
        number=int(line["number"]), macs=int(line["macs"]), params=int(line["params"]), score=float(line["score"])
    )


def _tuned(path: Path | None) -> tuple[Tuned, ...]:
    if path is None:
        return ()
    if not path.is_file():
        raise ConfigError(f"no file '{path}'", expected="the record that tools/bench_search.py wrote")
    keys = ("recalibrated", "as_pruned", "fine_tuned")
    return read_part(path, lambda: tuple(Tuned(**{key: float(line[key]) for key in keys}) for line in read_lines(path)))


def _detections(record: Mapping[str, Any]) -> tuple[Detections, ...]:
    return tuple(
        Detections(
            image=str(image["image"]),
            pictures={name: (str(shown["file"]), int(shown["objects"])) for name, shown in image["models"].items()},
            confidence=float(record["confidence"]),
        )
        for image in record["images"]
    )


def _with_missing(run: Run) -> Run:
    """Say what is not there of a whole run."""
    slim = run.model("slim")
    absent: Iterable[tuple[bool, str]] = (
        (not (run.folder / "summary.json").is_file(), "the summary: the run has not come to its end"),
        (slim is None or slim.macs is None, "the slim model: nothing was pruned yet"),
        (slim is None or not slim.precisions, "mAP of the slim model"),
        (not run.backends, "latencies: nothing may be said about speed"),
        (not run.widths, "widths of the layers"),
        (not run.detections, "pictures of detections"),
    )
    return replace(run, missing=tuple(what for lacks, what in absent if lacks))
