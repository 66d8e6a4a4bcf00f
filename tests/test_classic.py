"""Classic YOLOv5: other modules, the same engine, which takes them as plain torch models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_cases import enliven
from random_plans import random_keep

from yolo_prune.channels import trace
from yolo_prune.hosts.yolov5.checkpoints import read_checkpoint
from yolo_prune.hosts.yolov5.source import Classic, installed
from yolo_prune.surgery import TOLERANCE, Verification, Verifier, apply
from yolo_prune.surgery.verify import WEAKEST_RESPONSE

IMAGE = torch.zeros(1, 3, 64, 64)


@pytest.fixture(scope="module")
def classic() -> Classic:
    """PyPI's yolov5."""
    return installed()


def proofs_of(model: torch.nn.Module, plans: int) -> list[Verification]:
    """Trace, check that nothing but the image and the outputs is locked, and prove random plans."""
    graph = trace(model.eval(), IMAGE)
    assert graph.report.untraced_parameters == ()
    assert graph.report.operators_without_rule == {}
    locked = {group.name for group in graph.groups if group.lock}
    assert locked == {"model.0.conv:input", "model.24.m.0", "model.24.m.1", "model.24.m.2"}
    verifier = Verifier(model, graph)
    keeps = [random_keep(graph, seed) for seed in range(plans)]
    return [verifier.verify(apply(model, graph, keep), keep) for keep in keeps]


def all_hold(proofs: list[Verification]) -> bool:
    """Return whether every plan is exact, costs what was predicted, and had something to show."""
    return all(
        proof.max_abs_error <= TOLERANCE
        and proof.macs_counted == proof.macs_predicted
        and proof.params_counted == proof.params_predicted
        and proof.response >= WEAKEST_RESPONSE
        for proof in proofs
    )


@pytest.mark.parametrize("name", ["yolov5n", "yolov5s"])
def test_random_plans_are_exact(classic: Classic, name: str) -> None:
    torch.manual_seed(0)
    model = classic.module("models.yolo").DetectionModel(classic.root / "models" / f"{name}.yaml")
    enliven(model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    proofs = proofs_of(model, plans=10)
    assert all_hold(proofs)
    assert max(proof.params_counted for proof in proofs) < whole


@pytest.mark.data
def test_the_published_weights_are_pruned_exactly(classic: Classic, real_data: Path) -> None:
    weights = real_data / "weights" / "yolov5n_classic_coco.pt"
    proofs = proofs_of(read_checkpoint(classic, weights).model, plans=10)
    assert len(proofs) == 10
    assert all_hold(proofs)
