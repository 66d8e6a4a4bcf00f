"""The host's distillation as one flag: slim students, students that lose channels on their way, and resume."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_files import globals_named_in, save_as_host
from command_line import contents
from models import lively
from random_plans import random_keep
from resrep_cases import FLOORS, small_network
from test_gradual import macs_in, words_for
from test_training import KILLED, QUICK, WORDS, epochs_in
from ultralytics.nn.distill_model import DistillationModel, FeatureHook

from yolo_prune.claims import LOCK
from yolo_prune.hosts.slim import MARKER, is_slim, unfinished, widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.distillation import distilled_by, optimized_parameters, with_projectors
from yolo_prune.hosts.ultralytics.networks import bare_copy
from yolo_prune.hosts.ultralytics.records import FILES
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model
from yolo_prune.hosts.ultralytics.unstructured import require_pattern
from yolo_prune.pipeline.training_methods import METHODS
from yolo_prune.surgery import silence

IMAGE = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def wrapped(name: str) -> Any:
    """The host's distillation around a lively model, taught by another of its kind."""
    student = lively(name)
    student.args = SimpleNamespace(imgsz=64, dis=6.0)
    torch.manual_seed(1)
    return DistillationModel(teacher_model=copy.deepcopy(student), student_model=student)


def projected(model: Any) -> list[torch.Tensor]:
    """What the projectors make of the student's neck."""
    with torch.no_grad():
        model.eval()(IMAGE)
        necks = [model.decouple_outputs(model._student_feats[level]) for level in range(len(model.projector))]
        return [project(neck) for project, neck in zip(model.projector, necks, strict=True)]


