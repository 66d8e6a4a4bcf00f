"""`run.py check`: is every file as it was sent, and does every artefact say here what PyTorch said at home?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from yolo_prune.device.bundle import Bundle
from yolo_prune.device.columns import columns
from yolo_prune.device.options import option
from yolo_prune.device.reference import Verdict, compare_with_reference
from yolo_prune.device.runner_artefacts import (
    NoRuntimeError,
    artefacts_here,
    failures_of,
    install_line,
    split_by_runtime,
)
from yolo_prune.errors import ParityError, YoloPruneError
from yolo_prune.files import refuse_existing, write_json


@dataclass
class CheckOptions:
    """Settings of `check`."""

    threads: int = option(2, help="CPU threads of each runtime")
    out: str = option("", help="folder with engines that `build` made; default: 'built' in the bundle")
    json: str = option("", help="also write the verdicts to this JSON file; must not exist")


def check(bundle: Bundle, options: CheckOptions) -> None:
    """Check everything, and print a table.

    Raises:
        ConfigError: A file is missing or damaged.
        DoesNotRunError: An artefact could not be run; the others were checked.
        MissingDependencyError: Not one artefact could be checked.
        OutputError: The JSON file exists or cannot be written.
        ParityError: An artefact does not agree.
    """
    if options.json:
        refuse_existing(Path(options.json))
    bundle.require_intact()
    print(f"{len(bundle.files)} files, checksums right")
    able, unable = split_by_runtime(artefacts_here(bundle, options.out))
    verdicts: list[Verdict] = []
    failures = failures_of(
        able, lambda here: verdicts.append(compare_with_reference(bundle, here.path, threads=options.threads))
    )
    if options.json:
        write_json(Path(options.json), [one.to_json() for one in verdicts])
    if verdicts:
        print(_table(verdicts), end="")
    for here, problem in unable:
        print(f"not checked: {here.name}: {problem}")
    for name, failure in failures.items():
        print(f"not checked: {name}: {failure.found}")
    if unable:
        print(f"to install what is missing: {install_line(bundle)}")
    _require(bundle, verdicts, list(failures.values()), [problem for _, problem in unable])


def _table(verdicts: list[Verdict]) -> str:
    """Return one row per artefact."""
    rows = [
        [
            one.artefact,
            f"{one.backend} {one.version}",
            one.precision,
            f"{one.max_rel:.1e}",
            "-" if one.tolerance is None else f"{one.tolerance:g}",
            f"{one.found_again} of {one.expected}",
            f"{one.backed} of {one.answered}",
            "yes" if one.passed else "NO",
        ]
        for one in verdicts
    ]
    headings = [
        "artefact",
        "runtime",
        "precision",
        "max relative error",
        "tolerance",
        "found again",
        "its own right",
        "agrees",
    ]
    return columns(headings, rows)


def _require(bundle: Bundle, verdicts: list[Verdict], failures: list[YoloPruneError], problems: list[str]) -> None:
    """Raise what went wrong."""
    wrong = [one.artefact for one in verdicts if not one.passed]
    if wrong:
        raise ParityError(
            f"{', '.join(wrong)}: not what PyTorch says",
            expected="the reference's outputs and detections, within the tolerance",
            remedy="use another artefact, or another version of the runtime; do not deploy this one",
        )
    if failures:
        raise failures[0]
    if not verdicts:
        raise NoRuntimeError(problems, bundle)
