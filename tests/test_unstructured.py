"""Unstructured pruning: which weights go, that they stay away, and that no hook of torch's gets into a checkpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from checkpoint_files import globals_named_in
from models import lively
from test_training import KILLED, WORDS, epochs_in
from torch import nn

from yolo_prune.cli import main
from yolo_prune.configuration import parse
from yolo_prune.errors import ConfigError, VerificationError
from yolo_prune.hosts.slim import MARKER
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.run_files import network_in
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model
from yolo_prune.hosts.ultralytics.unstructured import (
    UnstructuredOptions,
    pruned_layers,
    require_pattern,
    target_layers,
    zero_weights,
    zeros_of,
)
from yolo_prune.hosts.ultralytics.zeros import kept_zeros_of
from yolo_prune.methods.unstructured import PATTERNS, is_n_of_m, n_of_m, n_of_m_mask, pruned_masks
from yolo_prune.methods.zeros import KeptZeros
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig
from yolo_prune.pipeline.train_config import TrainConfig


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(4, 8, 3, 3, generator=generator),
        "b": 10.0 * torch.randn(6, 4, 1, 1, generator=generator),
    }


class TestMasks:
    def test_global_takes_the_smallest_of_all_and_l1_of_each(self):
        found = pruned_masks(weights(), "global", amount=0.25, seed=0)
        kept = torch.cat([weights()[name][mask].abs() for name, mask in found.items()])
        gone = torch.cat([weights()[name][~mask].abs() for name, mask in found.items()])
        assert gone.max() < kept.min()
        assert len(gone) == round(0.25 * (288 + 24))
        each = pruned_masks(weights(), "l1", amount=0.25, seed=0)
        assert [int((~mask).sum()) for mask in each.values()] == [72, 6]
        for name, mask in each.items():
            assert weights()[name][~mask].abs().max() < weights()[name][mask].abs().min()

    def test_random_is_the_same_for_a_seed_and_leaves_the_generator_alone(self):
        before = torch.get_rng_state()
        first, same, other = (pruned_masks(weights(), "random", amount=0.5, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(first[name], same[name]) for name in first)
        assert not torch.equal(first["a"], other["a"])
        assert [int((~mask).sum()) for mask in first.values()] == [144, 12]

    def test_two_of_four_by_hand(self):
        weight = torch.tensor([0.1, -0.4, 0.3, 0.2, 5.0, 1.0, -6.0, 2.0]).reshape(1, 8, 1, 1)
        kept = n_of_m_mask(weight, 2, 4).flatten().tolist()
        assert kept == [False, True, True, False, True, False, True, False]

    @pytest.mark.parametrize("pattern", ["2:4", "1:2", "3:8"])
    def test_n_of_m_along_the_inputs(self, pattern):
        pair, weight = n_of_m(pattern), weights()["a"]
        assert not is_n_of_m(weight, *pair)
        masked = weight * pruned_masks({"a": weight}, pattern, amount=0.5, seed=0)["a"]
        assert is_n_of_m(masked, *pair)
        for first in range(0, 8, pair[1]):  # said again, without the reshape
            assert ((masked[:, first : first + pair[1]] != 0).sum(dim=1) == pair[0]).all()

    @pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "2", "l2", "2:4:8"])
    def test_other_patterns_are_refused(self, pattern):
        with pytest.raises(ConfigError, match=r"unstructured\.pattern"):
            n_of_m(pattern)

    def test_no_hook_of_torchs_touches_what_is_pruned(self):
        conv = nn.Conv2d(8, 4, 3)
        for pattern in (*PATTERNS, "2:4"):
            pruned_masks({"a": conv.weight}, pattern, amount=0.5, seed=0)
        assert list(conv._parameters) == ["weight", "bias"]
        assert not conv._buffers
        assert not conv._forward_pre_hooks


class TestKeptZeros:
    @pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
    def test_momentum_does_not_revive_them(self, make):
        weight = nn.Parameter(weights()["a"])
        more = {"momentum": 0.9} if make is torch.optim.SGD else {}
        optimizer = make([weight], lr=0.1, **more)
        weight.grad = torch.ones_like(weight)
        optimizer.step()  # it remembers a push already
        with torch.no_grad():
            weight.mul_(n_of_m_mask(weight, 2, 4))
        zeros, kept = weight == 0, KeptZeros({"a": weight})
        kept.attach(optimizer)
        before = weight.detach().clone()
        for _ in range(3):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert torch.equal(weight == 0, zeros)
        assert not torch.equal(weight, before)
        kept.require({"a": weight}, "now")
        kept.detach()
        optimizer.step()
        with pytest.raises(VerificationError, match=f"now: {int(zeros.sum())} zeros were revived"):
            kept.require({"a": weight}, "now")

    def test_they_stay_where_everything_else_becomes_nan(self):
        """The host recovers from NaN by itself; a zero that was taken for revived would end the training."""
        weight = nn.Parameter(weights()["a"])
        with torch.no_grad():
            weight.mul_(n_of_m_mask(weight, 2, 4))
        kept, optimizer = KeptZeros({"a": weight}), torch.optim.SGD([weight], lr=0.1)
        kept.attach(optimizer)
        weight.grad = torch.full_like(weight, torch.nan)
        optimizer.step()
        zeros = n_of_m_mask(weights()["a"], 2, 4) == 0
        assert torch.equal(weight == 0, zeros)
        assert weight.isnan().any()
        kept.require({"a": weight}, "now")  # takes none of them for revived
        average = torch.full_like(weight, torch.nan)
        kept.carry({"a": average})
        assert torch.equal(average == 0, zeros)

    def test_an_average_gets_them(self):
        weight, average = weights()["a"], weights()["a"]
        weight[0] = 0.0
        kept = KeptZeros({"a": weight})
        kept.carry({"a": average})
        assert torch.equal(average, weight)
        assert kept.count() == 72


def chosen(network: nn.Module, *targets: str, pattern: str = "global") -> tuple[list[str], list[str]]:
    layers, remarks = target_layers(network, UnstructuredOptions(pattern=pattern, targets=targets))
    return list(layers), remarks


class TestTargets:
    @pytest.fixture(scope="class")
    def network(self):
        return lively("yolov8n")

    def test_the_head_without_the_decoder_of_boxes(self, network):
        found, remarks = chosen(network, "head")
        assert len(found) == 18
        assert all(path.startswith("model.22.cv") for path in found)
        assert remarks == []
        everything, _ = chosen(network, "all")
        convolutions = [path for path, module in network.named_modules() if isinstance(module, nn.Conv2d)]
        assert set(convolutions) - set(everything) == {"model.22.dfl.conv"}
        assert chosen(network, "model.2.m")[0] == ["model.2.m.0.cv1.conv", "model.2.m.0.cv2.conv"]
        assert chosen(network, "model.*.cv1.conv")[0][0] == "model.2.cv1.conv"

    def test_a_layer_that_is_named_twice_is_pruned_once_with_a_warning(self, caplog):
        """A list with one layer three times prunes it thrice in torch, and the others not at all."""
        network: Any = lively("yolov8n")
        path = "model.22.cv2.0.0.conv"
        with caplog.at_level("WARNING", logger="ultralytics"):
            zero_weights(
                network, UnstructuredOptions(pattern="l1", targets=(path, path, "model.22.cv2.0", path)), seed=0
            )
        (said,) = [record.message for record in caplog.records if "unstructured" in record.message]
        assert f"1 layers, first '{path}', are named more than once" in said
        layers = zeros_of(network, pruned_layers(network)).layers
        assert len(layers) == 3
        assert all(zeros == round(0.5 * numbers) for zeros, numbers in layers.values())

    @pytest.mark.parametrize(
        ("targets", "pattern", "said"),
        [
            (["model.22.cv9"], "l1", "no convolution matches 'model.22.cv9'"),
            (["model.22.dfl.conv"], "l1", "decodes boxes"),
            (["model.0.conv"], "2:4", "which reads 3 per filter"),
        ],
    )
    def test_refused(self, network, targets, pattern, said):
        with pytest.raises(ConfigError, match=said):
            chosen(network, *targets, pattern=pattern)

    def test_a_width_of_six_is_refused_by_name_and_left_out_of_a_pattern(self):
        network: Any = nn.Module()
        network.model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 3))
        with pytest.raises(ConfigError, match=r"'model\.1', which reads 6 per filter"):
            chosen(network, "model.0", "model.1", pattern="2:4")
        assert chosen(network, "all", pattern="2:4") == (
            ["model.0"],
            ["2:4 does not fit 1 layers, left dense: model.1"],
        )

    def test_kernels_that_deployment_adds_up_keep_no_pattern(self):
        network = lively("yolov9t")
        path = next(path for path, module in network.named_modules() if type(module).__name__ == "RepConv")
        with pytest.raises(ConfigError, match="adds to another kernel"):
            chosen(network, f"{path}.conv1.conv", pattern="2:4")
        found, remarks = chosen(network, "all", pattern="2:4")
        assert not [one for one in found if one.startswith(f"{path}.")]
        assert path in remarks[0]

    @pytest.mark.parametrize("name", ["yolov5n", "yolov8n", "yolo11n"])
    @pytest.mark.parametrize("pattern", ["global", "l1", "random"])
    def test_of_the_head_half_the_weights_go_and_nothing_else_changes(self, name, pattern):
        network, before = lively(name), lively(name).state_dict()
        zero_weights(network, UnstructuredOptions(pattern=pattern), seed=0)
        chosen = [f"{path}.weight" for path in target_layers(network, UnstructuredOptions())[0]]
        assert len(chosen) > 10
        after = network.state_dict()
        gone = {path: (after[path] == 0) & (before[path] != 0) for path in before}
        assert {path for path in gone if gone[path].any()} == set(chosen)
        assert all(torch.equal(after[path][~gone[path]], before[path][~gone[path]]) for path in before)
        shares = [float((after[path] == 0).float().mean()) for path in chosen]
        whole = sum(int((after[path] == 0).sum()) for path in chosen) / sum(after[path].numel() for path in chosen)
        assert whole == pytest.approx(0.5, abs=1e-4)
        assert (max(shares) - min(shares) > 0.01) == (pattern == "global")  # that compares layers, the others do not


class TestPattern:
    @pytest.mark.parametrize("name", ["yolov5n", "yolov8n", "yolo11n"])
    def test_it_holds_when_batch_norms_are_folded_in_and_its_loss_is_noticed(self, name):
        network: Any = lively(name)
        zero_weights(network, UnstructuredOptions(pattern="2:4", targets=("all",)), seed=0)
        require_pattern(network, "2:4")
        network.get_parameter("model.4.cv1.conv.weight").data[0, :4] = 1.0
        with pytest.raises(
            VerificationError, match=r"2:4 does not hold in 1 layers of the checkpoint, first 'model\.4"
        ):
            require_pattern(network, "2:4")

    def test_yaml_does_not_read_it_as_a_number_of_base_60(self):
        config, _ = parse(TrainConfig, ["model=a.pt", "method=unstructured", "unstructured.pattern=2:4"])
        assert config.unstructured.pattern == "2:4"

    def test_what_surgery_leaves_of_the_layers_is_still_kept(self, tmp_path):
        network: Any = lively("yolov8n")
        zero_weights(network, UnstructuredOptions(), seed=0)
        graph = trace_model(network)
        from random_plans import random_keep

        slim = slim_copy(network, graph, random_keep(graph, 0))
        assert set(kept_zeros_of(slim)) == set(kept_zeros_of(network))
        from checkpoint_files import save_as_host

        path = save_as_host(network, tmp_path / "zeros.pt")
        out = prune(PruneConfig(model=str(path), out=str(tmp_path / "slim.pt"), target_macs=0.5)).out
        marker = getattr(read_checkpoint(out).model, MARKER)
        assert marker["zeros"] == getattr(network, MARKER)["zeros"]


def words_for(model: Path, data: Path, folder: Path, **more: Any) -> list[str]:
    settings = {"epochs": 2, "method": "unstructured", "project": folder, "name": "a", "unstructured.pattern": "2:4"}
    settings |= {"unstructured.targets": "[all]", "optimizer": "SGD", "lr0": 0.01, **more}
    return ["train", f"model={model}", f"data={data}", *(f"{key}={value}" for key, value in settings.items()), *WORDS]


@pytest.mark.slow
class TestInTraining:
    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory, dense_checkpoint, tiny_data):
        """A run that nobody killed."""
        folder = tmp_path_factory.mktemp("whole")
        assert main(words_for(dense_checkpoint, tiny_data, folder)) == 0
        return folder / "a"

    def test_the_pattern_is_in_every_checkpoint(self, whole, dense_checkpoint):
        start = read_checkpoint(dense_checkpoint).model
        for name in ("best.pt", "last.pt"):
            path = whole / "weights" / name
            assert not [module for module in globals_named_in(path) if "yolo_prune" in module or "prune" in module]
            model: Any = read_checkpoint(path).model
            assert getattr(model, MARKER)["pattern"] == "2:4"
            require_pattern(model, "2:4")
            assert not torch.equal(
                model.get_parameter("model.4.cv1.conv.weight"), start.get_parameter("model.4.cv1.conv.weight")
            )

    def test_the_zeros_are_counted(self, whole):
        record = json.loads((whole / "zeros.json").read_text())
        model = read_checkpoint(whole / "weights" / record["checkpoint"]).model
        assert len(record["layers"]) == len(pruned_layers(model)) == 62
        for path, counts in record["layers"].items():
            assert counts["zeros"] == int((model.get_parameter(f"{path}.weight") == 0).sum())
            assert counts["zeros"] >= counts["weights"] // 2
        assert record["network"]["zeros"] == sum(counts["zeros"] for counts in record["layers"].values())

    def test_an_export_has_the_pattern_along_the_input_channels(self, command, whole, tmp_path):
        """In the weights that a runtime reads, batch norms folded in: what TensorRT's sparse units take."""
        best = whole / "weights" / "best.pt"
        assert command("export", f"model={best}", "format=onnx", "imgsz=64", f"out={tmp_path}").code == 0
        graph = onnx.load(tmp_path / "best.onnx").graph
        weights = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
        read = [node.input[1] for node in graph.node if node.op_type == "Conv"]
        pruned = [f"{path}.weight" for path in pruned_layers(read_checkpoint(best).model)]
        assert set(pruned) < set(read)
        for name in pruned:
            weight = weights[name]
            for first in range(0, weight.shape[1], 4):
                assert ((weight[:, first : first + 4] != 0).sum(dim=1) <= 2).all()

    def test_a_later_training_keeps_them(self, command, whole, tiny_data, tmp_path, caplog):
        words = ["train", f"model={whole / 'weights' / 'best.pt'}", f"data={tiny_data}", "epochs=1", *WORDS]
        with caplog.at_level("INFO", logger="ultralytics"):
            assert command(*words, f"project={tmp_path}", "name=b", "optimizer=AdamW").code == 0
        assert "pruned weights of this network at zero" in caplog.text
        require_pattern(read_checkpoint(tmp_path / "b" / "weights" / "last.pt").model, "2:4")

    def test_killed_and_resumed_the_zeros_are_the_same(self, command, dense_checkpoint, tiny_data, tmp_path, whole):
        done = subprocess.run(
            [sys.executable, KILLED, "on_train_epoch_start", "2", *words_for(dense_checkpoint, tiny_data, tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        last = tmp_path / "a" / "weights" / "last.pt"
        before: Any = network_in(last)
        require_pattern(before.float(), "2:4")
        assert not [module for module in globals_named_in(last) if "prune" in module]
        assert command("train", f"model={last}", "resume=true").code == 0
        assert epochs_in(tmp_path / "a") == epochs_in(whole)
        after, other = (read_checkpoint(folder / "weights" / "last.pt").model for folder in (tmp_path / "a", whole))
        require_pattern(after, "2:4")
        for path in pruned_layers(after):
            name = f"{path}.weight"
            assert not after.get_parameter(name)[before.get_parameter(name) == 0].any()
            assert not other.get_parameter(name)[before.get_parameter(name) == 0].any()


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["unstructured.pattern=4:2"], "unstructured.pattern=4:2"),
            (["unstructured.amount=1"], "unstructured.amount=1"),
            (["unstructured.amount=0.3", "unstructured.pattern=2:4"], "unstructured.amount=0.3 with"),
            (["unstructured.targets=[]"], "unstructured.targets=[]"),
            (["unstructured.targets=[model.99]"], "no convolution matches 'model.99'"),
            (["unstructured.targets=[model.0.conv]", "unstructured.pattern=2:4"], "which reads 3 per filter"),
            (["target_macs=0.5"], "zeros among weights save no MACs"),
            (["round_to=4"], "round_to=4 without prune_every="),
            (["stripes.threshold=0.1"], "stripes.threshold=0.1 without method=stripes"),
        ],
    )
    def test_settings(self, refused, dense, data, words, said):
        assert said in refused("train", f"model={dense}", f"data={data}", "method=unstructured", *words)

    def test_without_the_method(self, refused, dense, data):
        message = refused("train", f"model={dense}", f"data={data}", "unstructured.amount=0.3")
        assert "unstructured.amount=0.3 without method=unstructured" in message
