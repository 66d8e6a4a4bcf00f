"""Segmentation, pose and rotated boxes through the same verbs as detection: one case table over the heads."""

from __future__ import annotations

import copy
import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from bundles import IMGSZ_PX
from checkpoint_files import TRAIN_ARGS, save_as_host
from command_line import write_yaml
from models import lively
from shapes import draw_dataset
from ultralytics import YOLO

from yolo_prune.cli import main
from yolo_prune.device.sources import read_image
from yolo_prune.errors import ConfigError, DataError, ParityError
from yolo_prune.export.parity import TOLERANCES, ParityReport, check_parity
from yolo_prune.hosts.slim import MARKER, is_slim, widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.evaluation import Evaluation, _scores, image_files
from yolo_prune.hosts.ultralytics.export import export_model
from yolo_prune.hosts.ultralytics.run_files import interrupted
from yolo_prune.hosts.ultralytics.trainer import TRAINERS, reset_weights, retarget_classes
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.pipeline.train import EvaluationTable

KILLED = Path(__file__).with_name("killed_process.py")
QUICK = {"imgsz": 64, "batch": 8, "nbs": 8, "warmup_epochs": 0, "workers": 0, "plots": False, "device": "cpu"}
QUICK |= {"verbose": False, "seed": 0}
WORDS = [f"{key}={value}" for key, value in QUICK.items()]

TASKS = {"seg": "segment", "pose": "pose", "obb": "obb"}
"""The host's names of the tasks, by the end of a yaml's name."""

TRAINED = ["yolo26n-seg", "yolo26n-pose", "yolov8n-obb"]
MORE = ["yolov8n-seg", "yolo11n-pose", "yolo26n-obb"]
"""Trained by `make test-all` only: the same heads in other families."""

HEADS = [f"{family}-{end}" for end in TASKS for family in ("yolov8n", "yolo11n", "yolo26n")]


AT_REST = re.compile(r"\.dfl|\.(one2one_)?cv[24]\w*\.[12]")
"""Paths of layers that need not move: constants, and towers for objects larger than most in so small a picture."""


def task_of(name: str) -> str:
    return TASKS[name.rpartition("-")[2]]


@dataclass(frozen=True)
class Case:
    """A slim model of one of the tasks, and data for it."""

    name: str
    folder: Path
    data: Path

    @property
    def task(self) -> str:
        return task_of(self.name)

    @property
    def slim(self) -> Path:
        return self.folder / "slim.pt"

    @property
    def tuned(self) -> Path:
        """The slim model after an epoch, trained when it is first asked for."""
        last = self.folder / "tuned" / "weights" / "last.pt"
        if not last.is_file():
            assert main(self.finetune("tuned", self.data, epochs=1)) == 0
        return last

    def finetune(self, name: str, data: Path, *, epochs: int) -> list[str]:
        words = ["finetune", f"model={self.slim}", f"data={data}", f"epochs={epochs}"]
        return [*words, f"project={self.folder}", f"name={name}", *WORDS]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The data yaml of a few drawn images for each task."""
    folder = tmp_path_factory.mktemp("tasks")
    sizes = {"seed": 0, "train": 16, "val": 8, "test": 1, "imgsz_px": 96}
    return {task: draw_dataset(folder / task, **sizes, task=task) for task in TASKS.values()}


def pruned(name: str, folder: Path) -> Path:
    """Write a slim model of half the MACs."""
    dense = save_as_host(lively(name), folder / "dense.pt", train_args={**TRAIN_ARGS, "task": task_of(name)})
    return prune(PruneConfig(model=str(dense), out=str(folder / "slim.pt"), target_macs=0.5)).out


@pytest.fixture(scope="module", params=[*TRAINED, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE)])
def case(request, drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    pruned(request.param, folder)
    return Case(request.param, folder, drawn[task_of(request.param)])


@pytest.fixture(scope="module")
def pose(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pose")
    pruned("yolov8n-pose", folder)
    return Case("yolov8n-pose", folder, drawn["pose"])


def described(data: Path, path: Path, **changes: object) -> Path:
    """Describe the same images otherwise; a value of None takes its line out."""
    description = {**yaml.safe_load(data.read_text()), "path": str(data.parent), **changes}
    return write_yaml(path, {key: value for key, value in description.items() if value is not None})


def with_more_classes(data: Path, path: Path) -> Path:
    return described(data, path, names=["disc", "square", "triangle", "star", "moon", "heart"], nc=6)


def class_layers(model: torch.nn.Module) -> set[str]:
    """Return the paths of the layers that have an output for each class, by the names in the host's heads."""
    head = len(model.model) - 1
    towers = ["cv3", *(["one2one_cv3"] if hasattr(model.model[-1], "one2one_cv3") else [])]
    paths = {f"model.{head}.{tower}.{level}.2" for tower in towers for level in range(3)}
    semantic = hasattr(getattr(model.model[-1], "proto", None), "semseg")
    return paths | ({f"model.{head}.proto.semseg.2"} if semantic else set())


