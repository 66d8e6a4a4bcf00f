"""Reads a run folder into the records of a report.

A run that was killed, or that an older version made, lacks parts; the report says which. A part that is there and
damaged is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from yolo_prune.errors import ConfigError
from yolo_prune.files import read_lines
from yolo_prune.report.methods import TOLD
from yolo_prune.report.records import (
    MODELS,
    Candidate,
    Detections,
    Latency,
    MethodCourse,
    Model,
    Parity,
    Run,
    SparsityCourse,
    SparsityEpoch,
    Tuned,
    Width,
)
from yolo_prune.report.summary import in_words, precisions

Made = TypeVar("Made")

TRAINED = ("dense", "slim")
"""Models of a run whose trainings may have a method."""


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
    candidates, predicted_on = _candidates(search if search is not None else applied, required=search is not None)
    courses = [read(folder / name / "sparsity.json", _course_of(name)) for name in TRAINED]
    methods = [
        read(folder / name / told.record, _method_of(name, method)) for name in TRAINED for method, told in TOLD.items()
    ]
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
        methods=tuple(found for found in methods if found is not None),
        search=candidates,
        predicted_on=predicted_on,
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
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
        precisions={split: precisions(figures) for split, figures in splits.items()},
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


def _method_of(model: str, method: str) -> Callable[[Mapping[str, Any]], MethodCourse]:
    def course(record: Mapping[str, Any]) -> MethodCourse:
        facts, macs = TOLD[method].tell(record)
        return MethodCourse(model=model, method=method, facts=facts, macs=macs)

    return course


def _search_of(settings: Mapping[str, Any]) -> Path | None:
    """Return the folder of the plan that a run applied."""
    plan = (settings.get("prune") or {}).get("plan")
    return None if plan is None else Path(str(plan)).parent


def _candidates(folder: Path | None, *, required: bool) -> tuple[tuple[Candidate, ...], str]:
    """Return the candidates of a search, and for what their latencies were predicted, if they were."""
    path = None if folder is None else folder / "candidates.jsonl"
    if folder is None or path is None or not path.is_file():
        if required:
            raise ConfigError(f"'{folder}' holds no search: no 'candidates.jsonl'", expected="what `search` calls out=")
        return (), ""
    found = read_part(path, lambda: tuple(map(_candidate, read_lines(path))))
    predicted_on, latencies = read(folder / "latencies.json", _predicted) or ("", {})
    return tuple(replace(one, latency=latencies.get(one.number)) for one in found), predicted_on


def _candidate(line: Mapping[str, Any]) -> Candidate:
    return Candidate(
        number=int(line["number"]), macs=int(line["macs"]), params=int(line["params"]), score=float(line["score"])
    )


def _predicted(record: Mapping[str, Any]) -> tuple[str, dict[int, float]]:
    fractions = {int(number): float(fraction) for number, fraction in record["fractions"]}
    return f"{record['measured_on']}, {record['cpu']}", fractions


def _tuned(path: Path | None) -> tuple[Tuned, ...]:
    if path is None:
        return ()
    if not path.is_file():
        raise ConfigError(f"no file '{path}'", expected="the record that tools/bench_search.py wrote")
    return read_part(path, lambda: tuple(_candidate_tuned(line) for line in read_lines(path) if not _is_pricing(line)))


def _is_pricing(line: Mapping[str, Any]) -> bool:
    """Return whether a line tells how candidates are priced: such ones say of what kind they are."""
    return "kind" in line.get("cell", {})


def _candidate_tuned(line: Mapping[str, Any]) -> Tuned:
    return Tuned(**{key: float(line[key]) for key in ("recalibrated", "as_pruned", "fine_tuned")})


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
