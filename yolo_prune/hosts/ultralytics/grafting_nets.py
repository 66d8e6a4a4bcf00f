"""Filter grafting between networks: ordinary trainings of the host side by side, which meet after every epoch.

Source: Meng et al., Filter Grafting for Deep Neural Networks, CVPR 2020, section 3.3, and the authors' code: networks
of other seeds, orders of data and learning rates, each of which takes from the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ultralytics.cfg import get_save_dir
from ultralytics.utils import LOGGER

from yolo_prune.claims import claimed
from yolo_prune.errors import CheckpointError, ConfigError
from yolo_prune.files import new_file
from yolo_prune.hosts.ultralytics.checkpoints import load_model, task_of, unpickle
from yolo_prune.hosts.ultralytics.grafting import (
    GraftingOptions,
    networks_of,
    new_record,
    trained_layers,
)
from yolo_prune.hosts.ultralytics.grafting_files import (
    forget_nets,
    forget_previous,
    go_back,
    grafting_record,
    keep_previous,
    note_epoch,
    run_folder,
    state_of_nets,
    write_record,
)
from yolo_prune.hosts.ultralytics.refusals import require_plain
from yolo_prune.hosts.ultralytics.run_files import strip_whole
from yolo_prune.hosts.ultralytics.side_by_side import Turn, run_side_by_side
from yolo_prune.hosts.ultralytics.trainer import (
    BEFORE_FINAL_EVAL,
    OPTIMIZER_BUILT,
    Callback,
    read_stock_yaml,
    stock_keys,
    train,
)
from yolo_prune.methods.grafting import Layer, graft_cyclically


def lr_factor(index: int, nets: int) -> float:
    """Return the learning rate of one of several networks as a fraction of `lr0`: (1 + cos(pi * (K - i) / K)) / 2.

    Args:
        index: i, from 1 to `nets`.
        nets: K.
    """
    return (1.0 + math.cos(math.pi * (nets - index) / nets)) / 2.0


@dataclass
class NetsTraining:
    """Trains several networks side by side and grafts them onto each other after every epoch.

    Attributes:
        options: How they are grafted.
        folder: The run's folder, which has one for each network.
    """

    options: GraftingOptions
    folder: Path
    _trainers: dict[str, Any] = field(default_factory=dict, init=False)
    _layers: list[Layer] = field(default_factory=list, init=False)
    _begun: bool = field(default=False, init=False)

    @property
    def names(self) -> list[str]:
        """Names of the networks, which are those of their folders."""
        return [f"net{index}" for index in range(1, self.options.nets + 1)]

    @property
    def nets(self) -> list[Path]:
        """Folders of the networks."""
        return [self.folder / name for name in self.names]

    def begin(
        self, starts: Sequence[str | Path], seed: int, callbacks: Sequence[Mapping[str, Callback]], **stock: Any
    ) -> Path:
        """Train from the start; return the best network's best checkpoint."""
        seeds = dict(zip(self.names, range(seed, seed + self.options.nets), strict=True))
        place = {**stock, "project": str(self.folder), "exist_ok": True, "patience": 0}
        works = [
            partial(self._train, model=start, callbacks=callbacks, name=name, seed=seeds[name], **place)
            for name, start in zip(self.names, starts, strict=True)
        ]
        bests = run_side_by_side(works, partial(self._meet, seeds=seeds))
        return self._finish(bests)

    def resume(self, callbacks: Sequence[Mapping[str, Callback]], **stock: Any) -> Path:
        """Go on from the last epoch that all networks have saved; return the best network's best checkpoint.

        Raises:
            CheckpointError: The run is finished, or was stopped before all networks had saved an epoch.
        """
        state = state_of_nets(self.folder)
        if state != "resumable":
            why = "it is finished" if state == "finished" else "not every network has saved an epoch"
            raise CheckpointError(
                f"'{self.folder}' has no training to resume: {why}",
                expected="the last.pt of a network of an interrupted run",
                remedy="leave `resume` out to start a new training",
            )
        done = go_back(self.nets)
        lasts = [net / "weights" / "last.pt" for net in self.nets]
        if done == int(unpickle(lasts[0])["train_args"]["epochs"]):  # stopped while it was wound up
            return self._finish([_stripped(net) for net in self.nets])
        works = [
            partial(self._train, model=last, callbacks=callbacks, resume=True, **{**stock, "patience": 0})
            for last in lasts
        ]
        return self._finish(run_side_by_side(works, self._meet))

    def _train(
        self, turn: Turn[Path], *, model: str | Path, callbacks: Sequence[Mapping[str, Callback]], **stock: Any
    ) -> Path:
        return train(model, callbacks=[*callbacks, self._callbacks(turn)], **stock)

    def _callbacks(self, turn: Turn[Path]) -> dict[str, Callback]:
        """Return what makes one training meet the others. Before the host ends one, all have saved their last epoch."""
        return {
            OPTIMIZER_BUILT: self._set_lr,
            "on_pretrain_routine_end": lambda trainer: self._enter(trainer, turn),
            "on_train_epoch_start": lambda trainer: LOGGER.info(f"grafting: {trainer.save_dir.name}"),
            "on_train_batch_end": lambda _: turn.require_wanted(),
            "on_train_epoch_end": lambda trainer: self._end_epoch(trainer, turn),
            BEFORE_FINAL_EVAL: lambda trainer: turn.pause(trainer.epochs + 1),
        }

    def _set_lr(self, trainer: Any) -> None:
        factor = lr_factor(self.names.index(trainer.save_dir.name) + 1, self.options.nets)
        for group in trainer.optimizer.param_groups:
            group["lr"] *= factor

    def _enter(self, trainer: Any, turn: Turn[Path]) -> None:
        self._trainers[trainer.save_dir.name] = trainer
        turn.pause(trainer.start_epoch)

    def _end_epoch(self, trainer: Any, turn: Turn[Path]) -> None:
        turn.pause(trainer.epoch + 1)
        keep_previous(trainer.save_dir)

    def _meet(self, done: int, *, seeds: Mapping[str, int] | None = None) -> None:
        """Act where all networks have the same number of epochs behind them."""
        trainers = [self._trainers[name] for name in self.names]
        if not self._begun:
            self._begun, self._layers = True, trained_layers(trainers[0])
            self._look_alike(trainers)
            if seeds is not None:
                self._note_begin(seeds)
            return
        if done > trainers[0].epochs:
            return
        weights = graft_cyclically([networks_of(trainer) for trainer in trainers], self._layers, self.options)
        means = [None if chosen is None else sum(chosen.values()) / len(chosen) for chosen in weights]
        note_epoch(self.folder, done, dict(zip(self.names, means, strict=True)))
        shown = ", ".join("nothing taken: values are not finite" if mean is None else f"{mean:.3f}" for mean in means)
        LOGGER.info(f"grafting, epoch {done}: mean weight of the own layers {shown}")

    def _note_begin(self, seeds: Mapping[str, int]) -> None:
        """Take the folder into use: what an earlier run left there would be taken for this one's."""
        forget_nets(self.folder, self.nets)
        factors = {name: lr_factor(index, self.options.nets) for index, name in enumerate(self.names, 1)}
        nets = {name: {"seed": seeds[name], "lr_factor": factors[name]} for name in self.names}
        write_record(self.folder, new_record(self.options, nets))
        shares = ", ".join(f"{factor:.2f}" for factor in factors.values())
        LOGGER.info(
            f"grafting: {self.options.nets} networks side by side, with {shares} of lr0; early stopping "
            "is off, since none may stop before the others"
        )

    def _look_alike(self, trainers: Sequence[Any]) -> None:
        """Assert what `require_same_shapes` asked of the checkpoints of the networks that are trained."""
        shapes = [_shapes(networks_of(trainer)[0]) for trainer in trainers]
        if any(other != shapes[0] for other in shapes):
            raise ConfigError("the networks differ once they are set up", expected="the same shapes in all of them")

    def _finish(self, bests: Sequence[Path]) -> Path:
        """Give the run the best checkpoint of its best network, and say which one it is."""
        fitness = {name: _fitness_in(path) for name, path in zip(self.names, bests, strict=True)}
        name = max(fitness, key=lambda name: fitness[name])
        write_record(self.folder, {**(grafting_record(self.folder) or {}), "fitness": fitness, "best": name})
        best = self.folder / "weights" / "best.pt"
        with new_file(best, replace=True) as temporary:
            temporary.write_bytes(bests[self.names.index(name)].read_bytes())
        forget_previous(self.nets)
        LOGGER.info(f"grafting: {name} is the best network, fitness {fitness[name]:.4f} of {_listed(fitness)}")
        return best


