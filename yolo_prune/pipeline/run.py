"""`run`: from a model and data to a slim, fine-tuned, exported and timed one, resumable at every stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolo_prune import __version__
from yolo_prune.claims import claimed
from yolo_prune.device.benchmark import benchmark
from yolo_prune.device.benchmark_record import BenchmarkReport
from yolo_prune.export.profile import RESULT as PROFILE
from yolo_prune.export.runtimes import runtime_for
from yolo_prune.files import is_temporary, new_file, sha256, temporary_prefix, write_json
from yolo_prune.hosts.slim import MARKER, PROOF
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import evaluate
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.pipeline.artefacts import (
    Variant,
    calibration_inputs,
    export_proved,
    sample_images,
    variants,
)
from yolo_prune.pipeline.controls import STAGES, Controls, names_of, timed_of
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.report import ReportConfig, report
from yolo_prune.pipeline.rewrite import rewrite
from yolo_prune.pipeline.run_config import RunConfig, check, prune_settings, prunes_in_training, rewrite_settings
from yolo_prune.pipeline.shown import layer_widths, side_by_side
from yolo_prune.pipeline.stages import Stages
from yolo_prune.pipeline.train import train_in
from yolo_prune.plan import cost_at
from yolo_prune.report.summary import summarize

IMAGES = 8
"""Images of the val split that parity looks at."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run found."""

    folder: Path
    summary: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return self.summary

    def table(self) -> str:
        """Return the one table."""
        return f"{summarize(self.summary)}written to {self.folder / 'summary.md'}, summary.json and report.html\n"


def run(config: RunConfig) -> RunResult:
    """Run every stage that is not done yet and sum up.

    Raises:
        YoloPruneError: Bad input, before any long work; or a proof that failed.
    """
    check(config)
    work = _Run(config)
    work.open()
    with claimed(work.folder):
        return work.all()


