"""What benchmarks that train share: the conditions of a comparison, and the training keys of the host."""

from __future__ import annotations

import dataclasses
from typing import Any

from yolo_prune.configuration import json_setting, setting

TRAINING: dict[str, Any] = {
    "optimizer": "SGD",
    "lr0": 0.01,
    "cos_lr": True,
    "warmup_epochs": 1,
    "close_mosaic": 5,
    "plots": False,
}
"""The host's training keys of every training."""


@dataclasses.dataclass(kw_only=True)
class ExperimentsConfig:
    """Settings of what compares ways from one dense checkpoint to slim ones."""

    data: str = setting(help="data yaml with train, val and test")
    model: str = setting(help="checkpoint that the dense training starts from")
    budgets: list[float] = setting([0.5], help="fractions of the MACs that are kept")
    seeds: list[int] = setting([0], help="seeds of all trainings")
    epochs: int = setting(30, help="epochs of each way, after the dense training", unit="epochs")
    dense_epochs: int = setting(30, help="epochs of the dense training", unit="epochs")
    batch: int = setting(16, help="batch size", unit="images")
    workers: int = setting(2, help="loader processes")
    threads: int = setting(2, help="threads of the runtimes")
    runs: int = setting(100, help="timed rounds")
    json: str | None = json_setting("the cells of the record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all ways share that are compared with each other.

    Attributes:
        budget: Fraction of the MACs that is kept.
        seed: Of all trainings.
        data: Name of the data set.
        model: Name of the checkpoint that the dense training starts from.
        imgsz_px: Image side.
        batch: Images of a batch.
        dense_epochs: Of the dense training; 0 where there is none.
        epochs: Of each way, after it.
    """

    budget: float
    seed: int
    data: str
    model: str
    imgsz_px: int
    batch: int
    dense_epochs: int
    epochs: int

    @property
    def base(self) -> str:
        """Name of the folder of the dense training that all start from."""
        return f"{self.model}-{self.data}-{self.imgsz_px}px-batch{self.batch}-dense{self.dense_epochs}-seed{self.seed}"
