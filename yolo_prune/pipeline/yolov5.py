"""`yolov5`: classic YOLOv5's own scripts with our flags, and pruning of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.errors import ConfigError
from yolo_prune.files import require_new_outputs
from yolo_prune.flags import parse_flags
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.yolov5 import checkpoints, surgery
from yolo_prune.hosts.yolov5.scripts import run_script
from yolo_prune.hosts.yolov5.source import Classic, installed, repository
from yolo_prune.hosts.yolov5.trainer import train
from yolo_prune.methods.slimming.strength import MODES, SCHEDULES, Sparsity, strength_of
from yolo_prune.pipeline.inspect import InspectConfig, Inspection, inspection_of
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.pipeline.pruning import PruneResult, PruningHost, prune_with
from yolo_prune.report.scales import draw_scales


@dataclass(kw_only=True)
class CodeConfig:
    """Which classic code is used."""

    repo: str | None = setting(None, help="folder of a clone of github.com/ultralytics/yolov5")
    pypi: bool = setting(False, help="use PyPI's installed package yolov5 instead")
    json: str | None = json_setting("the result")


@dataclass(kw_only=True)
class ClassicTrainConfig(CodeConfig):
    """Our flags of `yolov5 train`; every flag of its train.py may be added."""

    sparsity: str | None = setting(None, help="strength of the penalty on batch-norm scales, e.g. 0.001, or auto")
    sparsity_mode: str = setting("proximal", help=f"how it is applied: {', '.join(MODES)}")
    sparsity_schedule: str = setting("constant", help=f"how its strength changes: {', '.join(SCHEDULES)}")
    sparsity_share: float = setting(0.5, help="share of the penalised channels that auto drives to zero")


@dataclass(kw_only=True)
class ClassicPruneConfig(CodeConfig, PruneConfig):
    """Flags of `yolov5 prune`."""


@dataclass(kw_only=True)
class ClassicInspectConfig(CodeConfig, InspectConfig):
    """Flags of `yolov5 inspect`."""


@dataclass(frozen=True, kw_only=True)
class ClassicRun:
    """What one of its scripts left behind.

    Attributes:
        script: Its name.
        folder: Where it wrote, where that is known.
    """

    script: str
    folder: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain values."""
        return {"script": self.script, "folder": str(self.folder) if self.folder else None}

    def table(self) -> str:
        """Return where the run's checkpoints are."""
        return f"checkpoints: {self.folder / 'weights'}\n" if self.folder else ""


def classic_train(config: ClassicTrainConfig, words: Sequence[str]) -> ClassicRun:
    """Train by its own train.py, slim checkpoints included.

    Raises:
        YoloPruneError: Bad input.
    """
    sparsity = sparsity_of(config)
    return ClassicRun(script="train", folder=train(code_of(config), words, sparsity, draw=draw_scales))


def classic_prune(config: ClassicPruneConfig, words: Sequence[str]) -> PruneResult:
    """Prune a classic checkpoint, prove the result, then write it.

    Raises:
        YoloPruneError: Bad input (nothing is written), or a proof that failed (nothing is written).
    """
    _require_none(words)
    classic = code_of(config)
    host = PruningHost(
        read=partial(checkpoints.read_checkpoint, classic),
        trace=surgery.trace_model,
        cut=surgery.slim_copy,
        verifier=surgery.verifier,
        write=checkpoints.write_slim,
    )
    return prune_with(host, config)


def classic_inspect(config: ClassicInspectConfig, words: Sequence[str]) -> Inspection:
    """Trace a classic checkpoint and describe its channel groups.

    Raises:
        YoloPruneError: Bad input.
    """
    _require_none(words)
    require_new_outputs({"picture": config.picture, "json": config.json})
    model: Any = checkpoints.read_checkpoint(code_of(config), Path(config.model)).model
    require_imgsz(config.imgsz, stride=int(model.stride.max()))
    return inspection_of(model, surgery.trace_model(model), config)


