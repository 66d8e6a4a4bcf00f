"""The verb `rewrite`: its checkpoint, what it tells, and that everything goes on from it."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import TRAIN_ARGS, globals_named_in, save_as_host
from models import lively
from test_checkpoints import in_stock_process, random_image
from test_training import WORDS

from yolo_prune.files import sha256
from yolo_prune.hosts.slim import MARKER, widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.shortcuts import LayerNote, remove_shortcuts, walk
from yolo_prune.hosts.ultralytics.shortcuts.blocks import adds_its_input
from yolo_prune.pipeline.rewrite import RewriteConfig, rewrite


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory, dense_checkpoint):
    """`dense_checkpoint` without shortcuts, and what was told of it."""
    return rewrite(RewriteConfig(model=str(dense_checkpoint), out=str(tmp_path_factory.mktemp("plain") / "plain.pt")))


@pytest.fixture
def plain(desk, plain_checkpoint):
    return Path(shutil.copy(plain_checkpoint.out, desk / "plain.pt"))


class TestCheckpoint:
    def test_names_torch_and_host_classes_only(self, plain):
        homes = {name.partition(".")[0] for name in globals_named_in(plain)}
        assert homes <= {"torch", "ultralytics", "collections", "__builtin__", "builtins"}

    def test_holds_what_the_host_expects(self, plain):
        content = torch.load(plain, weights_only=False)
        assert content["epoch"] == -1
        assert content["train_args"] == TRAIN_ARGS
        # Sums of weights are new numbers: half precision would round them.
        assert {parameter.dtype for parameter in content["model"].parameters()} == {torch.float32}

    def test_marker_says_where_it_comes_from(self, plain, plain_checkpoint, dense_checkpoint):
        model = read_checkpoint(plain).model
        marker = getattr(model, MARKER)
        assert marker["source_sha256"] == sha256(dense_checkpoint)
        assert marker["rewriting"] == "shortcuts=remove"
        assert marker["lineage"] == []
        assert marker["widths"] == widths(model)
        assert marker["after"]["params"] == sum(parameter.numel() for parameter in model.parameters())
        assert marker["after"]["macs"] == plain_checkpoint.after.macs > marker["before"]["macs"]

    def test_a_slim_source(self, slim_checkpoint, dense_checkpoint, tmp_path):
        done = rewrite(RewriteConfig(model=str(slim_checkpoint), out=str(tmp_path / "plain.pt")))
        marker = getattr(read_checkpoint(done.out).model, MARKER)
        assert marker["lineage"] == [sha256(dense_checkpoint)]
        assert "plan" not in marker
        assert done.proof.max_abs_error <= 1e-9

    @pytest.mark.slow
    def test_stock_ultralytics_gives_the_same_bits(self, plain, tmp_path_factory, dense_checkpoint):
        folder = in_stock_process(plain, tmp_path_factory.mktemp("stock"), safe_load="1")
        decoded, raw = torch.load(folder / "raw.pth")
        with torch.no_grad():
            expected, expected_raw = remove_shortcuts(read_checkpoint(dense_checkpoint).model).model(random_image())
        assert torch.equal(decoded, expected)
        assert torch.equal(raw["scores"], expected_raw["scores"])
        assert len(torch.load(folder / "boxes.pth")) > 0


class TestCommand:
    def test_tells_growth_and_proof(self, command, dense):
        outcome = command("rewrite", "shortcuts=remove", f"model={dense}", "out=plain.pt", "json=told.json")
        assert outcome.code == 0, outcome.err
        assert "shortcuts removed from layers 2 (C2f), 4 (C2f), 6 (C2f), 8 (C2f)" in outcome.out
        assert "1.029x" in outcome.out
        told = json.loads(Path("told.json").read_text())
        assert told["proof"]["max_abs_error"] <= 1e-9
        assert told["after"]["macs"] / told["before"]["macs"] == pytest.approx(1.029, abs=5e-4)
        assert told["left"] == []
        assert Path("plain.pt").is_file()

    def test_names_what_stays(self, plain_checkpoint):
        left = (LayerNote(number=10, block="C2PSA", reason="attention"),)
        table = dataclasses.replace(plain_checkpoint, left=left).table()
        assert "left as it is: layer 10 (C2PSA): attention\n" in table
        assert table.count("left as it is") == 1

    def test_bad_input_is_refused(self, refused, dense, plain):
        assert "unknown shortcuts 'keep'" in refused("rewrite", f"model={dense}", "out=new.pt", "shortcuts=keep")
        assert "already exists" in refused("rewrite", f"model={dense}", "out=plain.pt")
        assert "imgsz=70" in refused("rewrite", f"model={dense}", "out=new.pt", "imgsz=70")
        assert "same path" in refused("rewrite", f"model={dense}", "out=new.pt", "json=new.pt")
        assert "nothing to remove" in refused("rewrite", f"model={plain}", "out=new.pt")

    def test_fused_is_refused(self, refused, desk):
        fused = save_as_host(copy.deepcopy(lively("yolov8n")).fuse(verbose=False), desk / "fused.pt")
        assert "is fused" in refused("rewrite", f"model={fused}", "out=new.pt")

    def test_nothing_is_written_where_the_proof_fails(self, command, dense, monkeypatch):
        right = walk.widened
        monkeypatch.setattr(walk, "widened", lambda weight, value: right(weight, value).flip(1))
        assert command("rewrite", f"model={dense}", "out=new.pt").code == 1
        assert not Path("new.pt").exists()


class TestGoesOn:
    """Every other command works on the result."""

    @pytest.mark.slow
    def test_prune_inspect_and_export(self, command, plain):
        assert command("prune", f"model={plain}", "out=slim.pt", "target_macs=0.6").code == 0
        before, after = (read_checkpoint(path).model for path in (plain, Path("slim.pt")))
        assert sum(size[0] for size in widths(after).values()) < sum(size[0] for size in widths(before).values())
        assert "can be pruned" in command("inspect", "model=slim.pt", "picture=picture.html").out
        outcome = command("export", "model=slim.pt", "out=artefacts", "imgsz=64", "json=parity.json")
        assert outcome.code == 0, outcome.err

    @pytest.mark.slow
    def test_finetune_and_evaluate(self, command, plain, data, desk):
        words = [f"data={data}", "epochs=1", f"project={desk / 'runs'}", "name=tuned", *WORDS]
        outcome = command("finetune", f"model={plain}", *words)
        assert outcome.code == 0, outcome.err
        best = desk / "runs" / "tuned" / "weights" / "best.pt"
        tuned, before = (read_checkpoint(path).model for path in (best, plain))
        assert widths(tuned) == widths(before)
        assert not any(adds_its_input(module) for module in tuned.modules())
        assert not torch.equal(tuned.model[4].cv1.conv.weight, before.model[4].cv1.conv.weight)  # it was trained
        assert getattr(tuned, MARKER)["rewriting"] == "shortcuts=remove"
        assert command("evaluate", f"model={best}", f"data={data}", "imgsz=64").code == 0
