"""Classic YOLOv5 by its own scripts: sparsity, prune, fine-tuning, resume, and stock val and export of slim files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoint_files import globals_named_in
from classic_yolov5 import TINY, as_repository, lively_classic, save_as_classic, scales_in, stored
from command_line import write_yaml
from torch import nn

from yolo_prune.cli import main
from yolo_prune.hosts.randomness import seeded
from yolo_prune.hosts.replacing import replaced
from yolo_prune.hosts.slim import MARKER, widths
from yolo_prune.hosts.yolov5.source import installed
from yolo_prune.hosts.yolov5.trainer import BESIDE
from yolo_prune.search import recalibrate

TESTS = Path(__file__).parent
STRENGTH = 200.0
"""Large, because all of a tiny training is warm-up: its learning rates sum up to less than 0.01."""


@pytest.fixture(scope="module")
def data64(tmp_path_factory, tiny_data):
    """A data yaml that says where its images are, as classic YOLOv5 wants it."""
    content = {**yaml.safe_load(tiny_data.read_text()), "path": str(tiny_data.parent)}
    return write_yaml(tmp_path_factory.mktemp("yolov5") / "data.yaml", content)


@pytest.fixture(scope="module")
def dense_classic(tmp_path_factory):
    """A dense checkpoint with random weights."""
    return save_as_classic(lively_classic(), tmp_path_factory.mktemp("dense_classic") / "dense.pt")


@pytest.fixture(scope="module")
def slim_classic(tmp_path_factory, dense_classic):
    """`dense_classic`, pruned to half its MACs."""
    return pruned(dense_classic, tmp_path_factory.mktemp("slim_classic") / "slim.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data64, dense_classic):
    """Two short trainings that differ by the penalty only; the first layer is frozen in both."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"plain": [], "sparse": ["--sparsity", str(STRENGTH)]}.items():
        flags += ["--freeze", "1", "--save-period", "1"]
        trained(folder, name, data64, "--weights", dense_classic, "--epochs", 2, *flags)
    return folder


def pruned(source: Path, out: Path, *flags: object) -> Path:
    words = ["--weights", source, "--out", out, "--target-macs", 0.5, "--imgsz", 64, *flags]
    assert main([str(word) for word in ["yolov5", "prune", "--pypi", *words]]) == 0
    return out


def training_words(folder: Path, name: str, data: Path, *flags: object) -> list[str]:
    words = ["yolov5", "train", "--pypi", "--data", data, "--project", folder, "--name", name, *TINY, *flags]
    return [str(word) for word in words]


def trained(folder: Path, name: str, data: Path, *flags: object) -> Path:
    assert main(training_words(folder, name, data, *flags)) == 0
    return folder / name / "weights" / "best.pt"


def record_of(run: Path) -> dict:
    return json.loads((run / "sparsity.json").read_text())


def budget_of(runs: Path) -> float:
    return sum(epoch["nominal"] for epoch in record_of(runs / "sparse")["epochs"])


