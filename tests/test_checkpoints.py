"""What is in a slim checkpoint, and what an Ultralytics that has never heard of us makes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from checkpoint_files import TRAIN_ARGS, globals_named_in, save_as_host
from torch import nn

from yolo_prune.files import sha256
from yolo_prune.hosts.slim import MARKER, widths
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.plan import Cost, PrunePlan

IMGSZ_PX = 96
STOCK = Path(__file__).with_name("stock_process.py")


@pytest.fixture
def marker(slim_checkpoint):
    return getattr(read_checkpoint(slim_checkpoint).model, MARKER)


@pytest.fixture(scope="module")
def sliced(dense_checkpoint, slim_checkpoint):
    """The slim network, cut in this process from the dense one; no slim checkpoint is read for its weights."""
    dense = read_checkpoint(dense_checkpoint).model
    graph = trace_model(dense)
    plan = PrunePlan.from_json(getattr(read_checkpoint(slim_checkpoint).model, MARKER)["plan"])
    return slim_copy(dense, graph, plan.keep_mask(graph)).eval()


def in_stock_process(slim_checkpoint: Path, folder: Path, *more: str, safe_load: str) -> Path:
    """Let stock Ultralytics, in a process without yolo_prune, work on a copy of a checkpoint in a folder."""
    checkpoint = shutil.copy(slim_checkpoint, folder / "slim.pt")
    torch.save(random_image(), folder / "image.pth")
    words = [sys.executable, STOCK, checkpoint, folder / "image.pth", folder, *more]
    environment = {**os.environ, "ULTRALYTICS_SAFE_LOAD": safe_load}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def random_image() -> torch.Tensor:
    return torch.rand(1, 3, IMGSZ_PX, IMGSZ_PX, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
class TestInStockUltralytics:
    """The pruned .pt does not load or export (Torch-Pruning#147, #363): ours does, where we are not installed."""

    @pytest.fixture(scope="class")
    def exported(self, tmp_path_factory, slim_checkpoint):
        return in_stock_process(slim_checkpoint, tmp_path_factory.mktemp("stock"), "export", safe_load="0")

    @pytest.fixture(scope="class", params=["default loading", "safe loading"])
    def folder(self, request, tmp_path_factory, slim_checkpoint):
        if request.param == "default loading":
            return request.getfixturevalue("exported")
        return in_stock_process(slim_checkpoint, tmp_path_factory.mktemp("safe"), safe_load="1")

    def test_raw_outputs_are_equal_bit_for_bit(self, folder, sliced):
        decoded, raw = torch.load(folder / "raw.pth")
        with torch.no_grad():
            expected_decoded, expected_raw = sliced(random_image())
        assert torch.equal(decoded, expected_decoded)
        for name in ("boxes", "scores"):
            assert torch.equal(raw[name], expected_raw[name])
        assert decoded.std() > 0.01  # a constant would be equal too

    def test_predicts(self, folder):
        boxes = torch.load(folder / "boxes.pth")
        decoded, _ = torch.load(folder / "raw.pth")
        assert len(boxes) > 0
        assert boxes.isfinite().all()
        assert float(boxes[:, 4].max()) == pytest.approx(float(decoded[:, 4:].max()), rel=0.05)  # of 8-bit pixels

    def test_export_keeps_the_slim_widths(self, exported, sliced, dense_checkpoint):
        tensors = {tensor.name: list(tensor.dims) for tensor in onnx.load(exported / "slim.onnx").graph.initializer}
        expected = weight_shapes(sliced)
        assert {name: tensors.get(name) for name in expected} == expected
        assert expected != weight_shapes(read_checkpoint(dense_checkpoint).model)


def weight_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of all convolutions but the one of constant weights, which an exporter may fold."""
    return {
        f"{path}.weight": list(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and ".dfl." not in path
    }


class TestContent:
    def test_names_torch_and_host_classes_only(self, slim_checkpoint):
        named = globals_named_in(slim_checkpoint)
        assert "ultralytics.nn.tasks.DetectionModel" in named  # the scan finds what is there
        homes = {name.partition(".")[0] for name in named}
        assert homes <= {"torch", "ultralytics", "collections", "__builtin__", "builtins"}

    def test_holds_what_the_host_expects(self, slim_checkpoint):
        content = torch.load(slim_checkpoint, weights_only=False)
        assert content["epoch"] == -1
        assert content["ema"] is None
        assert content["optimizer"] is None
        assert content["train_args"] == TRAIN_ARGS

    def test_file_is_an_ordinary_one(self, slim_checkpoint):
        assert slim_checkpoint.stat().st_mode & 0o777 == 0o644


class TestProvenance:
    def test_source_is_the_dense_file(self, marker, dense_checkpoint):
        assert marker["source_sha256"] == sha256(dense_checkpoint)

    def test_plan_round_trips(self, marker, dense_checkpoint):
        plan = PrunePlan.from_json(marker["plan"])
        assert plan.to_json() == marker["plan"]
        plan.require_source(sha256(dense_checkpoint))

    def test_costs_are_the_plan_s_and_the_files(self, marker, dense_checkpoint, slim_checkpoint):
        plan = PrunePlan.from_json(marker["plan"])
        assert Cost(**marker["before"]) == plan.before
        assert Cost(**marker["after"]) == plan.after
        for cost, path in ((plan.before, dense_checkpoint), (plan.after, slim_checkpoint)):
            assert cost.params == sum(parameter.numel() for parameter in read_checkpoint(path).model.parameters())
        assert 0.45 < plan.after.macs / plan.before.macs <= 0.5

    def test_widths_are_the_model_s(self, marker, slim_checkpoint, dense_checkpoint):
        slim, dense = (widths(read_checkpoint(path).model) for path in (slim_checkpoint, dense_checkpoint))
        assert marker["widths"] == slim
        assert slim.keys() == dense.keys()
        assert all(kept <= before for path in slim for kept, before in zip(slim[path], dense[path], strict=True))

    def test_lineage_of_a_model_that_was_pruned_twice(self, slim_checkpoint, dense_checkpoint, tmp_path):
        config = PruneConfig(model=str(slim_checkpoint), out=str(tmp_path / "slimmer.pt"), target_macs=0.7)
        twice = getattr(read_checkpoint(prune(config).out).model, MARKER)
        assert twice["source_sha256"] == sha256(slim_checkpoint)
        assert twice["lineage"] == [sha256(dense_checkpoint)]


class TestStoredType:
    """Selected weights are stored as the source stores them, bit for bit; folded ones are new and need float32."""

    def test_of_half_precision(self, slim_checkpoint, sliced):
        stored = read_checkpoint(slim_checkpoint)
        assert stored.stored_dtype == torch.float16
        for name, value in sliced.state_dict().items():
            assert torch.equal(stored.model.state_dict()[name], value)

    @pytest.mark.parametrize(
        ("dtype", "fold", "expected"),
        [(torch.float32, False, torch.float32), (torch.float16, True, torch.float32)],
    )
    def test_otherwise(self, dense_checkpoint, tmp_path, dtype, fold, expected):
        source = save_as_host(read_checkpoint(dense_checkpoint).model, tmp_path / "source.pt", dtype=dtype)
        config = PruneConfig(model=str(source), out=str(tmp_path / "slim.pt"), target_macs=0.5, fold=fold)
        content = torch.load(prune(config).out, weights_only=False)
        assert {parameter.dtype for parameter in content["model"].parameters()} == {expected}


def test_the_source_is_only_read(dense_checkpoint, tmp_path):
    source = Path(shutil.copy(dense_checkpoint, tmp_path / "dense.pt"))
    before = source.read_bytes(), source.stat().st_mtime_ns
    prune(PruneConfig(model=str(source), out=str(tmp_path / "slim.pt"), target_macs=0.6))
    assert (source.read_bytes(), source.stat().st_mtime_ns) == before


def test_the_same_words_give_the_same_plan(dense_checkpoint, slim_checkpoint, tmp_path):
    again = prune(PruneConfig(model=str(dense_checkpoint), out=str(tmp_path / "slim.pt"), target_macs=0.5)).plan
    assert again.to_json() == getattr(read_checkpoint(slim_checkpoint).model, MARKER)["plan"]
