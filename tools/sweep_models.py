"""The laws on every model of the case table: a resumable sweep whose record fills README's coverage table.

python tools/sweep_models.py out=runs/sweep [models=[yolov8n,yolo11x-seg]] [plans=200] [large_plans=20] [part=1 of=2]

Each plan keeps random channels and has to satisfy: |silenced - sliced| <= 1e-9 in fp64 with the structure of training
and of inference, MACs and parameters counted = predicted (on the fused model), the kept entries bit for bit, and a
backward pass that reaches every parameter. One slim model of each case is fused and compared, exported to ONNX and
compared in ONNX Runtime, and loaded by stock Ultralytics where yolo_prune cannot be imported. Every model is a file in
`out`: killed, the sweep goes on where it stopped, and with a larger number of plans it proves the further ones; models
that were swept with other code of the engine are swept again. Several sweeps can share a folder (part=1 of=2 beside
part=2 of=2).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coverage_figures import LEAST_PLANS, NOT_EXPORTED, Coverage
from fresh_process import STOCK
from model_cases import ROOT, Case, all_cases, build_lively
from random_plans import random_keep
from source import engine_hash
from torch.utils._pytree import tree_leaves
from ultralytics.utils import LOGGER

from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.channels.facts import IMAGE, OUTPUT
from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.device.runtimes import OnnxRuntime
from yolo_prune.errors import ParityError, VerificationError
from yolo_prune.files import write_json
from yolo_prune.hosts.slim import Checkpoint
from yolo_prune.hosts.ultralytics.checkpoints import write_slim
from yolo_prune.hosts.ultralytics.export import export_model
from yolo_prune.hosts.ultralytics.inference import is_end_to_end, load_for_inference
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, trace_side, verifier
from yolo_prune.pipeline.inspect import prunable_macs_share
from yolo_prune.plan import plan_from_keep
from yolo_prune.surgery.mask import silence
from yolo_prune.surgery.verify import max_abs_error

TOLERANCE = 1e-3
"""Largest allowed difference between ONNX Runtime and PyTorch, as a fraction of the scale of a row of the output."""

FUSED_TOLERANCE = 1e-9
"""Largest change of an output by `fuse()`, in fp64, as a fraction of the largest output above 1."""

TINY = 1e-3
"""Least scale of a row: ONNX Runtime's sigmoid is good to 1e-7, however small its value, such as a faint score."""

RECORD = ROOT / "tools" / "records" / "coverage.json"


@dataclasses.dataclass(kw_only=True)
class SweepConfig:
    """Settings of the sweep."""

    out: str = setting("runs/sweep", help="folder of the record, one file a model")
    models: list[str] | None = setting(None, help="names of cases; default: all")
    plans: int = setting(LEAST_PLANS[0], help="random plans of scales n, t and s")
    large_plans: int = setting(LEAST_PLANS[1], help="random plans of the other scales")
    part: int = setting(1, help="which share of the models this process takes")
    of: int = setting(1, help="number of shares")
    json: str | None = json_setting("the record of all models")