class _Run:
    """The stages of one run. Each method is a stage: reads files, writes files, returns its record."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.data = Path(config.data)
        self.names = ["dense", "slim", *names_of(config)]
        self.timed = ["dense", "slim", *timed_of(config)]
        self.variants = variants(config.formats, config.precisions, imgsz_px=config.imgsz)
        self.prunes_in_training = prunes_in_training(config)
        self.stages = Stages(self.folder, self.planned())
        self.checkpoints: dict[str, Path] = {}
        self.controls = Controls(config, self.stages, train=self._train, pruning=prune_settings, fresh=self._fresh)

    def planned(self) -> list[str]:
        """Return the names of all stages in their order."""
        slimming = ["finetune", "pruned"] if self.prunes_in_training else ["prune", "finetune"]
        return [
            "dense", *(["rewrite"] if self.config.rewrite else []), *slimming,
            *(stage for name in names_of(self.config) for stage in STAGES[name]),
            *(f"evaluate_{name}" for name in self.names), "widths", "detections",
            *(f"export_{name}_{variant.label}" for name in self.timed for variant in self.variants), "benchmark",
        ]  # fmt: skip

    def open(self) -> None:
        """Begin the folder, or find that this very run began it."""
        settings = {key: value for key, value in asdict(self.config).items() if key not in ("out", "json")}
        choices = [self.config.prune.get(key) for key in ("plan", "ratios", "sensitivity", "profile")]
        named = [Path(name) for name in (self.config.model, self.config.data, self.config.smaller, *choices) if name]
        named = [path / PROFILE if (path / PROFILE).is_file() else path for path in named]
        self.stages.open({**settings, "files_sha256": {str(path): sha256(path) for path in named if path.is_file()}})

    def all(self) -> RunResult:
        """Go through the stages in order."""
        self.checkpoints["dense"] = Path(self.stages.run("dense", self.dense)["best"])
        rewritten = self.stages.run("rewrite", self.rewrite) if self.config.rewrite else {}
        if self.prunes_in_training:
            self.checkpoints["slim"] = Path(self.stages.run("finetune", self.finetune)["best"])
            pruned = self.stages.run("pruned", self.pruned)
        else:
            pruned = self.stages.run("prune", self.prune)
            if self.config.rewrite:  # what was pruned cost more than the dense model
                pruned["plan"]["before"] = rewritten["before"]
            self.checkpoints["slim"] = Path(self.stages.run("finetune", self.finetune)["best"])
        shapes = self.checkpoints["slim"] if self.prunes_in_training else self.folder / "pruned.pt"
        self.controls.run(self.checkpoints["dense"], shapes, pruned["plan"])
        self.checkpoints |= self.controls.checkpoints
        evaluations = {name: self.stages.run(f"evaluate_{name}", self.evaluating(name)) for name in self.names}
        # Layers of a rewritten form have other numbers than those of the dense model.
        self.stages.run("widths", lambda: layer_widths({**self._pair(), "dense": self._whole()}))
        self.stages.run("detections", self.detections)
        exports = {
            f"{name}_{variant.label}": self.stages.run(f"export_{name}_{variant.label}", self.exporting(name, variant))
            for name in self.timed
            for variant in self.variants
        }
        timings = self.stages.run("benchmark", lambda: self.benchmark(exports))
        self._tidy()
        result = self.sum_up(pruned, evaluations, exports, timings)
        report(ReportConfig(run=str(self.folder)))
        return result

    def dense(self) -> dict[str, Any]:
        """Train the dense model, or take it as it is."""
        if not self.config.train.get("epochs"):
            return {"best": self.config.model}
        return {"best": str(self._train(self.config.model, "dense", self.config.train))}

    def rewrite(self) -> dict[str, Any]:
        """Give the dense model the form that is pruned, and prove that it is equal."""
        out = self._fresh(self.folder / "rewritten.pt")
        return rewrite(rewrite_settings(self.config, model=str(self.checkpoints["dense"]), out=str(out))).to_json()

    def prune(self) -> dict[str, Any]:
        """Prune the dense model and prove the result."""
        out = self._fresh(self.folder / "pruned.pt")
        return prune(prune_settings(self.config, model=str(self._whole()), out=str(out))).to_json()

    def _whole(self) -> Path:
        """Return the checkpoint that is pruned: the dense one, or its rewritten form."""
        return self.folder / "rewritten.pt" if self.config.rewrite else self.checkpoints["dense"]

    def finetune(self) -> dict[str, Any]:
        """Fine-tune the slim model, or the dense one with what makes it slim."""
        settings = dict(self.config.finetune)
        if settings.get("distill") == "dense":
            settings["distill"] = str(self.checkpoints["dense"])
        start = self._whole() if self.prunes_in_training else self.folder / "pruned.pt"
        return {"best": str(self._train(str(start), "slim", settings))}

    def pruned(self) -> dict[str, Any]:
        """Return what the stage of pruning would have told, where the fine-tune removed channels."""
        models = [read_checkpoint(self.checkpoints[name]).model for name in ("dense", "slim")]
        graphs = [trace_model(model) for model in models]
        before, after = (asdict(cost_at(graph, graph.widths(), self.config.imgsz)) for graph in graphs)
        proof = {key: value for key, value in getattr(models[1], MARKER).items() if key == PROOF}
        return {"plan": {"before": before, "after": after}, "verification": proof}

    def evaluating(self, name: str) -> Callable[[], dict[str, Any]]:
        """Return the stage that measures mAP of a model on every split."""

        def work() -> dict[str, Any]:
            model, imgsz = self.checkpoints[name], self.config.imgsz
            return {s: evaluate(model, data=self.data, split=s, imgsz_px=imgsz).to_json() for s in self.config.splits}

        return work

    def _pair(self) -> dict[str, Path]:
        return {name: self.checkpoints[name] for name in ("dense", "slim")}

    def detections(self) -> dict[str, Any]:
        """Draw what dense and slim find in the same images."""
        config = self.config
        return side_by_side(
            self._pair(), self.folder, data=self.data, split=["val", *config.splits][-1], imgsz_px=config.imgsz
        )

    def exporting(self, name: str, variant: Variant) -> Callable[[], dict[str, Any]]:
        """Return the stage that exports a model and proves that it agrees, on the val split."""

        def work() -> dict[str, Any]:
            source, folder = self._named_copy(name), self.folder / "exports"
            for place in variant.places(folder, name):
                self._fresh(place)
            found = export_proved(
                read_checkpoint(source), folder, variant, data=self.data, **self._evidence(source, variant)
            )
            if found.error is not None:
                raise found.error
            return found.to_json()

        return work

    def _evidence(self, source: Path, variant: Variant) -> dict[str, Any]:
        """Return what an artefact is judged by, and calibrated with."""
        config = self.config
        found: dict[str, Any] = {"images": sample_images(self.data, "val", IMAGES)}
        if variant.precision == "int8":
            found["calibration"] = calibration_inputs(self.data, config.calibration, config.imgsz, seed=config.seed)
        if variant.precision != "fp32":
            found["reference"] = evaluate(source, data=self.data, split="val", imgsz_px=config.imgsz, square=True)
        return found

    def benchmark(self, exports: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Time dense and slim beside each other on every runtime."""
        artefacts = {f"{name}_pytorch": self.checkpoints[name] for name in self.timed}
        artefacts |= {name: Path(record["path"]) for name, record in exports.items()}
        config = self.config
        report = benchmark(
            artefacts, imgsz_px=config.imgsz, threads=config.threads, runs=config.runs, runtime_for=runtime_for
        )
        return report.to_json()

    def sum_up(self, pruned: dict[str, Any], evaluations: Any, exports: Any, timings: Any) -> RunResult:
        """Write the summary of all stages."""
        report = BenchmarkReport.from_json(timings)
        plan = pruned["plan"]
        costs = {"dense": plan["before"], "slim": plan["after"], **self.controls.costs}
        summary = {
            "settings": {key: value for key, value in asdict(self.config).items() if key != "json"},
            "costs": costs,
            "verification": pruned["verification"],
            "evaluations": evaluations,
            "parity": {name: record["parity"] for name, record in exports.items()},
            "accuracy": {name: record["accuracy"] for name, record in exports.items() if record.get("accuracy")},
            "latency_ms": {entry.name: asdict(entry.summary) for entry in report.entries},
            "speed_up": self._speed_ups(report, "slim"),
            "control_speed_up": {name: self._speed_ups(report, name) for name in self.timed[2:]},
            "machine": asdict(report.machine),
            "version": __version__,
        }
        write_json(self.folder / "summary.json", summary, replace=True)
        with new_file(self.folder / "summary.md", replace=True) as temporary:
            temporary.write_text(summarize(summary, markdown=True), encoding="utf-8")
        return RunResult(folder=self.folder, summary=summary)

    def _speed_ups(self, report: BenchmarkReport, name: str) -> dict[str, Any]:
        """Return how much faster a model is than the dense one, by backend."""
        backends = ["pytorch", *(variant.label for variant in self.variants)]
        return {one: asdict(report.speed_up(f"{name}_{one}", f"dense_{one}")) for one in backends}

    def _train(self, model: str, name: str, options: dict[str, Any]) -> Path:
        """Train, resuming a run that was killed; start anew where nothing can be resumed."""
        fixed = {"imgsz": self.config.imgsz, "seed": self.config.seed}
        return train_in(self.folder / name, Path(model), self.data, {**options, **fixed})

    def _named_copy(self, name: str) -> Path:
        """Copy a checkpoint to a name that says what it is; artefacts are called after it."""
        copy = self.folder / "exports" / f"{name}.pt"
        with new_file(copy, replace=True) as temporary:
            shutil.copyfile(self.checkpoints[name], temporary)
        return copy

    def _tidy(self) -> None:
        """Remove what killed processes left half written; the data may stand in the folder, and are the user's."""
        own = [path for path in self.folder.iterdir() if path.name != "data"]
        for left in [path for top in own for path in (top, *top.rglob(".*")) if is_temporary(path)]:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

    def _fresh(self, path: Path) -> Path:
        """Remove what a killed stage of this run left at a path of this run, unfinished files beside it included."""
        for left in (path, *path.parent.glob(f"{temporary_prefix(path)}*")):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        return path
