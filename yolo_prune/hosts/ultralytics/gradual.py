"""Pruning inside the host's trainer: the network, its average and its optimizer lose channels, and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import TORCH_2_13, ModelEMA

from yolo_prune.allocation import PATHS, Allocation, Budget, Constraints, allocate
from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.errors import ConfigError
from yolo_prune.files import from_record, read_record, sha256, write_json
from yolo_prune.hosts.slim import MARKER, PROOF, Checkpoint, is_slim, provenance
from yolo_prune.hosts.ultralytics.collection import images_of, scored_on
from yolo_prune.hosts.ultralytics.distillation import distilled_by, optimized_parameters, projectors, with_projectors
from yolo_prune.hosts.ultralytics.networks import bare_copy, network_of
from yolo_prune.hosts.ultralytics.records import FILES
from yolo_prune.hosts.ultralytics.refusals import require_plain
from yolo_prune.hosts.ultralytics.run_files import forget_best
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, verifier
from yolo_prune.hosts.ultralytics.trainer import warn_of_few_steps
from yolo_prune.importance import FloatArray
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.methods.gradual import PruningSchedule, carry_optimizer, silence_softly
from yolo_prune.plan import PrunePlan, plan_from_keep
from yolo_prune.surgery import Verification

RECORD = FILES["pruning"][0]
"""What a run leaves in its folder: its settings and the steps that were taken; each step's plan is a file beside it."""


@dataclass(frozen=True, kw_only=True)
class GradualOptions:
    """How a network is pruned while it is trained.

    Attributes:
        schedule: When how much goes.
        soft: Channels are zeroed, and may come back, until the last step removes them.
        criterion: Which channels matter: a name in `CRITERIA`.
        allocation: How many go where: a name in `PATHS`.
        constraints: Floors and multiples.
        batches: Batches of training images that criteria which need data look at before each step.

    Raises:
        ConfigError: An unknown name, or no batches.
    """

    schedule: PruningSchedule
    soft: bool = False
    criterion: str = "taylor"
    allocation: str = "uniform"
    constraints: Constraints = field(default_factory=Constraints)
    batches: int = 16

    def __post_init__(self) -> None:
        for key, value, known in (
            ("criterion", self.criterion, CRITERIA),
            ("allocation", self.allocation, PATHS),
        ):
            if value not in known:
                raise ConfigError(f"{key}={value}", expected=f"one of {', '.join(known)}")
        if self.batches < 1:
            raise ConfigError(f"prune_batches={self.batches}", expected="1 or more")


