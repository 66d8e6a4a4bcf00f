"""Candidates that are cut, recalibrated and scored: what `search`, `cliff` and `sensitivity` have in common.

Every candidate is a line of `candidates.jsonl` in a folder, which is only ever appended to: killed, the same command
goes on. They are scored one after the other in this process, or side by side on Ray.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yolo_prune.allocation import ATTENTION, Budget, Constraints, WidthSolver
from yolo_prune.allocation.budget import lowest_go, require_reachable, solver_for
from yolo_prune.channels import BoolArray, IntArray
from yolo_prune.configuration import json_setting, require_choice, require_least, setting
from yolo_prune.errors import CandidateError, CheckpointError, ConfigError
from yolo_prune.export.profile import Profile
from yolo_prune.files import new_file, sha256
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint, read_deployable
from yolo_prune.hosts.ultralytics.collection import TrainingImages, scored_on
from yolo_prune.hosts.ultralytics.evaluation import read_data
from yolo_prune.hosts.ultralytics.scoring import Scorer
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model
from yolo_prune.importance import FloatArray
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.pipeline.prune_config import ROUND_TO, multiple_of
from yolo_prune.pipeline.record import Record
from yolo_prune.plan import PrunePlan, plan_from_keep
from yolo_prune.search.workers import InProcess, WorkerPool, on_ray

RECORD, SCORES = "candidates.jsonl", "importance.npy"


@dataclass(kw_only=True)
class CandidatesConfig:
    """Settings of every command that scores candidates."""

    model: str = setting(help="trained checkpoint (.pt) to prune")
    data: str = setting(help="data yaml; only its training images are looked at")
    out: str = setting(help="folder of the candidates; one that exists goes on")
    criterion: str = setting("taylor", help=f"which channels of a group go first: {', '.join(CRITERIA)}")
    seed: int = setting(0, help="seed of the candidates, and of the images that are held out")
    held_out: float = setting(0.2, help="fraction of the training images that candidates are scored on")
    batches: int = setting(
        100, help="batches that norms are recalibrated on, and that criteria which need data look at"
    )
    batch: int = setting(16, help="images of a batch")
    workers: int = setting(0, help="loader processes")
    device: str = setting("cpu", help="where candidates run")
    ray: str | None = setting(None, help="score side by side on a Ray cluster: auto, local or HOST:PORT")
    threads: int | None = setting(None, help="threads of each of its workers; default: 1, or all in one process")
    min_channels: int = setting(8, help="fewest that a group keeps", unit="channels")
    max_fraction: float = setting(0.9, help="largest fraction of a group that may go")
    round_to: int | None = setting(
        None, help=f"kept widths are multiples of this; default: {ROUND_TO}", unit="channels"
    )
    attention: str = setting("width", help="what attention loses: width (of every head alike), heads (whole), none")
    imgsz: int = setting(640, help="image side", unit="px")
    json: str | None = json_setting("the result")


ALL_FAIL = 3
"""Candidates, all failed, after which there is no hope for the others."""

TRY_AGAIN = "where memory is short: a smaller batch= in a new folder; otherwise the same command tries it again"

MAY_CHANGE = ("out", "workers", "device", "ray", "threads", "json")
"""Settings that do not change what a candidate is, or what it is worth."""


def check(config: CandidatesConfig, profile: Profile | None = None) -> Constraints:
    """Check everything that can be checked before the checkpoint is read; return the constraints.

    Args:
        config: The settings.
        profile: What is known of a device, whose multiple of widths is the default.

    Raises:
        ConfigError: An unknown name or a number out of range.
    """
    require_choice("criterion", config.criterion, CRITERIA)
    require_choice("attention", config.attention, ATTENTION)
    require_imgsz(config.imgsz)
    require_least(config, batches=1, batch=1, workers=0, seed=0, threads=1)
    _require_device(config)
    if not 0.0 < config.held_out < 1.0:
        raise ConfigError(f"held_out={config.held_out:g}", expected="a number above 0 and below 1")
    return Constraints(
        min_channels=config.min_channels,
        max_fraction=config.max_fraction,
        round_to=multiple_of(config.round_to, profile),
        attention=config.attention,  # type: ignore[arg-type]  # checked above
    )


def _require_device(config: CandidatesConfig) -> None:
    """Refuse a device that is none, or that is not here; on a cluster its workers may have what this machine lacks.

    Raises:
        ConfigError: It is.
    """
    try:
        kind = torch.device(config.device).type
    except RuntimeError as error:
        raise ConfigError(f"device={config.device}", expected="cpu, cuda or cuda:0") from error
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not config.ray and not torch.cuda.is_available()):
        raise ConfigError(f"device={config.device}, which is not here", expected="cpu, or cuda where a GPU is")


@dataclass(frozen=True, kw_only=True)
class ScoringOfWidths:
    """How candidates are scored: made into the work itself in every process that scores.

    Attributes:
        model: The dense checkpoint, which must be there wherever this is made.
        sha256: Its hash.
        scores: One score per channel; the lowest of each group go.
        images: Training images.
        held_out: Fraction of them that candidates are scored on.
        seed: Of the choice of these.
        threads: Threads of the process; as it is if None.
    """

    model: Path
    sha256: str
    scores: FloatArray
    images: TrainingImages
    held_out: float
    seed: int
    threads: int | None = None

    def __call__(self) -> WidthScorer:
        """Return the work.

        Raises:
            YoloPruneError: Another checkpoint, or images that do not fit it.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        source = read_checkpoint(self.model)
        if source.sha256 != self.sha256:
            raise CheckpointError(f"'{self.model}' is another file here", expected="the same checkpoint everywhere")
        return WidthScorer(self, source.model)