def assert_slim(path: Path, slim: torch.nn.Module) -> torch.nn.Module:
    model = read_checkpoint(path).model
    assert widths(model) == widths(slim)
    assert getattr(model, MARKER) == getattr(slim, MARKER)
    return model


@pytest.mark.slow
class TestVerbs:
    def test_seg_and_pose_fail_elsewhere_and_train_slim_here(self, case):
        """Torch-Pruning#228, #302. Every part of the head learns, and none gets its width back."""
        slim = read_checkpoint(case.slim).model
        tuned = assert_slim(case.tuned, slim)
        assert type(tuned.model[-1]) is type(slim.model[-1])
        before, after = slim.state_dict(), tuned.state_dict()
        assert before.keys() == after.keys()
        for path in widths(slim):
            if not AT_REST.search(path):
                assert not torch.equal(before[f"{path}.weight"], after[f"{path}.weight"]), path
        stem = (before["model.0.conv.weight"].flatten(), after["model.0.conv.weight"].flatten())
        assert torch.cosine_similarity(*stem, dim=0) > 0.9  # it began with the pruned weights

    def test_evaluate_reports_what_the_task_predicts(self, case, capsys, tmp_path):
        words = [f"model={case.tuned}", f"data={case.data}", "imgsz=64", f"json={tmp_path / 'figures.json'}"]
        capsys.readouterr()
        assert main(["evaluate", *words]) == 0
        printed = capsys.readouterr().out
        figures = json.loads((tmp_path / "figures.json").read_text())
        box = {"map50", "map50_95", "precision", "recall"}
        own = {"segment": "mask", "pose": "pose"}.get(case.task)
        assert figures.keys() == {"model", "split", "images", "imgsz_px", *box} | ({own} if own else set())
        assert figures["images"] == 8
        for scores in (figures, *([figures[own]] if own else [])):
            assert all(0 <= scores[key] <= 1 for key in box)
        assert (f"{own} mAP50-95" in printed) == bool(own)

    @pytest.mark.parametrize("name", ["yolo26n-seg", "yolov8n-pose", "yolov8n-obb"])
    def test_data_with_other_classes_replace_the_last_layers_only(self, name, drawn, tmp_path):
        case = Case(name, tmp_path, drawn[task_of(name)])
        slim = read_checkpoint(pruned(name, tmp_path)).model
        data = with_more_classes(case.data, tmp_path / "six.yaml")
        assert main(case.finetune("six", data, epochs=1)) == 0
        model = read_checkpoint(tmp_path / "six" / "weights" / "last.pt").model
        before, after = widths(slim), widths(model)
        assert {path for path in before if before[path] != after[path]} == class_layers(slim)
        assert all(after[path] == [6, before[path][1]] for path in class_layers(slim))
        assert is_slim(model)
        assert getattr(model, MARKER)["widths"] == after

    def test_a_run_from_yaml_to_summary(self, drawn, tmp_path, capsys):
        """The dense model takes the data's key points, the slim one keeps them."""
        settings = {"model": "yolov8n-pose.yaml", "data": str(drawn["pose"]), "out": str(tmp_path / "run"), "imgsz": 64}
        epoch = {**QUICK, "epochs": 1}
        del epoch["imgsz"], epoch["seed"]  # the run's own
        stages = {
            "train": epoch,
            "prune": {"target_macs": 0.5},
            "finetune": epoch,
            "formats": ["onnx"],
            "control": True,
        }
        file = write_yaml(tmp_path / "run.yaml", {**settings, **stages, "runs": 2, "threads": 1})
        assert main(["run", str(file)]) == 0
        assert "pose mAP50-95 val" in capsys.readouterr().out
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["evaluations"]["slim"]["val"]["pose"].keys() == {"map50", "map50_95", "precision", "recall"}
        assert summary["parity"]["slim_onnx"]["passed"]
        assert read_checkpoint(tmp_path / "run" / "slim" / "weights" / "last.pt").model.model[-1].kpt_shape == [4, 3]

    def test_resuming_after_a_kill_keeps_the_widths(self, pose, command):
        words = pose.finetune("killed", pose.data, epochs=2)
        done = subprocess.run(
            [sys.executable, KILLED, "on_train_batch_end", "3", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        folder, slim = pose.folder / "killed", read_checkpoint(pose.slim).model
        last = folder / "weights" / "last.pt"
        assert interrupted(folder) == "resumable"
        assert_slim(last, slim)
        assert command("finetune", f"model={last}", "resume=true").code == 0
        assert interrupted(folder) == "finished"
        assert_slim(last, slim)


EXTRAS = {
    "segment": {"mask_coefficients", "prototypes"},
    "pose": {"key_points", "visibility"},
    "obb": {"angles"},
}
"""What parity compares besides boxes and scores."""


@pytest.mark.slow
class TestExport:
    def test_every_output_agrees_with_pytorch(self, case, tmp_path):
        backends = {"onnx": "onnxruntime"} if "26" in case.name else {"onnx": "onnxruntime", "ncnn": "ncnn"}
        words = ["export", f"model={case.slim}", f"data={case.data}", f"out={tmp_path}", "imgsz=64"]
        assert main([*words, f"format={','.join(backends)}", f"json={tmp_path / 'parity.json'}"]) == 0
        written = json.loads((tmp_path / "parity.json").read_text())
        reports = written["parity"]
        assert [report["backend"] for report in reports] == list(backends.values())
        for report in reports:
            assert report["agreement"]["extras"].keys() == EXTRAS[case.task]
            assert 0 < report["max_rel"] < TOLERANCES["fp32"]
            assert ParityReport.from_json(report).to_json() == report
        artefacts = ",".join([str(case.slim), *written["artefacts"]])
        assert main(["benchmark", f"models=[{artefacts}]", "imgsz=64", "runs=2", "warmup=0", "threads=1"]) == 0

    @pytest.mark.parametrize("case", [name for name in TRAINED if "26" in name], indirect=True)
    def test_the_one_to_one_head_as_well(self, case, tmp_path):
        out = export_model(case.slim, format="onnx", imgsz_px=64, out=tmp_path / "slim.onnx", end_to_end=True)
        agreement = check_parity(case.slim, out, imgsz_px=64).require().agreement
        assert agreement.extras.keys() == EXTRAS[case.task]

    def test_rotated_boxes_are_matched_too(self, drawn, tmp_path):
        """Of 8 bit nothing else is judged; a network that finds them elsewhere does not pass."""
        pictures = [read_image(file) for file in image_files(drawn["obb"], "val")[:2]]
        model = lively("yolov8n-obb")
        with torch.no_grad():
            for level, (scoring, distances) in enumerate(zip(model.model[-1].cv3, model.model[-1].cv2, strict=True)):
                scoring[-1].weight *= 0.01
                scoring[-1].bias[:] = -20.0
                scoring[-1].bias[2] = -20.0 if level else 0.4  # a score near 0.6 in every cell of the finest level
                distances[-1].weight *= 0.01
                distances[-1].bias.view(4, -1)[:, :2] += 4.0  # half a cell from the centre: none suppresses another
        source = save_as_host(model, tmp_path / "source.pt")
        out = export_model(source, format="onnx", imgsz_px=IMGSZ_PX, out=tmp_path / "source.onnx")
        boxes = check_parity(source, out, imgsz_px=IMGSZ_PX, images=pictures).require().boxes
        assert boxes.found == boxes.expected > 0
        shifted = read_checkpoint(source).model
        with torch.no_grad():
            for distances in shifted.model[-1].cv2:
                distances[-1].bias.view(4, -1)[0, 9] += 20.0  # far to the left of it
        found = check_parity(source, save_as_host(shifted, tmp_path / "s.pt"), imgsz_px=IMGSZ_PX, images=pictures).boxes
        assert found.share < 0.5

    @pytest.mark.parametrize(
        ("name", "layer", "part"),
        [
            ("yolov8n-seg", "model.22.cv4.0.2", "mask_coefficients"),
            ("yolov8n-seg", "model.22.proto.cv3.conv", "prototypes"),
            ("yolov8n-pose", "model.22.cv4.0.2", "key_points"),
            ("yolov8n-obb", "model.22.cv4.0.2", "angles"),
        ],
    )
    def test_a_wrong_filter_outside_boxes_and_scores_is_found(self, name, layer, part, tmp_path):
        source = save_as_host(lively(name), tmp_path / "dense.pt")
        wrong = read_checkpoint(source).model
        with torch.no_grad():
            wrong.get_submodule(layer).weight[0] = 0
        report = check_parity(source, save_as_host(wrong, tmp_path / "wrong.pt"), imgsz_px=64)
        assert not report.passed
        assert report.agreement.extras[part].max_rel > 10 * TOLERANCES["fp32"]
        assert report.agreement.boxes.max_abs == report.agreement.scores.max_abs == 0 or part == "angles"
        with pytest.raises(ParityError, match=part):
            report.require()


class TestClasses:
    @pytest.mark.parametrize("name", HEADS)
    def test_everything_but_the_class_layers_keeps_its_weights(self, name):
        """Prototypes, mask coefficients, key points and angles know nothing of classes."""
        model = lively(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1  # away from the host's start values, as after training
        setattr(model, MARKER, {"widths": widths(model)})
        before = {key: value.clone() for key, value in model.state_dict().items()}
        retarget_classes(model, 7, dict(enumerate("abcdefg")))
        after = model.state_dict()
        assert after.keys() == before.keys()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed == {f"{path}.{leaf}" for path in class_layers(model) for leaf in ("weight", "bias")}
        assert all(after[f"{path}.weight"].shape[0] == 7 for path in class_layers(model))
        assert getattr(model, MARKER)["widths"] == widths(model)
        model.train()(torch.rand(1, 3, 64, 64))

    def test_a_head_without_class_layers_is_refused(self):
        """YOLO-World compares with words: its towers end in embeddings."""
        model = YOLO("yolov8s-world.yaml").model
        with pytest.raises(ConfigError, match="its head is a WorldDetect"):
            retarget_classes(model, 7, dict(enumerate("abcdefg")))


class TestKeyPoints:
    CHANGES = ({"kpt_shape": [5, 3], "flip_idx": None}, {"kpt_shape": [4, 2]}, {"kpt_shape": None}, {"kpt_shape": 4})

    @pytest.mark.parametrize("verb", ["finetune", "evaluate"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_other_ones_than_the_model_s_are_refused(self, verb, change, pose, desk, refused):
        data = described(pose.data, desk / "other.yaml", **change)
        message = refused(verb, f"model={pose.slim}", f"data={data}", *(["epochs=1"] if verb == "finetune" else []))
        assert "kpt_shape" in message
        assert "expected: kpt_shape: [4, 3]" in message

    def test_the_trainer_itself_refuses_them(self, pose, desk):
        data = described(pose.data, desk / "other.yaml", kpt_shape=[5, 3], flip_idx=None)
        with pytest.raises(DataError, match=r"kpt_shape: \[5, 3\]"):
            YOLO(pose.slim).train(trainer=TRAINERS["pose"], data=str(data), epochs=1, project=str(desk), **QUICK)

    def test_a_run_refuses_them_before_it_prunes(self, pose, desk, refused):
        data = described(pose.data, desk / "other.yaml", kpt_shape=[5, 3])
        settings = {"model": str(pose.slim), "data": str(data), "out": "run", "imgsz": 64}
        message = refused("run", write_yaml(desk / "run.yaml", {**settings, "prune": {"target_macs": 0.5}}))
        assert "expected: kpt_shape: [4, 3]" in message


class TestFigures:
    """What is read from the host's metrics, and how it is shown."""

    def metric(self, first: float) -> SimpleNamespace:
        return SimpleNamespace(map50=first, map=first / 2, mp=first / 4, mr=first / 8)

    @pytest.mark.parametrize(("theirs", "ours"), [("seg", "mask"), ("pose", "pose")])
    def test_of_each_kind_are_its_own(self, theirs, ours):
        metrics = SimpleNamespace(box=self.metric(0.8), **{theirs: self.metric(0.4)})
        figures = Evaluation(split="val", images=8, imgsz_px=64, **_scores(metrics))
        common = {"split": "val", "images": 8, "imgsz_px": 64}
        assert figures.to_json() == {
            **common,
            **{"map50": 0.8, "map50_95": 0.4, "precision": 0.2, "recall": 0.1},
            ours: {"map50": 0.4, "map50_95": 0.2, "precision": 0.1, "recall": 0.05},
        }
        table = EvaluationTable(model="slim.pt", evaluation=figures).table()
        assert f"{ours} mAP50-95" in table
        assert "0.800" in table

    def test_of_boxes_are_what_they_were(self):
        figures = Evaluation(split="val", images=8, imgsz_px=64, **_scores(SimpleNamespace(box=self.metric(0.8))))
        assert list(figures.to_json()) == [
            *("split", "images", "map50", "map50_95", "precision", "recall", "imgsz_px"),
        ]


class TestControl:
    def test_the_flow_of_yolo26_pose_starts_near_the_identity(self):
        """Its own start values, not a linear layer's: those would let the log-likelihood explode."""
        model = lively("yolo26n-pose")
        fresh = copy.deepcopy(model)
        reset_weights(fresh, seed=1)
        for path, layer in fresh.model[-1].flow_model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                assert 0 < layer.weight.abs().max() < 0.05, path
