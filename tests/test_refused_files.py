"""Plans, data and outputs that do not fit: exit code 2, words that help, and a disk that looks as it did before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from checkpoint_files import save_as_host
from command_line import PRUNE, run_settings, words_of, write_yaml
from models import lively

from yolo_prune.hosts.slim import MARKER
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.plan import PrunePlan


class TestPlans:
    @pytest.fixture
    def plan(self, desk, slim_checkpoint):
        path = desk / "plan.json"
        PrunePlan.from_json(getattr(read_checkpoint(slim_checkpoint).model, MARKER)["plan"]).save(path)
        return path

    def test_for_another_checkpoint(self, desk, plan, refused):
        """The same architecture with other weights: every name and width would fit."""
        save_as_host(lively("yolov8n", seed=1), desk / "other.pt")
        message = refused("prune", "model=other.pt", "out=slim.pt", f"plan={plan}")
        assert "plan belongs to checkpoint" in message
        assert "make a new plan" in message

    def test_for_its_own_checkpoint_is_applied(self, dense, plan, command):
        assert command("prune", f"model={dense}", "out=slim.pt", f"plan={plan}").code == 0

    @pytest.mark.parametrize("content", [None, "not json", "{}", '{"format": "yolo_prune.plan/1"}', "[]"])
    def test_malformed(self, desk, dense, refused, content):
        if content is not None:
            (desk / "plan.json").write_text(content)
        assert "plan" in refused("prune", f"model={dense}", "out=slim.pt", "plan=plan.json").splitlines()[0]


class TestOutputs:
    @pytest.mark.parametrize("key", ["out", "save_plan", "json"])
    def test_that_exists_is_left_alone(self, desk, dense, refused, key):
        (desk / "taken").write_text("a year of work")
        words = {"out": "slim.pt", "save_plan": "plan.json", "json": "result.json", key: "taken"}
        message = refused("prune", f"model={dense}", "target_macs=0.5", *(f"{k}={v}" for k, v in words.items()))
        assert "'taken' already exists" in message

    def test_that_is_the_input(self, dense, refused):
        assert "already exists" in refused("prune", f"model={dense}", f"out={dense}", "target_macs=0.5")

    def test_artefact_that_exists(self, desk, dense, refused):
        (desk / "artefacts").mkdir()
        (desk / "artefacts" / "dense.onnx").write_text("mine")
        assert "dense.onnx' already exists" in refused("export", f"model={dense}", "out=artefacts", "imgsz=64")

    @pytest.mark.parametrize("verb", ["prune", "export"])
    def test_below_a_file(self, verb, dense, refused):
        words = {"prune": PRUNE[1:], "export": ("imgsz=64",)}[verb]
        assert "cannot write" in refused(verb, f"model={dense}", f"out={dense}/slim.pt", *words)

    @pytest.mark.parametrize("verb", ["prune", "export"])
    def test_in_a_read_only_folder(self, verb, desk, dense, refused):
        folder = desk / "read_only"
        if os.geteuid() == 0:  # to whom the mode of a folder means nothing
            folder = Path("/proc")
        else:
            folder.mkdir(mode=0o500)
        out = folder / "slim.pt" if verb == "prune" else folder
        words = {"prune": PRUNE[1:], "export": ("imgsz=64",)}[verb]
        message = refused(verb, f"model={dense}", f"out={out}", *words)
        assert "cannot write" in message
        assert "writable folder" in message

    @pytest.mark.parametrize("verb", ["prune", "export"])
    def test_on_a_full_disk_nothing_half_written_is_left(self, verb, dense, refused):
        """Files cannot grow beyond 1 MiB here: writing fails in the middle, as on a disk without room."""
        resource = pytest.importorskip("resource")
        words = {"prune": ["out=new/slim.pt", "target_macs=0.5"], "export": ["out=new/artefacts", "imgsz=64"]}[verb]
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            message = refused(verb, f"model={dense}", *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "cannot write" in message
        assert "free space" in message


class TestData:
    @pytest.mark.parametrize(
        ("verb", "split"),
        [("finetune", "val"), ("finetune", "train"), ("evaluate", "val"), ("export", "val"), ("run", "train")],
    )
    def test_missing_split(self, verb, split, slim, data, desk, refused):
        description = yaml.safe_load(data.read_text())
        write_yaml(data, {key: value for key, value in description.items() if key != split})
        words = words_of(verb, slim, data, desk)
        if verb == "export":
            words += [f"data={data}", "imgsz=64"]
        message = refused(*words)
        assert f"has no split '{split}' (it has: " in message
        assert f"`{split}: path/to/images`" in message

    def test_missing_split_that_is_measured_at_the_end(self, data, desk, refused):
        description = yaml.safe_load(data.read_text())
        write_yaml(data, {key: value for key, value in description.items() if key != "test"})
        assert "no split 'test'" in refused("run", run_settings(desk, data, splits=["val", "test"]))

    @pytest.mark.parametrize("verb", ["finetune", "evaluate"])
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"val": "images/absent"}, "absent', which does not exist"),
            ({"val": "labels/val"}, "labels/val', which has no image"),
            ({"val": 7}, "7', which does not exist"),
            ({"names": None, "nc": None}, "is not a data description"),
        ],
    )
    def test_that_misleads(self, verb, change, words, slim, data, desk, refused):
        write_yaml(data, {**yaml.safe_load(data.read_text()), **change})
        assert words in refused(*words_of(verb, slim, data, desk))

    @pytest.mark.parametrize("content", [None, "- a\n- b\n", "train: [\n", "just words"])
    def test_not_a_description(self, slim, desk, refused, content):
        path = desk / "broken.yaml"
        if content is not None:
            path.write_text(content)
        assert "broken.yaml'" in refused("evaluate", f"model={slim}", f"data={path}").splitlines()[0]
