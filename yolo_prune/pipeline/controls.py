"""Controls of a run: what honesty asks a slim model to be compared with.

`control`: its shapes from random weights, trained as the fine-tune. `direct`: the dense model pruned once to as many
MACs, without the method, and trained as the fine-tune. `smaller`: the next smaller scale, trained as long as the dense
and the slim model together, which is the real rival.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from yolo_prune.hosts.slim import MARKER, ZEROS, write_checkpoint
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.hosts.ultralytics.trainer import reset_weights
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.pipeline.run_config import RunConfig, direct_settings
from yolo_prune.pipeline.stages import Stages
from yolo_prune.pipeline.train import split_settings
from yolo_prune.plan import cost_at


def names_of(config: RunConfig) -> list[str]:
    """Return the controls that a run asks for."""
    asked = {"control": config.control, "direct": config.direct is not None, "smaller": config.smaller is not None}
    return [name for name, wanted in asked.items() if wanted]


def timed_of(config: RunConfig) -> list[str]:
    """Return those of them that are exported and timed: not the one whose shapes are the slim model's."""
    return [name for name in names_of(config) if name != "control"]


STAGES = {
    "control": ("control_weights", "control"), "direct": ("direct_prune", "direct"), "smaller": ("smaller",),
}  # fmt: skip
"""The stages of each, evaluation and export aside."""


def smaller_keys(config: RunConfig) -> dict[str, Any]:
    """Return the training keys of the smaller scale: those of the dense model, for the epochs of both trainings."""
    own = [settings for settings in (config.train, config.finetune) if settings.get("epochs")]
    epochs = sum(int(settings["epochs"]) for settings in own)
    return {**split_settings(own[0] if own else config.finetune)[1], **({"epochs": epochs} if own else {})}


class Controls:
    """The stages of a run's controls.

    Args:
        config: Of the run.
        stages: Of the run.
        train: Trains a checkpoint in a folder of the run with host keys; returns the best checkpoint.
        pruning: Settings of a prune stage.
        fresh: Removes what a killed stage left at a path.
    """

    def __init__(
        self,
        config: RunConfig,
        stages: Stages,
        *,
        train: Callable[[str, str, dict[str, Any]], Path],
        pruning: Callable[..., PruneConfig],
        fresh: Callable[[Path], Path],
    ) -> None:
        self._config, self._stages, self._folder = config, stages, stages.folder
        self._train, self._pruning, self._fresh = train, pruning, fresh
        self.checkpoints: dict[str, Path] = {}
        self.costs: dict[str, Mapping[str, int]] = {}

    def run(self, dense: Path, shapes: Path, plan: Mapping[str, Mapping[str, int]]) -> None:
        """Go through their stages.

        Args:
            dense: The dense checkpoint.
            shapes: A checkpoint that has the slim shapes.
            plan: MACs and parameters, `before` and `after`.
        """
        names, tuning = names_of(self._config), split_settings(self._config.finetune)[1]
        if "control" in names:
            self._stages.run("control_weights", lambda: self._control_weights(shapes))
            self._run("control", lambda: self._train(str(self._folder / "control.pt"), "control", tuning))
            self.costs["control"] = plan["after"]
        if "direct" in names:
            target = plan["after"]["macs"] / plan["before"]["macs"]
            pruned = self._stages.run("direct_prune", lambda: self._direct_prune(dense, target))
            self._run("direct", lambda: self._train(str(self._folder / "direct.pt"), "direct", tuning))
            self.costs["direct"] = pruned["plan"]["after"]
        if "smaller" in names:
            model, keys = str(self._config.smaller), smaller_keys(self._config)
            self._run("smaller", lambda: self._train(model, "smaller", keys))
            self.costs["smaller"] = cost_of(self.checkpoints["smaller"], self._config.imgsz)

    def _run(self, name: str, train: Callable[[], Path]) -> None:
        self.checkpoints[name] = Path(self._stages.run(name, lambda: {"best": str(train())})["best"])

    def _control_weights(self, shapes: Path) -> dict[str, Any]:
        """Write the slim shapes with random weights."""
        source = read_checkpoint(shapes)
        reset_weights(source.model, seed=self._config.seed)
        getattr(source.model, MARKER).pop(ZEROS, None)  # the zeros of weights that are gone
        path = self._folder / "control.pt"
        content = {"model": source.model, "epoch": -1, "train_args": source.train_args}
        write_checkpoint(path, content, replace=True)
        return {"path": str(path)}

    def _direct_prune(self, dense: Path, target: float) -> dict[str, Any]:
        """Prune the dense model at once to as many MACs as the slim one has."""
        out = self._fresh(self._folder / "direct.pt")
        return prune(self._pruning(direct_settings(self._config, target), model=str(dense), out=str(out))).to_json()


def cost_of(checkpoint: Path, imgsz_px: int) -> dict[str, int]:
    """Return MACs and parameters of a checkpoint."""
    graph = trace_model(read_checkpoint(checkpoint).model)
    return asdict(cost_at(graph, graph.widths(), imgsz_px))