class TestWrapper:
    @pytest.mark.parametrize("name", ["yolov8n", "yolov10n", "yolo26n", "yolov8n-seg"])
    def test_a_projector_reads_of_a_slim_student_what_it_read_of_the_silenced_one(self, name):
        """The law silenced = sliced, with what the host hangs on the network."""
        dense = wrapped(name)
        graph = with_projectors(trace_model(bare_copy(dense)), dense)
        keep = random_keep(graph, 0)
        slim = distilled_by(dense, slim_copy(bare_copy(dense), graph, keep), graph, keep)
        silence(dense.student_model, graph, keep)
        for expected, found in zip(projected(dense), projected(slim), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        narrower = [
            (name, dim)
            for name, parameter in optimized_parameters(slim).items()
            for dim, (size, was) in enumerate(
                zip(parameter.shape, optimized_parameters(dense)[name].shape, strict=True)
            )
            if size < was and name.startswith("projector.")
        ]
        assert narrower == [(f"projector.{level}.0.weight", 1) for level in range(3)]

    def test_a_copy_is_bare_and_the_original_keeps_its_hooks(self):
        dense = wrapped("yolov8n")
        dense.train()(IMAGE)  # what the hooks hold now is part of a graph, which torch refuses to copy
        bare = bare_copy(dense)
        hooks = [
            [hook for module in model.modules() for hook in module._forward_hooks.values()]
            for model in (bare, dense.student_model)
        ]
        assert hooks[0] == []
        assert [type(hook) for hook in hooks[1]] == [FeatureHook] * 4
        assert not bare.training

    def test_where_nothing_is_distilled_nothing_is_wrapped(self):
        model = lively("yolov8n")
        graph = trace_model(model)
        assert with_projectors(graph, model) is graph
        slim = slim_copy(model, graph, random_keep(graph, 0))
        assert distilled_by(model, slim, graph, random_keep(graph, 0)) is slim
        assert list(optimized_parameters(model)) == [name for name, _ in model.named_parameters()]


def loss_columns(folder: Path) -> list[float]:
    """The host's column of distillation losses."""
    head, *rows = (folder / "results.csv").read_text().splitlines()
    column = [name.strip() for name in head.split(",")].index("train/dis_loss")
    return [float(row.split(",")[column]) for row in rows]


LEARNING: dict[str, tuple[bool, dict[str, Any]]] = {
    "resrep": (True, {"epochs": 8, "batch": 1, "nbs": 1, "warmup_epochs": 0.5, **FLOORS, "target_macs": 0.6}),
    "stripes": (False, {"epochs": 2, "target_macs": 0.6}),
    "unstructured": (False, {"epochs": 1, "unstructured.pattern": "2:4", "unstructured.targets": "[all]"}),
    "grafting": (False, {"epochs": 2, "grafting.mode": "internal", "grafting.threshold": 0.9}),
}
"""Whether a method needs the small network, on which many steps are quick, and its settings."""


@pytest.mark.slow
class TestTraining:
    def test_a_slim_student_stays_slim_and_learns_from_its_teacher(
        self, command, slim_checkpoint, dense_checkpoint, tiny_data, tmp_path
    ):
        words = ["train", f"model={slim_checkpoint}", f"distill={dense_checkpoint}", f"data={tiny_data}", "epochs=2"]
        assert command(*words, f"project={tmp_path}", "name=a", *WORDS).code == 0
        losses = loss_columns(tmp_path / "a")
        assert len(losses) == 2
        assert all(loss > 0 for loss in losses)
        for name in ("best.pt", "last.pt"):
            model = read_checkpoint(tmp_path / "a" / "weights" / name).model
            assert is_slim(model)
            assert widths(model) == widths(read_checkpoint(slim_checkpoint).model)

    def test_a_student_is_silenced_softly_and_then_loses_channels(self, command, dense_checkpoint, tiny_data, tmp_path):
        words = words_for(dense_checkpoint, tiny_data, tmp_path, distill=dense_checkpoint, prune_soft="true")
        assert command(*words).code == 0
        folder = tmp_path / "a"
        steps = json.loads((folder / "pruning.json").read_text())["steps"]
        assert [step["step"] for step in steps] == [3]
        assert macs_in(folder / "weights" / "last.pt") == steps[-1]["after"]["macs"] <= 0.4 * macs_in(dense_checkpoint)
        assert all(loss > 0 for loss in loss_columns(folder))

    @pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.named])
    def test_beside_a_method_of_training(self, command, dense_checkpoint, tiny_data, tmp_path, method):
        """Stock checkpoints with what the method does are left, and no file that a later run would not forget."""
        small, settings = LEARNING[method]
        model = save_as_host(small_network(), tmp_path / "small.pt") if small else dense_checkpoint
        place = {"data": tiny_data, "project": tmp_path, "name": "a", "optimizer": "SGD", "lr0": 0.01}
        asked = {**QUICK, **place, "method": method, "distill": model, **settings}
        outcome = command("train", f"model={model}", *(f"{key}={value}" for key, value in asked.items()))
        assert outcome.code == 0, outcome.err
        folder = tmp_path / "a"
        assert epochs_in(folder) == list(range(1, asked["epochs"] + 1))
        assert all(loss > 0 for loss in loss_columns(folder))
        for name in ("best.pt", "last.pt"):
            assert not any("yolo_prune" in module for module in globals_named_in(folder / "weights" / name))
            trained: Any = read_checkpoint(folder / "weights" / name).model
            assert unfinished(trained) is None
            assert not isinstance(trained, DistillationModel)
        marker, kept = getattr(trained, MARKER, {}), macs_in(folder / "weights" / "last.pt") / macs_in(model)
        done = {
            "resrep": lambda: kept <= 0.6,
            "stripes": lambda: marker["stripes"]["macs"] <= 0.6 * macs_in(model),
            "unstructured": lambda: marker["pattern"] == "2:4" and require_pattern(trained, "2:4") is None,
            "grafting": lambda: json.loads((folder / "grafting.json").read_text())["epochs"][0]["grafted"] > 0,
        }
        assert done[method]()
        known = [*FILES[method], "args.yaml", "results.csv", LOCK, "weights/best.pt", "weights/last.pt"]
        left = [name for name in contents(folder) if not name.endswith("/")]
        assert not [name for name in left if not any(Path(name).match(pattern) for pattern in known)]

    @pytest.mark.exhaustive
    def test_with_sparsity_too_and_killed_between_two_steps(self, command, dense_checkpoint, tiny_data, tmp_path):
        """All at once: two batches an epoch, so the fifth is behind the first two steps."""
        words = words_for(dense_checkpoint, tiny_data, tmp_path, distill=dense_checkpoint, sparsity=2.0)
        kill = [sys.executable, KILLED, "on_train_batch_end", "5", *words]
        assert subprocess.run(kill, capture_output=True, check=False).returncode == -signal.SIGKILL
        folder, whole = tmp_path / "a", tmp_path / "whole"
        assert command("train", f"model={folder / 'weights' / 'last.pt'}", "resume=true").code == 0
        assert command(*(word.replace(f"project={tmp_path}", f"project={whole}") for word in words)).code == 0
        assert epochs_in(folder) == epochs_in(whole / "a") == [1, 2, 3, 4, 5]
        steps = json.loads((folder / "pruning.json").read_text())["steps"]
        assert [step["step"] for step in steps] == [1, 2, 3]
        found, expected = (read_checkpoint(run / "weights" / "last.pt").model for run in (folder, whole / "a"))
        assert widths(found) == widths(expected)
        assert all(loss > 0 for loss in loss_columns(folder))
