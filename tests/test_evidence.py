"""Evidence: what training batches tell of a network, gathered in one pass, by hand and on the host's data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from command_line import write_yaml
from model_cases import OWN, build_lively
from models import lively
from torch import nn
from toys import build

from yolo_prune.channels import trace
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.ultralytics.collection import TrainingImages, collect_evidence
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.importance import collect, score_channels
from yolo_prune.importance.evidence import QUIET, activated
from yolo_prune.importance.plugged import CRITERIA


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, 8, 8, generator=generator) for _ in range(count)]


def squared(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


class TestCollect:
    BOTH = ("gradients", "activations")

    def test_gradients_are_means_over_batches(self):
        model = build("Chain").eval()
        graph = trace(model, torch.zeros(1, 3, 8, 8))
        found = collect(model, graph, batches(), squared, needs=["gradients"])
        each = []
        for batch in batches():
            model.zero_grad()
            squared(model, batch).backward()
            each.append(model.a.weight.grad.clone())
        torch.testing.assert_close(found.gradients["a.weight"], torch.stack(each).abs().mean(dim=0))
        torch.testing.assert_close(found.squares["a.weight"], torch.stack(each).square().mean(dim=0))
        assert found.activations == {}

    def test_activations_are_those_behind_norm_and_activation(self):
        """Of a block that owns one convolution, its own output; of a bare convolution, that one's."""
        model = lively("yolov8n")
        graph = trace_model(model)
        images = [torch.rand(2, 3, 64, 64)]
        found = collect(model, graph, images, lambda model, image: model(image)[0].mean(), needs=["activations"])
        assert found.gradients == {}
        with torch.no_grad():
            values = model.model[0](images[0])
        limit = QUIET * values.square().mean().sqrt()
        torch.testing.assert_close(
            found.activations["model.0.conv.weight", 0].quiet, (values.abs() <= limit).float().mean(dim=(0, 2, 3))
        )
        assert activated(model, graph, "model.0.conv") == "model.0"
        assert activated(model, graph, "model.22.cv2.0.2") == "model.22.cv2.0.2"
        free = {graph.groups[index].name for index in graph.free_groups()}
        assert {f"{name.partition('#')[0]}.weight" for name in free} <= {name for name, _ in found.activations}

    def test_of_two_convolutions_in_one_module_the_norm_is_the_last_that_can_be_told(self):
        model = build_lively(str(OWN / "yolov8-resnet18.yaml"))  # a torchvision block owns two
        graph = trace_model(model)
        assert activated(model, graph, "model.0.m.4.0.conv1") == "model.0.m.4.0.bn1"

    def test_with_relu_and_no_tolerance_quiet_is_the_share_of_zeros(self, monkeypatch):
        """The original APoZ."""
        monkeypatch.setattr("yolo_prune.importance.evidence.QUIET", 0.0)
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d(4, 2, 1)
        ).eval()
        graph = trace(model, torch.zeros(1, 3, 8, 8))
        found = collect(model, graph, batches(1), squared, needs=["activations"])
        values = model[0](batches(1)[0])
        expected = (values == 0).float().mean(dim=(0, 2, 3))
        assert 0 < expected.mean() < 1
        torch.testing.assert_close(found.activations["0.0.weight", 0].quiet, expected)

    def test_scores_of_four_filters_from_their_maps_by_hand(self):
        """Maps: the identity, ones, nothing, and [[2, 1], [1, 2]], whose singular values are 3 and 1.

        The layer's mean square is (2 + 4 + 0 + 10) / 16 = 1, so that what is at most 0.1 is quiet.
        """
        model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 2, 1)).eval()
        model[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]).view(4, 2, 1, 1)
        image = torch.stack([torch.eye(2), torch.ones(2, 2)])[None]
        found = collect(model, trace(model, image), [image], squared, needs=["activations"])
        graph = trace(model, image)
        group = graph.groups[graph.group_names()["0"]]
        rank = np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
        for name, expected in {"apoz": [0.5, 1.0, 0.0, 1.0], "hrank": [2.0, 1.0, 0.0, rank]}.items():
            raw = score_channels(graph, found, CRITERIA[name], normalization="none")[group.channels]
            np.testing.assert_allclose(raw, expected, rtol=1e-5)
            divided = score_channels(graph, found, CRITERIA[name])[group.channels]
            np.testing.assert_allclose(divided, np.array(expected) / np.mean(expected), rtol=1e-5)

    def test_nothing_of_the_model_changes(self):
        model = build("Chain").eval()
        graph = trace(model, torch.zeros(1, 3, 8, 8))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.b.requires_grad_(False)
        collect(model, graph, batches(), squared, needs=self.BOTH)
        assert not model.b.weight.requires_grad
        assert model.a.weight.requires_grad
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())

    def test_equivariance_through_a_whole_network(self):
        """The same function with its filters in another order: the scores are in that order too."""
        order = torch.tensor([2, 0, 3, 1])
        models = [build("Chain").eval() for _ in range(2)]
        with torch.no_grad():
            for tensor in (models[1].a.weight, *models[1].norm.parameters(), *models[1].norm.buffers()):
                if tensor.dim():
                    tensor.copy_(tensor[order])
            models[1].b.weight.copy_(models[1].b.weight[:, order])
        graph = trace(models[0], torch.zeros(1, 3, 8, 8))
        evidence = [collect(model, graph, batches(), squared, needs=self.BOTH) for model in models]
        group = graph.groups[graph.group_names()["a"]].channels
        for name, criterion in CRITERIA.items():
            if name != "random":
                first, second = (score_channels(graph, one, criterion)[group] for one in evidence)
                np.testing.assert_allclose(second, first[order.numpy()], rtol=1e-4, err_msg=name)

    def test_no_batch_and_a_loss_that_is_not_finite_are_refused(self):
        model = build("Chain").eval()
        graph = trace(model, torch.zeros(1, 3, 8, 8))
        with pytest.raises(ConfigError, match="no batch"):
            collect(model, graph, [], squared, needs=self.BOTH)
        bad = [batches()[0], torch.full((1, 3, 8, 8), float("nan"))]
        for needs, said in ((["gradients"], "loss of batch 2 is nan"), (self.BOTH, "are not finite")):
            with pytest.raises(ConfigError, match=said):
                collect(model, graph, bad, squared, needs=needs)
        assert not any(module._forward_hooks for module in model.modules())


