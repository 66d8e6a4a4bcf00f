"""Bad checkpoints, through the command line: exit code 2, words that help, and no line of foreign code run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import Payload, save_as_host
from command_line import MODEL_VERBS, PRUNE, words_of
from torch import nn
from ultralytics.utils import SAFE_LOAD

from yolo_prune.hosts.slim import MARKER
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig


class TestCheckpoints:
    @pytest.mark.parametrize("module", [nn.Identity(), nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(3, 4, 1))])
    @pytest.mark.parametrize("verb", ["prune", "inspect"])
    def test_a_module_that_is_no_detector(self, verb, module, desk, refused):
        torch.save({"model": module, "train_args": "oops"}, desk / "module.pt")
        words = PRUNE if verb == "prune" else ()
        assert f"holds a {type(module).__name__}" in refused(verb, "model=module.pt", *words)

    @pytest.mark.parametrize("verb", MODEL_VERBS)
    def test_no_file(self, verb, desk, data, refused):
        words = words_of(verb, desk / "absent.pt", data, desk)
        assert "absent.pt'" in refused(*words)

    def test_folder(self, desk, refused):
        assert "no file" in refused("prune", f"model={desk}", *PRUNE)

    @pytest.mark.parametrize("content", ["shopping list\n", "80 apples"])
    def test_text_file(self, desk, refused, content):
        (desk / "notes.pt").write_text(content)
        assert "notes.pt': it is not a checkpoint" in refused("prune", "model=notes.pt", *PRUNE)

    def test_empty_file(self, desk, refused):
        (desk / "empty.pt").touch()
        assert "empty.pt': it is empty" in refused("prune", "model=empty.pt", *PRUNE)

    def test_file_that_may_not_be_read(self, dense, refused, monkeypatch):
        def deny(*_, **__):
            raise PermissionError(13, "Permission denied")  # chmod would not keep root out

        monkeypatch.setattr("ultralytics.nn.tasks.torch_load", deny)
        assert "dense.pt': Permission denied" in refused("prune", f"model={dense}", *PRUNE)

    def test_weights_without_model(self, dense, refused):
        torch.save(read_checkpoint(dense).model.state_dict(), "weights.pt")
        message = refused("prune", "model=weights.pt", *PRUNE)
        assert "'weights.pt' holds no model" in message
        assert "state_dict" in message

    @pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
    def test_truncated(self, dense, refused, part):
        whole = dense.read_bytes()
        Path("cut.pt").write_bytes(whole[: int(len(whole) * part)])
        assert "cut.pt': it is cut off or damaged" in refused("prune", "model=cut.pt", *PRUNE)

    @pytest.mark.parametrize(
        ("verb", "more"), [("finetune", ["data={data}"]), ("evaluate", ["data={data}"]), ("export", ["out=new"])]
    )
    def test_task_that_is_pruned_only(self, refused, data, verb, more):
        from ultralytics import YOLO

        YOLO("yolov8n-cls.yaml").save("dense.pt")
        prune(PruneConfig(model="dense.pt", out="other.pt", target_macs=0.6))
        message = refused(verb, "model=other.pt", *(word.format(data=data) for word in more))
        assert "task 'classify': it can be inspected and pruned only" in message
        assert "detect, segment, pose, obb" in message
        assert not Path("new").exists()

    def test_images_for_a_task_that_is_pruned_only(self, refused, data):
        from ultralytics import YOLO

        YOLO("yolov8n-cls.yaml").save("dense.pt")
        message = refused("prune", "model=dense.pt", f"data={data}", *PRUNE)
        assert f"training images of data={data} for a model of task 'classify'" in message

    def test_unsupported_task(self, refused):
        from ultralytics import YOLO

        YOLO("yolo26n-sem.yaml").save("other.pt")
        message = refused("prune", "model=other.pt", *PRUNE)
        assert "is a model for task 'semantic'" in message
        assert "detect, segment, pose, obb, classify" in message

    @pytest.mark.parametrize("verb", ["prune", "finetune", "run"])
    def test_fused(self, verb, desk, slim, data, refused):
        """A fused slim model still carries the marker of a slim one."""
        model = read_checkpoint(slim).model
        marker = getattr(model, MARKER)
        model.fuse(verbose=False)
        setattr(model, MARKER, marker)
        fused = save_as_host(model, desk / "fused.pt")
        words = words_of(verb, fused, data, desk)
        message = refused(*words)
        assert "is fused" in message
        assert "best.pt" in message

    @pytest.mark.data
    def test_classic_yolov5(self, real_data, refused):
        weights = real_data / "weights" / "yolov5n_classic_coco.pt"
        assert "it names 'models.yolo." in refused("prune", f"model={weights}", *PRUNE)


class TestForeignClasses:
    """A checkpoint is a program to an unwary reader: none of its lines may run."""

    @pytest.fixture(scope="class", params=["as the model", "beside a good model"])
    def made(self, request, tmp_path_factory, dense_checkpoint):
        payload, path = Payload(Path("ran")), tmp_path_factory.mktemp("trap") / "trap.pt"
        if request.param == "as the model":
            torch.save({"model": payload}, path)
        else:
            save_as_host(read_checkpoint(dense_checkpoint).model, path, train_metrics=payload)
        return path

    @pytest.fixture
    def trap(self, made, desk):
        return Path(shutil.copy(made, desk / "trap.pt"))

    def test_payload_is_live(self, trap, desk):
        assert not SAFE_LOAD  # the host was imported first, as in a user's script, and would run it
        torch.load(trap, weights_only=False)
        assert (desk / "ran").exists()  # or the tests below would prove nothing

    @pytest.mark.parametrize("verb", MODEL_VERBS)
    def test_is_refused_and_does_not_run(self, verb, trap, desk, data, refused):
        words = words_of(verb, trap, data, desk)
        message = refused(*words)
        assert "system', which belongs to neither torch nor Ultralytics" in message
        assert not (desk / "ran").exists()