def train_nets(
    options: GraftingOptions,
    model: str | Path,
    *,
    resume: bool = False,
    callbacks: Sequence[Mapping[str, Callback]] = (),
    **stock: Any,
) -> Path:
    """Train several networks side by side, with the arguments of `trainer.train`.

    Args:
        options: How they are grafted.
        model: What all start from, or the `last.pt` of any network of the run that is resumed.
        resume: Continue an interrupted run, all its networks.
        callbacks: What else is called in each training, by event of the host.
        stock: Any training key of the host; `seed`, `project` and `name` are those of the run.

    Returns:
        Path of the best checkpoint of the best network, in the run's own folder.

    Raises:
        CheckpointError: There is nothing to resume.
        ConfigError: Networks of different shapes, or a training that cannot have neighbours.
        OutputError: Another process trains in the run's folder.
    """
    given = {**stock_keys(), **(read_stock_yaml(Path(str(stock["cfg"]))) if stock.get("cfg") else {}), **stock}
    _require_one_device(given)
    if resume:
        folder = run_folder(Path(model).resolve().parents[1])
        with claimed(folder):  # before the networks are brought to one epoch, each of which claims its own folder
            return NetsTraining(options, folder).resume(callbacks, **stock)
    starts = options.models or (str(model),) * options.nets
    if Path(starts[0]) != Path(model):
        raise ConfigError(f"model={model}, grafting.models begins with {starts[0]}", expected="the same checkpoint")
    require_same_shapes(starts)
    place = {key: given.get(key) for key in ("project", "name", "exist_ok")}
    folder = get_save_dir(SimpleNamespace(task=task_of(load_model(str(model))), mode="train", **place))
    with claimed(folder):
        training = NetsTraining(options, folder)
        return training.begin(starts, int(given["seed"]), callbacks, **_without(stock, "seed", "name"))