@dataclass
class GradualPruning:
    """The callbacks of one training that prunes; its state lies in files in the run's folder.

    Attributes:
        options: How it prunes.
    """

    options: GradualOptions
    _macs: float = field(default=0.0, init=False)
    _imgsz_px: int = field(default=0, init=False)

    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        """Return what the host's trainer calls, by event. Picklable before training begins."""
        return {"on_pretrain_routine_end": self.begin, "on_train_epoch_start": self.begin_epoch}

    def begin(self, trainer: Any) -> None:
        """Check that the schedule fits the training, and note, or read, the cost at the start.

        Raises:
            ConfigError: No epochs after the last step, or a training that cannot lose channels on its way.
        """
        self.options.schedule.require_room(trainer.epochs)
        require_plain(vars(trainer.args), "prune_every=")
        record = read_record(trainer.save_dir / RECORD)
        if trainer.resume and record is not None:
            self._macs, self._imgsz_px = record["macs"], record["imgsz_px"]
            return
        for model in (network_of(trainer.model), network_of(trainer.ema.ema)):
            if is_slim(model):
                getattr(model, MARKER)["step"] = 0  # steps of an earlier training are none of this one's
        if not is_slim(network_of(trainer.model)):  # the trainer warned already
            warn_of_few_steps(trainer)
        graph, self._imgsz_px = _traced(trainer.ema.ema), int(trainer.args.imgsz)
        self._macs = float(graph.cost.macs(graph.widths(), imgsz_px=self._imgsz_px))
        if CRITERIA[self.options.criterion].needs:  # data that do not serve are refused now, not hours later
            self._scores(trainer, graph, self.options.criterion, batches=1)
        # So is what is out of reach; which channels would go does not matter to it.
        self._allocated(graph, self._scores(trainer, graph, "l2"), self.options.schedule.target)
        if RANK in {-1, 0}:
            record = {"options": asdict(self.options), "macs": self._macs, "imgsz_px": self._imgsz_px, "steps": []}
            write_json(trainer.save_dir / RECORD, record, replace=True)

    def begin_epoch(self, trainer: Any) -> None:
        """Take the step that is due before an epoch; in the soft variant, zero what the last step shall remove."""
        schedule = self.options.schedule
        if trainer.epoch <= schedule.every * schedule.steps:
            trainer.stopper.best_epoch = trainer.epoch  # to stop early would be to stop above the target
        due, taken = schedule.steps_due(trainer.epoch), _steps_taken(network_of(trainer.model))
        if self.options.soft and 0 < due < schedule.steps:
            self._silence(trainer, schedule.kept_after(due))
        elif due > taken and (not self.options.soft or due == schedule.steps):
            self._cut(trainer, due)

    def _silence(self, trainer: Any, kept: float) -> None:
        graph = _traced(trainer.ema.ema)
        keep = self._chosen(trainer, graph, kept)
        for model in (network_of(trainer.model), network_of(trainer.ema.ema)):
            silence_softly(model, graph, keep)

    def _cut(self, trainer: Any, step: int) -> None:
        """Remove channels: choose by the average, prove on it, then cut network, average and optimizer alike."""
        average = bare_copy(trainer.ema.ema)
        graph = trace_model(average)
        plan = self._plan(trainer, average, graph, step)
        keep = plan.keep_mask(graph)
        slim_average = slim_copy(average, graph, keep)
        proof = verifier(average, graph).verify(slim_average, keep).require()
        marker = {**provenance(slim_average, _source(trainer, average), plan), "folded": False, "step": step}
        marker[PROOF] = max(proof.max_abs_error, getattr(average, MARKER, {}).get(PROOF, 0.0) if step > 1 else 0.0)
        _replace(trainer, graph, keep, slim_average, marker)
        self._note(trainer, step, plan, proof)

    def _plan(self, trainer: Any, average: nn.Module, graph: ChannelGraph, step: int) -> PrunePlan:
        """Return the plan of a step: the one that an interrupted run wrote, or a new one, which is written first.

        Of several processes the first alone looks for the file, which it may have written when another one would look.
        """
        path = trainer.save_dir / f"pruning_step{step}.json"
        if RANK in {-1, 0} and trainer.resume and path.is_file():
            known = PrunePlan.load(path)
            _as_the_first(known.keep_mask(graph), trainer.device)
            return known
        keep = self._chosen(trainer, graph, self.options.schedule.kept_after(step))
        choice = {"criterion": self.options.criterion, "allocation": self.options.allocation, "step": step}
        choice |= {"target_macs": self.options.schedule.kept_after(step), **asdict(self.options.constraints)}
        if CRITERIA[self.options.criterion].needs:
            choice["batches"] = self.options.batches
        plan = plan_from_keep(
            graph,
            keep,
            source_sha256=_source(trainer, average).sha256,
            imgsz_px=self._imgsz_px,
            choice=choice,
        )
        if RANK in {-1, 0}:
            write_json(path, plan.to_json(), replace=True)
        return plan

    def _chosen(self, trainer: Any, graph: ChannelGraph, kept: float) -> BoolArray:
        """Choose channels of the average so that a fraction of the start's MACs is kept.

        Of several processes the first chooses: their averages have batch-norm statistics of their own.
        """
        keep = np.ones(graph.channel_count, dtype=bool)
        if RANK in {-1, 0}:
            keep = self._allocated(graph, self._scores(trainer, graph, self.options.criterion), kept)
        return _as_the_first(keep, trainer.device)

    def _scores(self, trainer: Any, graph: ChannelGraph, name: str, *, batches: int | None = None) -> FloatArray:
        """Score the channels of the average, by so many batches of training images where the criterion needs some."""
        images = images_of(trainer, batches=batches or self.options.batches)
        return scored_on(network_of(trainer.ema.ema), graph, CRITERIA[name], images)

    def _allocated(self, graph: ChannelGraph, scores: FloatArray, kept: float) -> BoolArray:
        """Choose by scores so that a fraction of the start's MACs is kept."""
        ratio = kept * self._macs / float(graph.cost.macs(graph.widths(), imgsz_px=self._imgsz_px))
        if ratio >= 1.0:  # the step before went further than it had to
            return np.ones(graph.channel_count, dtype=bool)
        budget = Budget(unit="macs", ratio=ratio, imgsz_px=self._imgsz_px)
        return allocate(
            graph, scores, budget, Allocation(path=self.options.allocation, constraints=self.options.constraints)
        )

    def _note(self, trainer: Any, step: int, plan: PrunePlan, proof: Verification) -> None:
        """Say and write what a step did."""
        if RANK not in {-1, 0}:
            return
        record = read_record(trainer.save_dir / RECORD) or {}
        steps = [done for done in record["steps"] if done["step"] < step]
        steps.append({"step": step, "epoch": trainer.epoch, "after": asdict(plan.after)})
        write_json(trainer.save_dir / RECORD, {**record, "steps": steps}, replace=True)
        LOGGER.info(
            f"pruning step {step}: {plan.after.macs / self._macs:.1%} of the MACs and {plan.after.params:,} parameters "
            f"are left; max |silenced - sliced| = {proof.max_abs_error:.1e} in fp64"
        )


