"""Surgery: the proof notices sabotage, masking touches producers only, and folding gives constants back."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from models import lively
from random_plans import random_keep
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from toys import build
from ultralytics.nn.tasks import DetectionModel

from yolo_prune.channels import Role, trace
from yolo_prune.errors import VerificationError
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, verifier
from yolo_prune.surgery import Folding, Verifier, apply, fold_constants, silence
from yolo_prune.surgery.verify import WEAKEST_RESPONSE


def pruned(name: str, seed: int = 0):
    model = build(name, seed=seed)
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    keep = random_keep(graph, seed, low=0.3, high=0.5)
    return model, graph, keep, apply(model, graph, keep)


SABOTAGE = {
    "a weight": lambda slim: slim.b.weight.data[0].mul_(1.001),
    "a scale": lambda slim: slim.norm.weight.data.add_(1e-3),
    "a running mean": lambda slim: slim.norm.running_mean.add_(1e-3),
    "two filters swapped": lambda slim: slim.b.weight.data.copy_(slim.b.weight.data.flip(1)),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_the_proof_notices_a_changed(what: str) -> None:
    model, graph, keep, slim = pruned("Chain")
    Verifier(model, graph).verify(slim, keep).require()
    SABOTAGE[what](slim)
    with pytest.raises(VerificationError, match="not what the plan selects"):
        Verifier(model, graph).verify(slim, keep).require()


def test_the_proof_notices_another_mask() -> None:
    """Swapping which channel of a group stays keeps every shape and every cost."""
    model, graph, keep, slim = pruned("Residual")
    other = keep.copy()
    channels = graph.groups[graph.group_names()["b"]].channels
    kept, removed = channels[keep[channels]], channels[~keep[channels]]
    other[[kept[0], removed[0]]] = [False, True]
    with pytest.raises(VerificationError):
        Verifier(model, graph).verify(slim, other).require()


def test_the_proof_notices_a_parameter_too_many() -> None:
    model, graph, keep, slim = pruned("Chain")
    slim.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(VerificationError, match=r"spare.* is not what the plan selects"):
        Verifier(model, graph).verify(slim, keep).require()


def test_the_proof_notices_macs_that_were_not_predicted() -> None:
    model, graph, keep, slim = pruned("Chain")
    with pytest.raises(VerificationError, match="MACs counted"):
        Verifier(model, graph, deployed=lambda slim: nn.Sequential(slim.a, slim.norm)).verify(slim, keep).require()


def test_the_proof_notices_nan() -> None:
    model, graph, keep, slim = pruned("Chain")
    slim.out.weight.data.fill_(float("nan"))
    with pytest.raises(VerificationError):
        Verifier(model, graph).verify(slim, keep).require()


def test_weights_too_weak_for_a_proof_are_refused() -> None:
    """A dead network agrees with everything."""
    model = build("Chain")
    model.out.weight.data.mul_(1e-12)
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    keep = random_keep(graph, 0)
    with pytest.raises(VerificationError, match="hardly depend on the image"):
        Verifier(model, graph).verify(apply(model, graph, keep), keep).require()


def test_a_slim_model_that_does_not_run_is_a_failed_proof() -> None:
    model, graph, keep, slim = pruned("Chain")
    slim.forward = lambda image: slim.out(image)  # an attribute that surgery could not know of
    with pytest.raises(VerificationError, match="does not run"):
        Verifier(model, graph).verify(slim, keep)


def test_one_verifier_proves_many_plans() -> None:
    model = build("Shifted")
    model.register_buffer("gain", torch.rand(5), persistent=False)
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    proofs = Verifier(model, graph)
    for seed in range(3):
        keep = random_keep(graph, seed)
        assert proofs.verify(apply(model, graph, keep), keep).require().max_abs_error <= 1e-12


class HiddenReader(nn.Module):
    """The output also depends on filter 0 of a, read where no mode can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            hidden = float(self.a.weight[0].sum())
        return self.out(torch.tanh(self.a(x))) + hidden


def test_a_reader_that_no_label_follows_is_noticed() -> None:
    """The proof is not circular: the graph calls the channel free, the outputs say that it is not."""
    torch.manual_seed(0)
    model = HiddenReader().eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    keep = np.ones(graph.channel_count, dtype=bool)
    keep[graph.axes["a.weight", 0].channels[0]] = False
    with pytest.raises(VerificationError, match="silenced"):
        Verifier(model, graph).verify(apply(model, graph, keep), keep).require()


