"""The end of stripe-wise pruning: checkpoints of stock networks, without skeletons and without dead filters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from torch import nn
from ultralytics.utils import LOGGER

from yolo_prune.channels.tensors import named_tensors
from yolo_prune.errors import VerificationError
from yolo_prune.files import sha256
from yolo_prune.hosts.slim import (
    MARKER,
    UNFINISHED,
    ZEROS,
    Checkpoint,
    mark,
    mark_cut,
    unfinished,
    write_checkpoint,
)
from yolo_prune.hosts.ultralytics.blocks import host_for
from yolo_prune.hosts.ultralytics.checkpoints import unpickle
from yolo_prune.hosts.ultralytics.networks import bare_copy, network_of, random_image
from yolo_prune.hosts.ultralytics.run_files import stripped
from yolo_prune.hosts.ultralytics.stripe_layers import METHOD, StripePrices, layers_of
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model, trace_side, verifier
from yolo_prune.methods.stripes.skeleton import shed_skeleton, silence_dead_filters
from yolo_prune.plan import plan_from_keep
from yolo_prune.surgery.copying import copied
from yolo_prune.surgery.silent import silent_channels, without_silent
from yolo_prune.surgery.stripes import StripeCost, living_stripes, stripe_cost
from yolo_prune.surgery.verify import TOLERANCE, max_abs_error, outputs


def finish_run(folder: Path) -> None:
    """Finish the checkpoints of a run: the best first, so that it is whole when the last one, which is resumed, is.

    One that is finished is left alone.

    Raises:
        VerificationError: Removing dead filters changed what the network says.
    """
    for name in ("best.pt", "last.pt"):
        path = folder / "weights" / name
        if path.is_file():
            finish_checkpoint(path)


def finish_killed_run(folder: Path) -> Path:
    """Do what a run that was killed after its last epoch left undone, and return its best checkpoint.

    Raises:
        VerificationError: Removing dead filters changed what the network says.
    """
    finish_run(folder)
    return stripped(folder)


def finish_checkpoint(path: Path) -> None:
    """Replace a checkpoint with skeletons by one of a stock network, completely or not at all.

    What belongs to the training of the network with skeletons, such as its optimizer's state, goes.
    """
    content = unpickle(path)
    network = network_of(content.get("ema") or content["model"])
    if unfinished(network) != METHOD:
        return
    dtype, args = next(network.parameters()).dtype, content.get("train_args") or {}
    source = Checkpoint(path=path, sha256=sha256(path), model=bare_copy(network), stored_dtype=dtype, train_args=args)
    done = finished(source, imgsz_px=int(args.get("imgsz", 640)))
    cost = StripeCost(**getattr(done, MARKER)[METHOD])
    LOGGER.info(
        f"{path.name}: {cost.kept:,} of {cost.total:,} stripes live, {cost.macs:,} MACs counted in stripes; "
        f"{cost.dense_macs:,} MACs are what a dense convolution, and so an export, computes"
    )
    write_checkpoint(path, {**content, "model": None, "ema": done.to(dtype), "optimizer": None}, replace=True)


def finished(source: Checkpoint, *, imgsz_px: int) -> nn.Module:
    """Return the stock network of a checkpoint with skeletons, float32, with what was done in its marker.

    Args:
        source: The checkpoint; its model loses its skeletons.
        imgsz_px: Side of the images at which MACs are counted.

    Raises:
        VerificationError: Removing dead filters changed what the network says.
    """
    network: Any = source.model
    layers = layers_of(network)
    for layer in layers.values():
        silence_dead_filters(layer)
        shed_skeleton(layer.conv)
    graph = trace_model(network)
    keep = without_silent(graph, silent_channels(named_tensors(network), graph))
    done = network
    if not keep.all():
        done = slim_copy(network, graph, keep)
        proof = verifier(network, graph).verify(done, keep).require()
        _require_unchanged(network, done)
        choice = {"method": METHOD, "removed": "filters without a living stripe"}
        plan = plan_from_keep(graph, keep, source_sha256=source.sha256, imgsz_px=imgsz_px, choice=choice)
        mark_cut(done, source, plan, max_abs_error=proof.max_abs_error)
    prices = StripePrices(copied(done), imgsz_px)
    cost = stripe_cost(done, prices.per_stripe, dense_macs=prices.dense_macs, imgsz_px=imgsz_px)
    earlier = getattr(source.model, MARKER, {}).get(ZEROS, [])
    mark(
        done,
        method=METHOD,
        zeros=list(dict.fromkeys([*earlier, *_names_of_zeros(done, layers)])),
        **{METHOD: asdict(cost)},
    )
    getattr(done, MARKER).pop(UNFINISHED, None)
    return done


def _names_of_zeros(network: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the parameters that a later training shall keep zeros of: dead stripes, and norms of dead filters.

    Args:
        network: The network.
        paths: Its convolutions that had a skeleton.
    """
    names = []
    for path in paths:
        alive = living_stripes(cast("nn.Conv2d", network.get_submodule(path)))
        if not alive.all():
            names.append(f"{path}.weight")
        if not alive.flatten(1).any(dim=1).all():
            names += [f"{path.rpartition('.')[0]}.bn.{name}" for name in ("weight", "bias")]
    return names


def _require_unchanged(before: Any, after: nn.Module) -> None:
    """Assert, in fp64, that a network with silent filters and the one without them say the same of an image.

    Raises:
        VerificationError: They do not.
    """
    image, host = random_image(before, trace_side(before)), host_for(before)
    models = [copied(model).double() for model in (before, after)]
    error = max(
        max_abs_error(*(outputs(model, image, host, training=training) for model in models))
        for training in (False, True)
    )
    if not error <= TOLERANCE:  # also catches NaN
        raise VerificationError(
            f"max |with dead filters - without| = {error:.3e}",
            expected=f"at most {TOLERANCE:g} in fp64: a filter without a living stripe still mattered to something",
            remedy="the checkpoints are as training left them; please report the model's yaml",
        )