@pytest.mark.slow
def test_inspect_shows_its_groups(dense_classic, tmp_path, capsys):
    picture = tmp_path / "graph.html"
    words = ["yolov5", "inspect", "--pypi", "--weights", str(dense_classic), "--imgsz", "64", "--picture", str(picture)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "model.24.m.0" in shown
    assert "of the MACs can be pruned" in shown
    assert "model.24.m.0" in picture.read_text()
    assert main(["inspect", f"model={dense_classic}"]) == 2
    assert "`yolo-prune yolov5`" in capsys.readouterr().err


class TestSparsity:
    def test_scales_of_prunable_groups_move_by_the_budget(self, runs):
        """L1 does not move gamma (ZJU-lishuang/yolov5_prune#10): here it moves by s times the sum of learning rates."""
        budget = budget_of(runs)
        assert 0.05 < budget < 0.5
        last = [scales_in(stored(runs / name / "weights" / "epoch1.pt")) for name in ("plain", "sparse")]
        moved = {name: (last[0][name].abs() - last[1][name].abs()) for name in last[0] if name != "model.0.bn"}
        assert len(moved) == 56
        means = torch.stack([part.mean() for part in moved.values()])
        # In shortcuts each member takes its part of the group's step, so only their root mean square moves alike.
        assert torch.allclose(means, torch.tensor(budget), rtol=0.25)
        assert float(means.median()) == pytest.approx(budget, rel=0.02)

    def test_health_is_told_as_with_the_other_host(self, runs):
        """A row for every group and epoch; no trace of it where nothing is penalised."""
        rows = (runs / "sparse" / "sparsity.csv").read_text().splitlines()
        assert [sum(row.startswith(f"{epoch},") for row in rows) for epoch in range(3)] == [len(rows) // 3] * 3
        assert not (runs / "sparse" / "sparsity.png").exists()  # --noplots
        assert not list((runs / "plain").glob("sparsity*"))

    def test_all_else_follows_the_task(self, runs):
        start = [stored(runs / name / "weights" / "epoch1.pt") for name in ("plain", "sparse")]
        assert torch.equal(start[0].model[0].bn.weight, start[1].model[0].bn.weight)  # frozen
        plain, sparse = (dict(model.float().named_parameters()) for model in start)
        norms = {f"{name}.weight" for name in scales_in(start[0])}
        others = [float((plain[name] - sparse[name]).detach().abs().max()) for name in plain if name not in norms]
        assert max(others) < 0.1 * budget_of(runs)

    def test_auto_zeroes_its_share_and_the_average_has_the_zeros(self, tmp_path, data64, dense_classic):
        flags = ["--weights", dense_classic, "--epochs", 4, "--sparsity", "auto", "--save-period", 1]
        words = training_words(tmp_path, "auto", data64, *flags, "--sparsity-schedule", "cosine")
        assert main([word for word in words if word != "--noplots"]) == 0
        assert (tmp_path / "auto" / "sparsity.png").stat().st_size > 10_000
        assert 0.4 <= record_of(tmp_path / "auto")["epochs"][-1]["silent"] <= 0.6
        raw, average = (scales_in(stored(tmp_path / "auto/weights/epoch3.pt", key)) for key in ("model", "ema"))
        zeros = {name: scale == 0 for name, scale in raw.items()}
        assert sum(int(part.sum()) for part in zeros.values()) > 1000
        assert all(not average[name][part].any() for name, part in zeros.items())
        pruned(tmp_path / "auto/weights/best.pt", tmp_path / "slim.pt", "--criterion", "bn_scale")

    @pytest.fixture(scope="class")
    def worse_with_every_epoch(self, tmp_path_factory, data64, dense_classic):
        """A training that sparsity makes worse, as it does: train.py would keep its first epoch, and stop after one."""
        folder, falling = tmp_path_factory.mktemp("worse"), iter([0.9, 0.8, 0.7])
        with replaced(installed().module("train"), fitness=lambda _: np.array([next(falling)])):
            flags = ["--epochs", 3, "--patience", 1, "--sparsity", "auto", "--save-period", 1]
            trained(folder, "a", data64, "--weights", dense_classic, *flags)
        return folder / "a" / "weights"

    def test_the_best_network_is_the_last_one(self, worse_with_every_epoch):
        best, last = (stored(worse_with_every_epoch / f"{name}.pt").state_dict() for name in ("best", "last"))
        first = stored(worse_with_every_epoch / "epoch0.pt", "ema").state_dict()
        assert all(torch.equal(best[name], last[name]) for name in best)
        assert not all(torch.equal(best[name], first[name]) for name in best)

    def test_statistics_of_norms_are_those_of_the_network_that_is_saved(self, worse_with_every_epoch, data64):
        content = yaml.safe_load(data64.read_text())
        make = installed().module("train").create_dataloader
        hyp = yaml.safe_load((worse_with_every_epoch.parent / "hyp.yaml").read_text())
        loader, _ = make(str(Path(content["path"], content["train"])), 64, 4, 32, hyp=hyp, augment=True, **BESIDE)
        for key, right in (("ema", True), ("model", False)):
            model = stored(worse_with_every_epoch / "epoch2.pt", key).float()
            before = {name: value.clone() for name, value in model.named_buffers() if name.endswith("running_var")}
            with seeded(0):
                recalibrate(model, loader, lambda network, batch: network(batch[0].float() / 255))
            after = dict(model.named_buffers())
            off = max(float(((after[name] - old) / (old + 1e-3)).abs().max()) for name, old in before.items())
            assert (off < 0.01) == right  # it was saved in half precision


class TestPrune:
    def test_is_proven_and_says_so(self, tmp_path, dense_classic, capsys):
        out = pruned(dense_classic, tmp_path / "slim.pt", "--save-plan", tmp_path / "plan.json")
        printed = capsys.readouterr().out
        assert "verified: max |silenced - sliced|" in printed
        assert (tmp_path / "plan.json").is_file()
        slim, dense = stored(out), stored(dense_classic)
        assert sum(p.numel() for p in slim.parameters()) < 0.7 * sum(p.numel() for p in dense.parameters())
        assert getattr(slim, MARKER)["widths"] == widths(slim)
        assert {type(module) for module in slim.modules()} <= {type(module) for module in dense.modules()}
        assert next(slim.parameters()).dtype == torch.float16

    @pytest.mark.data
    def test_the_published_weights(self, tmp_path, real_data, capsys):
        out = pruned(real_data / "weights" / "yolov5n_classic_coco.pt", tmp_path / "slim.pt")
        assert "verified" in capsys.readouterr().out
        assert stored(out)(torch.zeros(1, 3, 64, 64).half())[0].shape[-1] == 85


@pytest.mark.slow
class TestFinetune:
    def test_keeps_widths(self, tmp_path, data64, slim_classic):
        """Fine-tuning restores the full size (ultralytics#9813): not here."""
        best = trained(tmp_path, "fine", data64, "--weights", slim_classic, "--epochs", 1)
        assert widths(stored(best)) == widths(stored(slim_classic))
        assert not torch.equal(next(stored(best).parameters()), next(stored(slim_classic).parameters()))
        assert not (tmp_path / "fine" / "sparsity.json").exists()

    def test_other_classes_change_the_last_layers_only(self, tmp_path, data64):
        many = save_as_classic(lively_classic(classes=7), tmp_path / "many.pt")
        slim = pruned(many, tmp_path / "slim.pt")
        best = stored(trained(tmp_path, "fine", data64, "--weights", slim, "--epochs", 1))
        before, after = widths(stored(slim)), widths(best)
        assert {name for name in after if after[name] != before[name]} == {f"model.24.m.{i}" for i in range(3)}
        assert (best.model[-1].nc, best.yaml["nc"], len(best.names)) == (4, 4, 4)
        assert getattr(best, MARKER)["widths"] == after

    def test_stock_scripts_run_the_result(self, tmp_path, data64, slim_classic):
        best = trained(tmp_path, "fine", data64, "--weights", slim_classic, "--epochs", 1)
        flags = ["--weights", str(best), "--imgsz", "64", "--device", "cpu"]
        stock("val", *flags, "--data", str(data64), "--workers", "0", "--project", str(tmp_path / "val"))
        stock("export", *flags, "--include", "torchscript")
        assert (tmp_path / "val" / "exp").is_dir()
        exported = torch.jit.load(best.with_suffix(".torchscript"))
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = stored(best).float().eval()(image)[0]
        torch.testing.assert_close(exported(image)[0], expected, rtol=1e-3, atol=1e-2)

    def test_resumes_after_a_kill_with_its_widths_and_its_penalty(self, tmp_path, data64, slim_classic):
        flags = ["--weights", slim_classic, "--epochs", 3, "--sparsity", STRENGTH, "--sparsity-schedule", "linear"]
        words = [str(TESTS / "killed_yolov5.py"), "1", *training_words(tmp_path, "killed", data64, *flags)]
        assert subprocess.run([sys.executable, *words], capture_output=True, check=False).returncode == -signal.SIGKILL
        assert [epoch["epoch"] for epoch in record_of(tmp_path / "killed")["epochs"]] == [0, 1]
        last = tmp_path / "killed" / "weights" / "last.pt"
        resume = ["yolov5", "train", "--pypi", "--resume", str(last)]
        assert main([*resume, "--sparsity", "5"]) == 2
        assert main(resume) == 0
        record = record_of(tmp_path / "killed")
        assert record["options"] == {"strength": STRENGTH, "mode": "proximal", "schedule": "linear", "share": 0.5}
        strengths = [epoch["strength"] for epoch in record["epochs"][1:]]
        assert strengths == pytest.approx([STRENGTH, STRENGTH * 2 / 3, STRENGTH / 3])
        assert widths(stored(last)) == widths(stored(slim_classic))


@pytest.mark.slow
class TestScripts:
    def test_val_and_detect_with_our_shims(self, tmp_path, data64, slim_classic, command):
        flags = ["--weights", slim_classic, "--imgsz", 64, "--device", "cpu", "--project", tmp_path]
        assert command("yolov5", "val", "--pypi", *flags, "--data", data64, "--workers", 0).code == 0
        images = data64.parent / yaml.safe_load(data64.read_text())["path"] / "images" / "test"
        assert command("yolov5", "detect", "--pypi", *flags, "--source", images, "--conf-thres", 0.001).code == 0
        assert len(list((tmp_path / "exp2").glob("*.*"))) == 8

    @pytest.mark.exhaustive
    def test_a_repository(self, tmp_path, data64, dense_classic):
        """`models` and `utils` at the top level; the checkpoint of the package is read as its own."""
        repo = as_repository(installed(), tmp_path / "yolov5")
        slim, tool = tmp_path / "slim.pt", TESTS.parent / "tools" / "train_yolov5.py"
        flags = ["--repo", str(repo), "--weights", str(dense_classic), "--imgsz", "64"]
        in_a_process("-m", "yolo_prune", "yolov5", "prune", *flags, "--out", str(slim), "--target-macs", "0.5")
        words = training_words(tmp_path, "fine", data64, "--weights", slim, "--epochs", 1, "--sparsity", STRENGTH)[3:]
        in_a_process(str(tool), "--repo", str(repo), *words)
        assert widths(stored(tmp_path / "fine" / "weights" / "best.pt")) == widths(stored(slim))
        named = globals_named_in(tmp_path / "fine" / "weights" / "best.pt")
        assert "models.yolo.DetectionModel" in named
        assert not any(name.startswith("yolov5.") for name in named)


def stock(script: str, *flags: str) -> None:
    in_a_process("-I", str(TESTS / "stock_yolov5.py"), script, *flags)


def in_a_process(*words: str) -> None:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_batch_norm_of_a_classic_model_can_be_penalised(dense_classic):
    """Locked are the image and the outputs, which no batch norm scales."""
    from yolo_prune.hosts.yolov5.surgery import trace_model
    from yolo_prune.methods.slimming.penalty import penalised_channels

    model = stored(dense_classic).float().eval()
    graph = trace_model(model)
    chosen = penalised_channels(graph)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(chosen[graph.axes[f"{name}.weight", 0].channels].all() for name in norms)
    assert not any(chosen[group.channels].any() for group in graph.groups if group.lock)