def test_barely_trained_weights_hide_no_mistake() -> None:
    """A fresh detector fades out with depth: its outputs agree with anything, the proof's do not."""
    model = DetectionModel("yolov8n.yaml", nc=4, verbose=False).eval()
    graph = trace_model(model)
    keep = random_keep(graph, 0, low=0.6)
    slim = slim_copy(model, graph, keep)
    proof = verifier(model, graph).verify(slim, keep).require()
    assert proof.response > 10 * WEAKEST_RESPONSE


def test_masking_touches_producers_only() -> None:
    model, graph, keep, _ = pruned("Chain", seed=1)
    masked = copy.deepcopy(model)
    silence(masked, graph, keep)
    before, after = model.state_dict(), masked.state_dict()
    for (name, dim), axis in graph.axes.items():
        removed = torch.from_numpy(~keep[axis.channels])
        kept_equal = torch.equal(*(state[name].movedim(dim, 0)[~removed] for state in (before, after)))
        if axis.role is Role.PRODUCER and before[name].dim() == 1:
            assert kept_equal
            assert not after[name][removed].any()
        if axis.role is Role.STATISTIC:
            assert torch.equal(before[name], after[name])
    kept_filters = torch.from_numpy(keep[graph.axes["b.weight", 0].channels])
    assert torch.equal(before["b.weight"][kept_filters], after["b.weight"][kept_filters])  # removed inputs included


class Pointwise(nn.Module):
    """conv-bn-silu-conv(1x1)-bn-silu-conv(1x1, bias): folding is exact."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, eps=1e-3)
        self.b, self.norm_b = nn.Conv2d(6, 5, size, padding=size // 2, bias=False), nn.BatchNorm2d(5, eps=1e-3)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        act = nn.functional.silu
        return self.out(act(self.norm_b(self.b(act(self.norm_a(self.a(x)))))))


def constant_reference(model: nn.Module, graph, keep) -> nn.Module:
    """The dense model whose removed channels carry only their constants."""
    reference = copy.deepcopy(model)
    silence(reference, graph, keep, constants=True)
    return reference


def shifted(size: int) -> nn.Module:
    torch.manual_seed(0)
    model = Pointwise(size).eval()
    for norm in (model.norm_a, model.norm_b):
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
    return model.double()


@dataclass
class Folded:
    """A folding of a model whose readers have kernels of some size, and how far its outputs were off."""

    folding: Folding
    error_before: torch.Tensor
    error: torch.Tensor


def folded(size: int) -> Folded:
    model = shifted(size)
    graph = trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    keep = random_keep(graph, 0, low=0.4)
    slim = apply(model, graph, keep)
    image = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    expected = constant_reference(model, graph, keep)(image)
    before = (slim(image) - expected).abs()
    folding = fold_constants(model, slim, graph, keep, image)
    return Folded(folding, before, (slim(image) - expected).abs())


def test_folding_is_exact_for_pointwise_readers() -> None:
    result = folded(1)
    assert result.error_before.max() > 1e-3  # without folding the constants are missed
    assert result.error.max() < 1e-12
    folding = result.folding
    assert set(folding.exact) == {"b", "out"}
    assert not folding.at_border
    assert not folding.skipped


def test_folding_into_padded_kernels_is_exact_inside_and_said_to_be_inexact_at_the_border() -> None:
    result = folded(3)
    assert result.error[..., 1:-1, 1:-1].max() < 1e-12
    assert result.error.max() > 1e-6
    assert result.folding.at_border == ("b",)


def test_folding_brings_a_detector_nearer_to_the_masked_one() -> None:
    model = lively("yolov8n")
    graph = trace_model(model)
    keep = random_keep(graph, 4, high=0.5)
    image = torch.rand(1, 3, 256, 256)
    expected = constant_reference(model, graph, keep).eval()(image)[1]["scores"]
    slim = slim_copy(model, graph, keep).eval()
    before = (slim(image)[1]["scores"] - expected).abs().mean()
    fold_constants(model, slim, graph, keep, image)
    after = (slim(image)[1]["scores"] - expected).abs().mean()
    assert after < 0.5 * before