def _require_none(words: Sequence[str]) -> None:
    """Refuse flags that are none of ours, where no script takes them.

    Raises:
        ConfigError: There are some.
    """
    if words:
        raise ConfigError(f"unknown flag '{words[0]}'", expected="flags that --help lists")


def classic_script(name: str, config: CodeConfig, words: Sequence[str]) -> ClassicRun:
    """Run its own val.py, detect.py or export.py.

    Raises:
        YoloPruneError: It stopped with an error.
    """
    run_script(code_of(config), name, words)
    return ClassicRun(script=name)


SUBCOMMANDS: dict[str, tuple[str, Any, Callable[..., Any]]] = {
    "train": ("its train.py, with --sparsity, and with slim --weights", ClassicTrainConfig, classic_train),
    "inspect": ("channel groups: what may be cut, what not and why", ClassicInspectConfig, classic_inspect),
    "prune": ("write a slim, verified checkpoint", ClassicPruneConfig, classic_prune),
    "val": ("its val.py", CodeConfig, partial(classic_script, "val")),
    "detect": ("its detect.py", CodeConfig, partial(classic_script, "detect")),
    "export": ("its export.py", CodeConfig, partial(classic_script, "export")),
}
"""Summary, settings and work of each subcommand."""


def read_words(words: Sequence[str]) -> tuple[Callable[..., Any], Any, list[str]]:
    """Return the work that words name, its settings, and the words that go to the script.

    Raises:
        ConfigError: No subcommand, an unknown one, or a wrong value.
    """
    if not words:
        raise ConfigError("no subcommand of yolov5", expected=f"one of: {', '.join(SUBCOMMANDS)}")
    require_choice("subcommand of yolov5", words[0], SUBCOMMANDS)
    summary, schema, work = SUBCOMMANDS[words[0]]
    ours = schema in (ClassicPruneConfig, ClassicInspectConfig)
    passed_on = "" if ours else "; every flag of the script itself is passed on to it"
    config, rest = parse_flags(
        schema,
        words[1:],
        program=f"yolo-prune yolov5 {words[0]}",
        summary=summary + passed_on,
        names={"model": "--weights"},
    )
    return work, config, rest


def help_text() -> str:
    """Return the subcommands with their summaries."""
    lines = ["usage: yolo-prune yolov5 SUBCOMMAND --repo PATH | --pypi --flag value ...", ""]
    lines += [f"  {name:<10} {summary}" for name, (summary, *_) in SUBCOMMANDS.items()]
    return "\n".join([*lines, "", "yolo-prune yolov5 SUBCOMMAND --help lists our flags.", ""])


def code_of(config: CodeConfig) -> Classic:
    """Return the classic code that is to be used.

    Raises:
        ConfigError: None or two are named, or the one that is named is none.
    """
    if (config.repo is not None) == config.pypi:
        raise ConfigError(
            "--repo and --pypi are both given" if config.pypi else "neither --repo nor --pypi is given",
            expected="one of them: --repo PATH for a clone of the repository, --pypi for the package yolov5",
            remedy="use the code that the checkpoint was trained with",
        )
    return installed() if config.repo is None else repository(Path(config.repo))


def sparsity_of(config: ClassicTrainConfig) -> Sparsity | None:
    """Return the penalty that flags ask for.

    Raises:
        ConfigError: An unknown mode or schedule, or a strength that is no positive number.
    """
    require_choice("--sparsity-mode", config.sparsity_mode, MODES)
    require_choice("--sparsity-schedule", config.sparsity_schedule, SCHEDULES)
    if config.sparsity is None:
        return None
    return Sparsity(
        strength=strength_of(config.sparsity),
        mode=config.sparsity_mode,  # type: ignore[arg-type]  # checked above, like the next
        schedule=config.sparsity_schedule,  # type: ignore[arg-type]
        share=config.sparsity_share,
    )
