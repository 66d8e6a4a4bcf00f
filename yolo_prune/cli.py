"""The command line: `yolo-prune VERB key=value ...`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from yolo_prune import __version__
from yolo_prune.configuration import describe, load, parse, require_choice
from yolo_prune.errors import ConfigError, YoloPruneError
from yolo_prune.files import refuse_existing, write_json


class Result(Protocol):
    """What a verb returns: something to show and something to write down."""

    def table(self) -> str:
        """Return what is printed."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return what `json=FILE` holds."""
        ...


@runtime_checkable
class Judged(Protocol):
    """A result that may tell of a proof that failed: it is shown all the same, and then the error."""

    @property
    def failure(self) -> YoloPruneError | None:
        """What failed; None if nothing did."""
        ...


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One command.

    Attributes:
        summary: One line for `--help`.
        load: Imports the schema and the function that does the work: the host is imported only when it is needed.
        file_first: The first word is a YAML file of settings.
        passes_on: The command also takes the host's training keys.
        flags: It takes `--flag value` words and reads them itself.
    """

    summary: str
    load: Callable[[], tuple[Any, Callable[..., Any]]]
    file_first: bool = False
    passes_on: bool = False
    flags: bool = False


def _inspect() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.inspect import InspectConfig, inspect

    return InspectConfig, inspect


def _prune() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.prune import prune
    from yolo_prune.pipeline.prune_config import PruneConfig

    return PruneConfig, prune


def _rewrite() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.rewrite import RewriteConfig, rewrite

    return RewriteConfig, rewrite


def _search() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.search import SearchConfig, search

    return SearchConfig, search


def _cliff() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.cliff import CliffConfig, cliff

    return CliffConfig, cliff


def _sensitivity() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.sensitivity import SensitivityConfig, sensitivity

    return SensitivityConfig, sensitivity


def _profile() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.profile import ProfileConfig, profile

    return ProfileConfig, profile


def _train() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.train import train_model
    from yolo_prune.pipeline.train_config import TrainConfig

    return TrainConfig, train_model


def _finetune() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.train import finetune
    from yolo_prune.pipeline.train_config import FinetuneConfig

    return FinetuneConfig, finetune


def _evaluate() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.train import EvaluateConfig, evaluate_checkpoint

    return EvaluateConfig, evaluate_checkpoint


def _export() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.export import ExportConfig, export

    return ExportConfig, export


def _bundle() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.bundle import BundleConfig, bundle

    return BundleConfig, bundle


def _benchmark() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.benchmark import BenchmarkConfig, benchmark_artefacts

    return BenchmarkConfig, benchmark_artefacts


def _run() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.run import run
    from yolo_prune.pipeline.run_config import RunConfig

    return RunConfig, run


def _report() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.report import ReportConfig, report

    return ReportConfig, report


def _compare() -> tuple[Any, Callable[..., Result]]:
    from yolo_prune.pipeline.report import CompareConfig, compare

    return CompareConfig, compare


def _yolov5() -> tuple[Any, Callable[..., Any]]:
    from yolo_prune.pipeline.yolov5 import help_text, read_words

    return help_text, read_words


VERBS: dict[str, Verb] = {
    "inspect": Verb(summary="show what may be cut of a model, what not and why", load=_inspect),
    "prune": Verb(summary="write a slim, verified checkpoint", load=_prune),
    "rewrite": Verb(summary="write an equal network without shortcuts, which can be pruned more freely", load=_rewrite),
    "search": Verb(summary="the best of many random plans, by the mAP of recalibrated candidates", load=_search),
    "cliff": Verb(summary="how far a checkpoint can be cut before its recalibrated mAP breaks away", load=_cliff),
    "sensitivity": Verb(summary="what each channel group costs in recalibrated mAP", load=_sensitivity),
    "profile": Verb(summary="time slim versions on this device: how latency depends on widths", load=_profile),
    "train": Verb(summary="train as `yolo train` does, and prune meanwhile if asked to", load=_train, passes_on=True),
    "finetune": Verb(summary="train a slim checkpoint without rebuilding it", load=_finetune, passes_on=True),
    "evaluate": Verb(summary="measure mAP of a checkpoint", load=_evaluate),
    "export": Verb(
        summary="export to ONNX, NCNN, OpenVINO or a TensorRT engine, and prove that it agrees", load=_export
    ),
    "benchmark": Verb(summary="time artefacts beside each other", load=_benchmark),
    "bundle": Verb(summary="a folder for a Jetson, a Raspberry Pi or a CPU: artefacts, proof, runner", load=_bundle),
    "run": Verb(summary="all of it from one YAML file, resumable: run CONFIG.yaml", load=_run, file_first=True),
    "report": Verb(summary="one HTML page of a run: figures, plots, detections, provenance", load=_report),
    "compare": Verb(summary="one table and page of several runs and their controls", load=_compare),
    "yolov5": Verb(
        summary="classic YOLOv5: train, inspect, prune, val, detect, export with --flag value", load=_yolov5, flags=True
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done. 1: a proof failed. 2: bad input. Without `--debug` no traceback is shown for these.
    """
    return _guarded(_dispatch, list(sys.argv[1:] if words is None else words))