class TestOnTheHostsData:
    @pytest.mark.parametrize("task", ["yolov8n", "yolo26n"])
    def test_is_repeatable_and_leaves_the_model_alone(self, tiny_data, task):
        model = lively(task)
        graph = trace_model(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        images = TrainingImages(data=tiny_data, imgsz_px=64, batches=2, batch=4, workers=0)
        first, second = (collect_evidence(model, graph, images, needs=TestCollect.BOTH) for _ in range(2))
        for name in ("taylor", "taylor_scale", "fisher", "apoz", "hrank"):
            scores = [score_channels(graph, one, CRITERIA[name]) for one in (first, second)]
            np.testing.assert_array_equal(*scores)
            free = np.concatenate([graph.groups[index].channels for index in graph.free_groups()])
            assert np.isfinite(scores[0][free]).mean() > 0.9, name
            assert scores[0][free].std() > 0, name
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_a_slim_checkpoint_by_what_the_data_says(self, command, dense_checkpoint, data, desk):
        words = ["prune", f"model={dense_checkpoint}", "target_macs=0.5", "imgsz=64", f"data={data}"]
        more = ["batches=2", "batch=4", "workers=0", "out=slim.pt", "json=result.json", "criterion=taylor"]
        assert command(*words, *more).code == 0
        choice = json.loads((desk / "result.json").read_text())["plan"]["choice"]
        assert choice["criterion"] == "taylor"
        assert (choice["batches"], choice["batch"]) == (2, 4)

    @pytest.mark.parametrize(
        ("words", "chosen"),
        [
            ([], ("l2", "uniform")),
            (["normalization=none"], ("l2", "global")),
            (["criterion=bn_scale"], ("bn_scale", "global")),
            (["allocation=global"], ("l2", "global")),
            (["data=data.yaml", "batches=1", "batch=4", "workers=0"], ("fisher", "global")),
        ],
        ids=lambda part: " ".join(part),
    )
    @pytest.mark.usefixtures("data")
    def test_what_auto_stands_for(self, command, dense_checkpoint, desk, words, chosen):
        words = ["prune", f"model={dense_checkpoint}", "target_macs=0.5", "imgsz=64", *words]
        assert command(*words, "out=slim.pt", "json=result.json").code == 0
        choice = json.loads((desk / "result.json").read_text())["plan"]["choice"]
        assert (choice["criterion"], choice["allocation"]) == chosen

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["criterion=taylor"], "criterion=taylor without data="),
            (["criterion=l2", "data=data.yaml"], "data=data.yaml, which nothing looks at"),
            (["batches=3"], "batches=3, which nothing looks at"),
            (["criterion=apoz", "data=data.yaml", "batches=0"], "batches=0"),
            (["criterion=apoz", "data=nowhere.yaml"], "nowhere.yaml"),
        ],
    )
    @pytest.mark.usefixtures("data")
    def test_bad_input(self, refused, dense_checkpoint, words, said):
        assert said in refused("prune", f"model={dense_checkpoint}", "out=slim.pt", "target_macs=0.5", *words)

    def test_data_of_other_classes(self, refused, dense_checkpoint, desk, data):
        content = yaml.safe_load(data.read_text())
        more = write_yaml(desk / "more.yaml", {**content, "nc": 5, "names": [*map(str, range(5))]})
        words = ["prune", f"model={dense_checkpoint}", "out=slim.pt", "target_macs=0.5", "criterion=taylor"]
        assert "has 5 classes" in refused(*words, f"data={more}")
