"""The laws on every family: silenced equals sliced, MACs as predicted, and stock Ultralytics loads the result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fresh_process import STOCK
from models import CASES, SMALL, lively
from random_plans import random_keep
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from ultralytics.nn.modules.block import C2PSA, PSA, C2f, RepNCSPELAN4

from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.hosts.slim import Checkpoint, widths
from yolo_prune.hosts.ultralytics.checkpoints import write_slim
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, verifier
from yolo_prune.plan import plan_from_keep
from yolo_prune.surgery import TOLERANCE, counted_macs

PLANS = {"n": 8, "t": 8, "s": 3}
"""Random plans by scale, a sample of the sweep's; YOLO_PRUNE_PLANS=50 proves, and loads in stock, as many on each."""
LOADED = 3
"""How many of them stock Ultralytics loads."""


@pytest.fixture(scope="module", params=CASES)
def traced(request: pytest.FixtureRequest) -> tuple[str, nn.Module, ChannelGraph]:
    model = lively(request.param)
    return request.param, model, trace_model(model)


@pytest.mark.slow
def test_random_plans_are_exact_and_load_in_stock_ultralytics(traced, tmp_path: Path) -> None:
    """Random plans: |silenced - sliced| <= 1e-9 in fp64, MACs counted = predicted; then stock loads each one."""
    name, model, graph = traced
    source = Checkpoint(path=tmp_path, sha256="0" * 64, model=model, stored_dtype=torch.float32, train_args={})
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.save(image, tmp_path / "image.pth")
    expected, proofs = {}, verifier(model, graph)
    wished = os.environ.get("YOLO_PRUNE_PLANS")
    for seed in range(int(wished or PLANS[name[-1]])):
        keep = random_keep(graph, seed)
        slim = slim_copy(model, graph, keep)
        proof = proofs.verify(slim, keep).require()
        assert proof.max_abs_error <= TOLERANCE
        whole = int(graph.cost.macs(graph.widths(), imgsz_px=proof.imgsz_px))
        assert proof.macs_counted == proof.macs_predicted < whole
        if not wished and seed >= LOADED:
            continue
        path = tmp_path / f"{name}_{seed}.pt"
        write_slim(path, slim, source, _plan(graph, keep), dtype=torch.float32)
        with torch.no_grad():
            expected[path] = slim.eval()(image)
    STOCK.load(tmp_path)
    for path, outputs in expected.items():
        found = torch.load(path.with_suffix(".out"))
        pairs = list(zip(tree_leaves(outputs), tree_leaves(found), strict=True))
        assert pairs
        assert all(torch.equal(one, other) for one, other in pairs), path.name
        path.unlink()  # fifty checkpoints a case are gigabytes


def test_blocks_remember_their_new_sizes(traced) -> None:
    """Exporters read `c` where the forward does not; a stale one only fails there."""
    _, model, graph = traced
    slim = slim_copy(model, graph, random_keep(graph, 0))
    blocks = [module for module in slim.modules() if isinstance(module, (C2f, RepNCSPELAN4, PSA, C2PSA))]
    assert all(2 * block.c == block.cv1.conv.out_channels == len(block.cv1.bn.weight) for block in blocks)
    for module in slim.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean)


def test_slim_models_pickle_the_classes_of_the_dense_one_only(traced) -> None:
    _, model, graph = traced
    slim = slim_copy(model, graph, random_keep(graph, 1))
    assert [type(module) for module in slim.modules()] == [type(module) for module in model.modules()]


def test_head_towers_can_be_pruned(traced) -> None:
    """41% of v8n's MACs sit in the head, and peers leave them there."""
    _, model, graph = traced
    head = f"model.{len(model.model) - 1}."
    towers = [graph.groups[index] for index in graph.free_groups() if graph.groups[index].name.startswith(head)]
    branches = 2 if getattr(model.model[-1], "one2one_cv2", None) is not None else 1
    assert len(towers) >= 3 * 2 * branches  # three levels, a box and a class tower each