class WidthScorer:
    """Scores widths, shape (groups,), in mAP50-95.

    A candidate that cannot be run, for want of memory or with values that are not finite, is worth 0 and says why: one
    of them does not end a search.
    """

    def __init__(self, scoring: ScoringOfWidths, model: Any) -> None:
        self._model, self._scores, self._graph = model, scoring.scores, trace_model(model)
        self._scorer = Scorer(model, scoring.images, held_out=scoring.held_out, seed=scoring.seed)
        self.counts = self._scorer.counts

    def __call__(self, widths: IntArray) -> dict[str, Any]:
        """Return the score of a candidate, the seconds that it took, and the `failure` of one that cannot be run."""
        started = time.perf_counter()
        keep: BoolArray = lowest_go(self._graph, self._scores, widths)
        try:
            score, failure = self._scorer.score(slim_copy(self._model, self._graph, keep)), ""
            if not np.isfinite(score):
                score, failure = 0.0, f"mAP50-95 {score}"
        except (RuntimeError, MemoryError, ArithmeticError) as error:
            score, failure = 0.0, str(error).strip().partition("\n")[0] or type(error).__name__
        seconds = round(time.perf_counter() - started, 1)
        return {"score": score, "seconds": seconds, **({"failure": failure} if failure else {})}


class Candidates:
    """The candidates of one folder.

    Args:
        config: Settings, checked.
        constraints: Floors and multiples.
        kind: What the folder is for; in its settings.
        results: Files that the command writes into the folder.
        also_may_change: Further settings that do not change what a candidate is.
        decided_by: What else does: hashes of files, by name.

    Attributes:
        graph: The channel graph of the model.
        source_sha256: Hash of its checkpoint.
        lines: What was scored, by number.

    Raises:
        YoloPruneError: Bad input, or a folder of other candidates; what was scored stays.
    """

    def __init__(
        self,
        config: CandidatesConfig,
        constraints: Constraints,
        *,
        kind: str,
        results: tuple[str, ...],
        also_may_change: tuple[str, ...] = (),
        decided_by: Mapping[str, str] | None = None,
    ) -> None:
        self._config, self.folder = config, Path(config.out)
        source = read_deployable(Path(config.model), imgsz_px=config.imgsz)
        model: Any = source.model
        self.identity = {**_identity(config, kind, also_may_change), "round_to": constraints.round_to}
        hashes = {"source_sha256": source.sha256, "data_sha256": _data_sha256(config.data), **(decided_by or {})}
        self.record = Record(self.folder, RECORD, {**self.identity, **hashes}, results=(*results, SCORES))
        self.lines, self.source_sha256, self.graph = self.record.lines, source.sha256, trace_model(model)
        self._model, self._constraints = model, constraints
        self._images = TrainingImages(
            data=Path(config.data).absolute(), imgsz_px=config.imgsz, batches=config.batches, batch=config.batch,
            workers=config.workers, device=config.device,
        )  # fmt: skip
        self._open = contextlib.ExitStack()
        self._open.enter_context(self.record)
        self._pool: WorkerPool | None = None

    @cached_property
    def scores(self) -> FloatArray:
        """One score per channel; the lowest of each group go."""
        file = self.folder / SCORES
        if file.is_file():  # another device would compute them a little differently
            known: FloatArray = np.load(file)
            return known
        here = self._images if torch.cuda.is_available() else replace(self._images, device="cpu")
        return scored_on(self._model, self.graph, CRITERIA[self._config.criterion], here)

    @cached_property
    def solver(self) -> WidthSolver:
        """What may be built of the model."""
        return solver_for(self.graph, self._constraints, self.scores)

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Images for recalibration and for scoring."""
        return self._here.counts

    @cached_property
    def _make(self) -> ScoringOfWidths:
        config = self._config
        return ScoringOfWidths(
            model=Path(config.model).absolute(), sha256=self.source_sha256, scores=self.scores, images=self._images,
            held_out=config.held_out, seed=config.seed, threads=config.threads or (1 if config.ray else None),
        )  # fmt: skip

    @cached_property
    def _here(self) -> WidthScorer:
        return WidthScorer(self._make, self._model)

    def require_reachable(self, budget: Budget) -> None:
        """Refuse a budget that floors do not allow, before anything is measured.

        Raises:
            InfeasibleTargetError: The message names the smallest reachable one.
        """
        require_reachable(self.graph, budget, WidthSolver(self.graph, self._constraints))

    def __enter__(self) -> Candidates:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def score(self, tasks: Mapping[int, IntArray], notes: Mapping[int, Mapping[str, Any]]) -> None:
        """Score the widths that have no line yet, or one that failed.

        Args:
            tasks: Widths of every group, shape (groups,), by number.
            notes: What else their lines say.

        Raises:
            YoloPruneError: Ray is missing or does not answer, its workers keep dying, or all candidates fail.
        """
        left = {number: tasks[number] for number in tasks if self._failure(number) != ""}
        if not left:
            return
        workers, scores = self._workers(), self.scores  # where they cannot be had, no folder is begun
        if not (self.folder / SCORES).is_file():
            self.record.begin()
            with new_file(self.folder / SCORES) as temporary:
                np.save(temporary, scores)
        for number, result in workers.work_off(left):
            widths = tasks[number]
            line = {
                "number": number,
                **result,
                "macs": int(self.graph.cost.macs(widths, imgsz_px=self._config.imgsz)),
                "params": int(self.graph.cost.params(widths)),
                **notes[number],
                "widths": widths.tolist(),
            }
            self.record.add(line)
            said = f"failed: {line['failure']}" if "failure" in line else f"{line['score']:.3f}"
            print(f"candidate {number} ({len(self.lines)} scored): {said}", flush=True)
            self._require_one_that_runs(of=ALL_FAIL)
        self._require_one_that_runs(of=1)

    def require_none_failed(self) -> None:
        """Refuse results of which one is missing.

        Raises:
            CandidateError: It is.
        """
        failed = [number for number in self.lines if self._failure(number)]
        if failed:
            raise CandidateError(
                f"candidate {failed[0]} failed: {self._failure(failed[0])}",
                expected="a score of every candidate",
                remedy=TRY_AGAIN,
            )

    def _failure(self, number: int) -> str | None:
        """Return why a candidate failed: empty if it did not, None if it was not scored."""
        line = self.lines.get(number)
        return None if line is None else str(line.get("failure", ""))

    def _require_one_that_runs(self, *, of: int) -> None:
        """Refuse to go on where `of` candidates or more were tried, and all of them failed.

        Raises:
            CandidateError: They did.
        """
        failures = [self._failure(number) for number in self.lines]
        if len(failures) >= of and all(failures):
            raise CandidateError(
                f"all candidates failed, {len(failures)} so far: {failures[-1]}",
                expected="candidates that can be run",
                remedy=TRY_AGAIN,
            )

    def _workers(self) -> WorkerPool:
        """Return who scores; the workers of a cluster stay until the end of the `with`."""
        if self._pool is None and self._config.ray is None:
            if self._config.threads:
                torch.set_num_threads(self._config.threads)
            self._pool = InProcess(self._here)
        elif self._pool is None:
            gpus = 0.0 if self._config.device == "cpu" else 1.0
            pool = on_ray(self._make, address=str(self._config.ray), cpus=self._config.threads or 1, gpus=gpus)
            self._pool = self._open.enter_context(pool)
        return self._pool

    def plan(self, widths: IntArray, choice: Mapping[str, Any]) -> PrunePlan:
        """Return the plan of widths, shape (groups,)."""
        return plan_from_keep(
            self.graph,
            lowest_go(self.graph, self.scores, widths),
            source_sha256=self.source_sha256,
            imgsz_px=self._config.imgsz,
            choice={**self.identity, **choice},
        )


def _data_sha256(data: str) -> str:
    """Return the hash of a data yaml: most are called alike.

    Raises:
        DataError: It cannot be read.
    """
    read_data(Path(data))
    return sha256(Path(data))


def _identity(config: CandidatesConfig, kind: str, also_may_change: tuple[str, ...]) -> dict[str, Any]:
    """Return what decides the candidates and their scores; files by name, since the record may move."""
    others = {*MAY_CHANGE, *also_may_change}
    values = {key: value for key, value in asdict(config).items() if key not in others}
    return {"kind": kind, **values, "model": Path(config.model).name, "data": Path(config.data).name}
