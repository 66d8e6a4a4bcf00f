"""Filter grafting inside the host's trainer: noise and strong filters within one network.

Several networks that graft onto each other are trained by `grafting_nets`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER, RANK

from yolo_prune.errors import ConfigError
from yolo_prune.files import from_record
from yolo_prune.hosts.ultralytics.grafting_files import RECORD, grafting_record, note_epoch, run_folder, write_record
from yolo_prune.hosts.ultralytics.networks import bare_copy, network_of
from yolo_prune.hosts.ultralytics.refusals import require_plain
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.methods.grafting import Grafting, Layer, filter_layers, graft_internally, graft_noise, layers_of


@dataclass(frozen=True, kw_only=True)
class GraftingOptions(Grafting):
    """How filters are revived, and what the networks start from.

    Attributes:
        models: Start checkpoint of each network side by side; all start from one model without.

    Raises:
        ConfigError: A value that is unknown or out of range.
    """

    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.models and len(self.models) != self.nets:
            raise ConfigError(
                f"grafting.models names {len(self.models)} checkpoints, grafting.nets={self.nets}",
                expected="one for each network",
            )

    @property
    def side_by_side(self) -> bool:
        """Whether several networks are trained."""
        return self.mode == "external"


@dataclass
class GraftingTraining:
    """The callbacks of one training whose network revives its own filters; several networks bring their own.

    Nothing is grafted after the last epoch: what is new has to be trained.

    Attributes:
        options: How filters are revived.
    """

    options: GraftingOptions
    _layers: list[Layer] = field(default_factory=list, init=False)

    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        """Return what the host's trainer calls, by event. Picklable before training begins."""
        if self.options.side_by_side:
            return {}
        return {"on_pretrain_routine_end": self.begin, "on_train_epoch_start": self.begin_epoch}

    def begin(self, trainer: Any) -> None:
        """Find the layers, and begin the record of a new run.

        Raises:
            ConfigError: A training whose network or length is not known.
        """
        require_plain(vars(trainer.args), "method=grafting")
        self._layers = filter_layers(network_of(trainer.model), trained_layers(trainer))
        if RANK in {-1, 0} and not (trainer.resume and grafting_record(trainer.save_dir)):
            write_record(trainer.save_dir, new_record(self.options))

    def begin_epoch(self, trainer: Any) -> None:
        """Graft onto the invalid filters of the network and of its average alike, after each epoch but the last.

        An epoch of training comes before the next validation: statistics behind a new filter have to be measured first.
        """
        epoch = trainer.epoch
        if not epoch:
            return
        models, threshold = networks_of(trainer), self.options.threshold
        if self.options.mode == "internal":
            revived = graft_internally(models, self._layers, threshold)
        else:
            deviation = self.options.noise_base**epoch
            seed = trainer.args.seed * trainer.epochs + epoch
            revived = graft_noise(models, self._layers, threshold, deviation=deviation, seed=seed)
        if RANK in {-1, 0}:
            LOGGER.info(f"grafting, epoch {epoch}: {revived} invalid filters revived ({self.options.mode})")
            note_epoch(trainer.save_dir, epoch, revived)


def networks_of(trainer: Any) -> list[nn.Module]:
    """Return the network that is trained and its average."""
    return [network_of(trainer.model), network_of(trainer.ema.ema)]


def trained_layers(trainer: Any) -> list[Layer]:
    """Return the convolutions of the network that is trained, each with the batch norm behind it."""
    return layers_of(network_of(trainer.model), trace_model(bare_copy(trainer.model)).norms)


def new_record(options: GraftingOptions, nets: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the record of a run that begins: its options, what is special to each network, and no epochs."""
    return {"options": asdict(options), "nets": dict(nets or {}), "epochs": []}


def grafting_options_of(folder: Path) -> GraftingOptions | None:
    """Return how the network, or the networks, of a run are grafted; None if they are not.

    Args:
        folder: Folder of the run, or of one of its networks.

    Raises:
        ConfigError: The record is damaged.
    """
    return from_record(run_folder(folder) / RECORD, _options_in)


def _options_in(record: dict[str, Any]) -> GraftingOptions:
    return GraftingOptions(**{**record["options"], "models": tuple(record["options"]["models"])})