def test_every_parameter_was_traced_and_final_outputs_are_locked(traced) -> None:
    _, model, graph = traced
    assert graph.report.untraced_parameters == ()
    head = model.model[-1]
    finals = {f"model.{len(model.model) - 1}.cv{tower}.{level}.2" for tower in (2, 3) for level in range(head.nl)}
    assert {group.name for group in graph.groups if "reaches the model's output" in group.lock} >= finals


def test_a_trace_leaves_the_model_bit_identical(traced) -> None:
    name, model, _ = traced
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shape, training = model.model[-1].shape, model.training
    trace_model(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), name
    assert (model.model[-1].shape, model.training) == (shape, training)


@pytest.mark.parametrize("name", SMALL)
def test_one_step_of_training_runs_on_the_slim_model(name: str) -> None:
    """A branch that inference does not run must have been cut as well, or the next training step fails."""
    model = lively(name)
    graph = trace_model(model)
    slim = slim_copy(model, graph, random_keep(graph, 2)).train()
    outputs = [leaf for leaf in tree_leaves(slim(torch.rand(2, 3, 64, 64))) if isinstance(leaf, torch.Tensor)]
    sum(output.float().square().mean() for output in outputs).backward()
    assert all(parameter.grad is not None for key, parameter in slim.named_parameters() if ".dfl." not in key)


@pytest.mark.parametrize("name", SMALL)
def test_macs_at_640_px_are_what_is_counted_there(name: str) -> None:
    model = lively(name)
    graph = trace_model(model)
    keep = random_keep(graph, 3)
    slim = slim_copy(model, graph, keep)
    counted = counted_macs(slim.fuse(verbose=False), torch.zeros(1, 3, 640, 640))
    assert int(graph.cost.macs(graph.kept_widths(keep), imgsz_px=640)) == counted


@pytest.mark.parametrize("name", SMALL)
def test_macs_are_those_of_torchs_own_counter(name: str) -> None:
    model, image = lively(name), torch.zeros(1, 3, 128, 128)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counted_macs(model, image) == counter.get_total_flops() // 2


def _plan(graph: ChannelGraph, keep: BoolArray):
    return plan_from_keep(graph, keep, source_sha256="0" * 64, imgsz_px=640, choice={})


def test_widths_differ_between_plans(traced) -> None:
    """The plans above are not all the same plan."""
    _, model, graph = traced
    found = [widths(slim_copy(model, graph, random_keep(graph, seed))) for seed in (0, 1)]
    assert found[0] != found[1]
    assert np.mean([random_keep(graph, seed).mean() for seed in range(5)]) < 0.9


def test_stock_tells_what_it_cannot_load_and_goes_on(tmp_path: Path) -> None:
    """Or a silent failure there would be a proof here."""
    torch.save(torch.rand(1, 3, 64, 64), tmp_path / "image.pth")
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    with pytest.raises(RuntimeError, match="stock Ultralytics on"):
        STOCK.load(tmp_path)
    (tmp_path / "bad.pt").unlink()
    STOCK.load(tmp_path)
    (tmp_path / "image.pth").unlink()
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        STOCK.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov10n", "yolo26n", "yolo26n-pose"])
def test_a_head_that_answers_one_to_one_is_exact_too(name: str) -> None:
    """With `end2end` the other twin decodes, so its layers are those that inference runs and is priced by."""
    model: Any = lively(name)
    many = trace_model(model).cost.macs_terms
    model.end2end = True
    assert model.model[-1].end2end
    graph = trace_model(model)
    assert graph.cost.macs_terms != many
    proofs = verifier(model, graph)
    for seed in range(3):
        keep = random_keep(graph, seed)
        assert proofs.verify(slim_copy(model, graph, keep), keep).require().max_abs_error <= TOLERANCE