def require_same_shapes(starts: Sequence[str | Path]) -> None:
    """Refuse networks of which one cannot take the other's weights.

    Raises:
        CheckpointError: One cannot be read.
        ConfigError: They differ.
    """
    first = _shapes(load_model(str(starts[0])))
    for name in dict.fromkeys(starts[1:]):
        other = _shapes(load_model(str(name)))
        different = [path for path in {**first, **other} if first.get(path) != other.get(path)]
        if different:
            path = different[0]
            raise ConfigError(
                f"'{starts[0]}' and '{name}' differ in {len(different)} tensors, first '{path}': "
                f"{first.get(path, 'absent')} and {other.get(path, 'absent')}",
                expected="networks of the same shapes, such as two trainings of one slim checkpoint",
            )


def _require_one_device(given: Mapping[str, Any]) -> None:
    """Refuse trainings that cannot have neighbours in one process.

    Raises:
        ConfigError: Several GPUs, a batch size that the host finds by filling the memory, or as `require_plain`.
    """
    require_plain(given, "method=grafting")
    device, batch = given.get("device"), given["batch"]
    if len(device if isinstance(device, (list, tuple)) else str(device).split(",")) > 1:
        raise ConfigError(
            f"grafting.mode=external with device={device}",
            expected="one device: the networks take turns in one process",
            remedy="device=0",
        )
    if batch < 1:
        raise ConfigError(
            f"grafting.mode=external with batch={batch}",
            expected="a number of images: the networks share the memory",
            remedy="batch=16",
        )


def _shapes(model: Any) -> dict[str, list[int]]:
    return {path: list(value.shape) for path, value in model.state_dict().items()}


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _stripped(net: Path) -> Path:
    """Do to a network's checkpoints what the host does when it finishes, unless it has; return the best one."""
    last, best = (net / "weights" / f"{name}.pt" for name in ("last", "best"))
    for path in (last, best):
        if path.is_file() and unpickle(path).get("optimizer") is not None:
            strip_whole(path)
    return best if best.is_file() else last


def _fitness_in(checkpoint: Path) -> float:
    found = (unpickle(checkpoint).get("train_metrics") or {}).get("fitness")
    return 0.0 if found is None else float(found)  # the least that the host gives


def _listed(fitness: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in fitness.items())