def script(summary: str, schema: Any, work: Callable[[Any], str], words: Sequence[str] | None = None) -> int:
    """Run a script that is one command, with `key=value`, `--help`, `--debug` and exit codes as `main` has them.

    Args:
        summary: First line of `--help`.
        schema: Dataclass that describes its settings.
        work: From settings to what is printed.
        words: The words; by default those of the process.
    """

    def dispatch(words: list[str]) -> str:
        return help_page(summary, schema) if _asks_for_help(words) else work(parse(schema, words)[0])

    return _guarded(dispatch, list(sys.argv[1:] if words is None else words))


def _guarded(dispatch: Callable[[list[str]], str], words: list[str]) -> int:
    """Print what the words lead to, or what was wrong; return the exit code."""
    debug = "--debug" in words
    try:
        print(dispatch([word for word in words if word != "--debug"]), end="")
    except YoloPruneError as error:
        return report(error, debug=debug)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def report(error: YoloPruneError, *, debug: bool) -> int:
    """Print an error for a person and return its exit code."""
    if debug:
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _dispatch(words: list[str]) -> str:
    if not words or words[0] in ("-h", "--help", "help"):
        return _usage()
    if words[0] in ("-V", "--version"):
        return f"yolo-prune {__version__}\n"
    require_choice("command", words[0], VERBS)
    verb, rest = VERBS[words[0]], words[1:]
    if verb.flags:
        help_text, read_words = verb.load()
        return help_text() if rest[:1] in (["-h"], ["--help"]) else execute(*read_words(rest))
    schema, work = verb.load()
    if _asks_for_help(rest):
        more = "Every training key of Ultralytics (epochs=, batch=, lr0=, device=, ...) is passed on."
        return help_page(f"yolo-prune {words[0]}: {verb.summary}", schema, more if verb.passes_on else "")
    return execute(work, *_settings(verb, schema, rest))


def execute(work: Callable[..., Result], settings: Any, *more: Any) -> str:
    """Do the work of a verb, write its JSON if asked for, and return its table."""
    record = Path(settings.json) if settings.json else None
    if record is not None:
        refuse_existing(record)
    result = work(settings, *more)
    if record is not None:
        write_json(record, result.to_json())
    if isinstance(result, Judged) and result.failure is not None:
        print(result.table(), end="", flush=True)
        raise result.failure
    return result.table()


def _settings(verb: Verb, schema: Any, words: list[str]) -> tuple[Any, ...]:
    if verb.file_first:
        if not words or "=" in words[0]:
            raise ConfigError("no settings file given", expected="yolo-prune run CONFIG.yaml [key=value ...]")
        return (load(schema, Path(words[0]), words[1:]),)
    if verb.passes_on:
        from yolo_prune.hosts.ultralytics.trainer import stock_keys

        return parse(schema, words, passed_on=stock_keys())
    return (parse(schema, words)[0],)


def _usage() -> str:
    lines = [
        f"yolo-prune {__version__}: prune YOLO detectors",
        "",
        "usage: yolo-prune COMMAND key=value ... [--debug]",
        "",
    ]
    width = max(map(len, VERBS))
    lines += [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", "yolo-prune COMMAND --help lists its keys with defaults and units.", ""])


def _asks_for_help(words: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in words)


def help_page(summary: str, schema: Any, more: str = "") -> str:
    """Return a summary, every key of a schema with its default and unit, and a closing remark."""
    rows = describe(schema)
    key_width, default_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [summary, ""]
    lines += [f"  {key:<{key_width}}  {default:<{default_width}}  {text}" for key, default, text in rows]
    return "\n".join([*lines, *(["", more] if more else []), ""])