def _replace(
    trainer: Any, graph: ChannelGraph, keep: BoolArray, slim_average: nn.Module, marker: dict[str, Any]
) -> None:
    """Put the slim network, its average and their optimizer state in the place of the dense ones."""
    wrapper, dense = trainer.model, network_of(trainer.model)
    graph = with_projectors(graph, wrapper)
    slim = slim_copy(bare_copy(wrapper), graph, keep).to(trainer.device)
    if any(weight.dim() == 4 and not weight.is_contiguous() for weight in dense.parameters()):
        slim = slim.to(memory_format=torch.channels_last)  # as the host laid the dense one out
    for model in (slim, slim_average):
        setattr(model, MARKER, marker)
    trainer.model = slim.train()
    trainer.set_model_attributes()
    _renew_criterion(dense, slim)
    trainer.model = distilled_by(wrapper, slim, graph, keep)
    carry_optimizer(trainer.optimizer, optimized_parameters(wrapper), optimized_parameters(trainer.model), graph, keep)
    before, trainer.ema = trainer.ema, ModelEMA(trainer.model, updates=trainer.ema.updates)
    network_of(trainer.ema.ema).load_state_dict(slim_average.to(trainer.device).state_dict())
    if trainer.model is not slim:
        trainer.ema.ema.projector.load_state_dict(projectors(before.ema, graph, keep))
    forget_best(trainer)
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):  # several GPUs: as the host wraps it
        unsynced: dict[str, Any] = {"forward_sync_buffers" if TORCH_2_13 else "broadcast_buffers": False}
        trainer.model = nn.parallel.DistributedDataParallel(
            trainer.model,
            device_ids=wrapper.device_ids,
            find_unused_parameters=wrapper.find_unused_parameters,
            **unsynced,
        )


def _renew_criterion(dense: Any, slim: Any) -> None:
    """Give a network a loss of its own sizes; one that changes with the epochs goes on where it was."""
    old, slim.criterion = getattr(dense, "criterion", None), None
    if old is not None and hasattr(old, "updates"):
        slim.criterion = slim.init_criterion()
        slim.criterion.updates = old.updates - 1
        slim.criterion.update()


def _as_the_first(keep: BoolArray, device: torch.device) -> BoolArray:
    """Return the keep mask of the first of several processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return keep
    mask = torch.from_numpy(keep.astype(np.uint8)).to(device)
    distributed.broadcast(mask, src=0)
    return mask.cpu().numpy().astype(bool)


def _source(trainer: Any, model: nn.Module) -> Checkpoint:
    """Return the checkpoint that a step cuts: the run's last one, or what it started from."""
    path = trainer.last if trainer.last.is_file() else Path(str(trainer.args.model))
    digest = sha256(path) if path.is_file() else "0" * 64
    return Checkpoint(path=path, sha256=digest, model=model, stored_dtype=torch.float16, train_args={})


def _steps_taken(network: nn.Module) -> int:
    """Return the number of the last step that a network went through in this run."""
    return int(getattr(network, MARKER, {}).get("step", 0))


def _traced(model: nn.Module) -> ChannelGraph:
    return trace_model(bare_copy(model))


def gradual_options_of(folder: Path) -> GradualOptions | None:
    """Return how the network of a run in a folder is pruned; None if it is not.

    Raises:
        ConfigError: The record is damaged.
    """
    return from_record(folder / RECORD, _options_in)


def _options_in(record: dict[str, Any]) -> GradualOptions:
    options = record["options"]
    parts = {"schedule": PruningSchedule(**options["schedule"]), "constraints": Constraints(**options["constraints"])}
    return GradualOptions(**{**options, **parts})