def sweep_model(case: Case, plans: int, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Prove random plans of one model.

    Args:
        case: The model.
        plans: How many.
        before: What this code of the engine proved earlier, which is not done again.

    Returns:
        Plain values; `failure` says what went wrong, and is empty otherwise.
    """
    started = time.process_time()
    record: dict[str, Any] = {
        "model": case.name, "family": case.family, "scale": case.scale, "engine": engine_hash(), "wished": plans,
        "plans": 0, "max_abs_error": 0.0, "onnx_max_rel": None, "failure": "", "prunable_macs": 0.0, "locks": {},
        "operators_without_rule": {}, "groups": 0, "params": 0, "macs_640": 0, "seconds": 0.0,
    }  # fmt: skip
    record |= (before or {}) | {"wished": plans}
    try:
        model = build_lively(case.source)
        graph = trace_model(model)
        record |= describe(graph)
        require_response(model, trace_side(model))
        proofs = verifier(model, graph)
        spared = without_gradient(copy.deepcopy(model), trace_side(model))
        for seed in range(record["plans"], plans):
            keep = random_keep(graph, seed, heads=seed % 3 == 2)
            slim = slim_copy(model, graph, keep)
            proof = proofs.verify(slim, keep).require()
            record["max_abs_error"] = max(record["max_abs_error"], proof.max_abs_error)
            require_gradients(model, graph, keep, slim, spared=spared)
            if seed == 0:
                require_fused_agrees(slim, trace_side(model))
                record["onnx_max_rel"] = deploy(case, model, graph, keep, slim)
            record["plans"] += 1
    except Exception as error:  # whatever fails is a row of the table
        record["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return record | {"seconds": round(record["seconds"] + time.process_time() - started, 1)}


def describe(graph: ChannelGraph) -> dict[str, Any]:
    """Return what can be pruned of a model and what cannot, and why."""
    locks = Counter[str]()
    for group in graph.groups:
        if group.lock and group.lock not in EXPECTED_LOCKS and ".dfl." not in group.name:
            locks[_without_place(group.lock)] += group.width
    return {
        "groups": len(graph.groups),
        "params": int(graph.cost.params(graph.widths())),
        "macs_640": int(graph.cost.macs(graph.widths(), imgsz_px=640)),
        "prunable_macs": prunable_macs_share(graph, imgsz_px=640),
        "locks": dict(locks),
        "operators_without_rule": dict(graph.report.operators_without_rule),
    }


EXPECTED_LOCKS = (OUTPUT, IMAGE, "is the only channel of its group")
"""Reasons that every detector has: its image, its outputs, and the decoding of boxes."""


def _without_place(lock: str) -> str:
    """Return a reason without the module that it names, so that a table can count it."""
    return re.sub(r"^model\.\d+\.(\w+)\..* was never traced", r"\1 was never traced", lock.split(" in model.")[0])


def without_gradient(model: Any, side_px: int) -> set[str]:
    """Run one forward and backward pass in training mode and return the parameters that it does not reach.

    A weight whose gradient is 0 throughout counts as well. A shift may have such a one: the next norm takes it away.
    """
    trained = model.train().requires_grad_(True)
    images = torch.rand(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of blocks that stochastic depth drops, the same ones in every model that is compared
        outputs = [leaf for leaf in tree_leaves(trained(images)) if _differentiable(leaf)]
    torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
    unreached = {name for name, tensor in trained.named_parameters() if _unreached(tensor)}
    model.zero_grad(set_to_none=True)
    model.eval()
    return unreached


def _unreached(tensor: torch.Tensor) -> bool:
    return tensor.grad is None or (tensor.dim() > 1 and not bool(tensor.grad.any()))


def _differentiable(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def require_response(model: Any, side_px: int) -> None:
    """Refuse a model of which some row of an output (a class, a side of a box) is the same for every image.

    Raises:
        VerificationError: Agreement there would prove nothing.
    """
    images = torch.rand(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answer: Any = model.eval()(images)
    for number, leaf in enumerate(predictions(answer)):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
            change = (leaf[0] - leaf[1]).abs().flatten(1).amax(dim=1) if leaf.dim() > 2 else (leaf[0] - leaf[1]).abs()
            if not bool((change > 0).all()):
                raise VerificationError(
                    f"{int((change == 0).sum())} rows of output {number} are the same for two images", expected="none"
                )


def require_gradients(model: Any, graph: ChannelGraph, keep: BoolArray, slim: Any, *, spared: set[str]) -> None:
    """Refuse a slim model in which a backward pass misses parameters that it reaches in the silenced one.

    Of few channels behind a ReLU all may be below 0 for these images: then they are in the silenced model as well.

    Args:
        model: The dense model.
        graph: Its channel graph.
        keep: Keep mask, shape (channels,).
        slim: What was cut by it.
        spared: Parameters that are missed in the dense model.

    Raises:
        VerificationError: A parameter got no gradient.
    """
    missed = sorted(without_gradient(slim, trace_side(model)) - spared)
    if missed:
        silenced = copy.deepcopy(model)
        silence(silenced, graph, keep)
        missed = sorted(set(missed) - without_gradient(silenced, trace_side(model)))
    if missed:
        raise VerificationError(f"{len(missed)} parameters got no gradient, first '{missed[0]}'", expected="all")


def require_fused_agrees(slim: Any, side_px: int) -> None:
    """Refuse a slim model whose layers, merged for inference, compute something else, in fp64.

    Raises:
        VerificationError: An output differs by more than rounding.
    """
    plain = copy.deepcopy(slim).double().eval()
    image = torch.rand(1, 3, side_px, side_px, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = predictions(plain(image))
        found = predictions(plain.fuse(verbose=False)(image))
    error, scale = max_abs_error(expected, found), max(float(one.abs().max()) for one in expected)
    if not error <= FUSED_TOLERANCE * max(1.0, scale):
        raise VerificationError(f"fuse() changes outputs of up to {scale:.1e} by {error:.1e}", expected="rounding")


def predictions(answer: Any) -> list[torch.Tensor]:
    """Return what a model in inference says, without the maps that it tells beside."""
    return tree_leaves(answer[0] if isinstance(answer, tuple) else answer)


def deploy(case: Case, model: Any, graph: ChannelGraph, keep: BoolArray, slim: Any) -> float | None:
    """Write a slim checkpoint, load it in stock Ultralytics alone, export it to ONNX and compare the raw outputs.

    Returns:
        Largest difference from PyTorch as a fraction of an output's scale; None where the output is a top-k list,
        whose order random scores do not settle, or where the host exports nothing.

    Raises:
        ParityError: A difference above `TOLERANCE`.
    """
    side = max(2 * 32, trace_side(model))
    source = Checkpoint(path=Path(case.name), sha256="0" * 64, model=model, stored_dtype=torch.float32, train_args={})
    plan = plan_from_keep(graph, keep, source_sha256=source.sha256, imgsz_px=640, choice={})
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "slim.pt")
        write_slim(checkpoint, slim, source, plan, dtype=torch.float32)
        image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        _require_stock_agrees(checkpoint, slim, image)
        if case.family in NOT_EXPORTED:
            return None
        artefact = export_model(checkpoint, format="onnx", imgsz_px=side, out=Path(folder, "slim.onnx"))
        with OnnxRuntime().load(artefact, imgsz_px=side, threads=1) as session:
            found = session(image.numpy())
            end_to_end = session.end_to_end
        reference = load_for_inference(checkpoint, end_to_end=end_to_end)
        with torch.no_grad():
            answer: Any = reference(image)
    if is_end_to_end(reference) or hasattr(reference.model[-1], "num_queries"):  # type: ignore[index]
        return None
    return _compared([leaf.numpy() for leaf in predictions(answer)], found)


def _compared(expected: list[Any], found: list[Any]) -> float:
    """Return the largest difference between outputs of the same shapes, in the same order."""
    if [one.shape for one in expected] != [other.shape for other in found]:
        raise ParityError(
            f"ONNX outputs of shapes {[one.shape for one in found]}", expected=str([one.shape for one in expected])
        )
    worst = max(_worst_row(one, other) for one, other in zip(expected, found, strict=True))
    if not worst <= TOLERANCE:
        raise ParityError(f"ONNX differs from PyTorch by {worst:.1e} of a row's scale", expected=f"{TOLERANCE:g}")
    return worst


def _worst_row(expected: Any, found: Any) -> float:
    """Return the largest difference between two arrays as a fraction of the scale of its kind of number.

    Boxes in pixels must not hide scores: each row of dim 1 (a class, a mask, a key point) has a scale of its own. The
    four of a box share one: a centre is half the sum of two sides, whose errors it keeps where they cancel.
    """
    rows, others = (np.moveaxis(values, 1, 0).reshape(values.shape[1], -1) for values in (expected, found))
    scales = np.abs(rows).max(axis=1)
    if expected.ndim == 3:  # decoded predictions: boxes first
        scales[:4] = scales[:4].max()
    return float((np.abs(rows - others).max(axis=1) / np.maximum(scales, TINY)).max())


def _require_stock_agrees(checkpoint: Path, slim: Any, image: torch.Tensor) -> None:
    """Load a checkpoint in a process that cannot import yolo_prune and refuse any difference in its outputs.

    Raises:
        ParityError: An output differs by a bit.
    """
    torch.save(image, checkpoint.with_name("image.pth"))
    STOCK.load(checkpoint.parent)
    with torch.no_grad():
        answer = tree_leaves(slim.eval()(image))
    expected = [leaf for leaf in answer if isinstance(leaf, torch.Tensor)]
    found = torch.load(checkpoint.with_suffix(".out"))
    if not all(torch.equal(one, other) for one, other in zip(expected, found, strict=True)):
        raise ParityError("stock Ultralytics gives other outputs", expected="the same, bit for bit")


def sweep(config: SweepConfig) -> Coverage:
    """Sweep every model that has no record yet, then return all records."""
    torch.set_num_threads(1)
    LOGGER.setLevel("ERROR")
    warnings.simplefilter("ignore")
    cases = {case.name: case for case in all_cases()}
    for name in config.models or ():
        require_choice("model", name, cases)
    chosen = [cases[name] for name in (config.models or cases)]
    Path(config.out).mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(chosen):
        file = Path(config.out) / f"{case.name}.json"
        plans = config.large_plans if case.scale not in ("n", "t", "s") else config.plans
        before = _record(file, case.name)
        if before is not None and (before["engine"] != engine_hash() or before["failure"]):
            before = None  # what other code proved, or this code did not, is done again
        if number % config.of != config.part - 1 or (before is not None and before["plans"] >= plans):
            continue
        record = sweep_model(case, plans, before)
        write_json(file, record, replace=True)
        verdict = record["failure"] or f"{record['plans']} plans, max error {record['max_abs_error']:.1e}"
        print(
            f"[{number + 1}/{len(chosen)}] {case.name}: {verdict}, {record['seconds']} s", file=sys.stderr, flush=True
        )
    found = {name: _record(Path(config.out) / f"{name}.json", name) for name in cases}
    return Coverage(records={name: record for name, record in found.items() if record})


def _record(file: Path, name: str) -> dict[str, Any] | None:
    """Return what is known of a model: from this sweep's folder, or else from the record that README shows."""
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    shown = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    return shown.get(name)


if __name__ == "__main__":
    sys.exit(script((__doc__ or "").partition("\n")[0], SweepConfig, lambda config: execute(sweep, config)))
