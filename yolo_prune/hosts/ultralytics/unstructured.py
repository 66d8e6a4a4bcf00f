"""Unstructured pruning inside the host's trainer: zeros in chosen layers, kept through the training, counted honestly.

The network stays the stock one with zeros in it: no MACs are saved and nothing gets faster by itself.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, RANK

from yolo_prune.errors import ConfigError, VerificationError
from yolo_prune.files import from_record, write_json
from yolo_prune.hosts.slim import MARKER, ZEROS, mark
from yolo_prune.hosts.ultralytics.blocks import MERGED
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.networks import bare_copy, network_of
from yolo_prune.hosts.ultralytics.records import FILES
from yolo_prune.hosts.ultralytics.trainer import MODEL_SETUP
from yolo_prune.methods.unstructured import fits_groups, is_n_of_m, n_of_m, pruned_masks, require_width

(RECORD,) = FILES["unstructured"]
"""What a run leaves in its folder: its settings, and the zeros of each layer when it is done."""

HEAD, ALL = "head", "all"
"""Names for the convolutions of the last layer, and for those of all layers."""


@dataclass(frozen=True, kw_only=True)
class UnstructuredOptions:
    """Which weights become zero.

    Attributes:
        pattern: `global`, `l1`, `random` or N:M; see `methods.unstructured`.
        amount: Fraction of the chosen layers' weights that goes; of no meaning to N:M.
        targets: `head`, `all`, or patterns of layer paths; see `target_layers`.

    Raises:
        ConfigError: A value that is out of range, or no target.
    """

    pattern: str = "global"
    amount: float = 0.5
    targets: tuple[str, ...] = (HEAD,)

    def __post_init__(self) -> None:
        n_of_m(self.pattern)
        if not 0.0 < self.amount < 1.0:
            raise ConfigError(f"unstructured.amount={self.amount:g}", expected="a number above 0 and below 1")
        if not self.targets:
            raise ConfigError("unstructured.targets=[]", expected=f"{HEAD}, {ALL}, or paths of layers")


def target_layers(network: Any, options: UnstructuredOptions) -> tuple[dict[str, nn.Conv2d], list[str]]:
    """Return the convolutions whose weights are pruned, each once, by path; and what a user has to be told of them.

    The convolution that decodes boxes (DFL) is never one: its weights are the numbers 0, 1, 2, ... A pattern is not put
    on kernels that deployment adds to another one: their sum would not have it.

    Args:
        network: The network.
        options: Its targets are `head`, `all`, or patterns of module paths in which `*` and `?` stand for anything; a
            path means all convolutions below it.

    Raises:
        ConfigError: A target that names no convolution, a named layer that an N:M pattern does not fit, or none that it
            fits.
    """
    convolutions = {path: module for path, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    matched = [path for target in options.targets for path in _matches(network, convolutions, target)]
    twice = sorted(path for path, count in Counter(matched).items() if count > 1)
    remarks = []
    if twice:  # pruned twice, a layer would lose a part of what is left as well
        remarks.append(
            f"{len(twice)} layers, first '{twice[0]}', are named more than once by unstructured.targets: pruned once"
        )
    chosen = {path: convolutions[path] for path in dict.fromkeys(matched)}
    pair = n_of_m(options.pattern)
    if pair is None:
        return chosen, remarks
    fitting = _fitting(network, chosen, options, pair[1])
    skipped = [path for path in chosen if path not in fitting]
    if skipped:
        remarks.append(f"{options.pattern} does not fit {len(skipped)} layers, left dense: {', '.join(skipped)}")
    return fitting, remarks


def _matches(network: Any, convolutions: dict[str, nn.Conv2d], target: str) -> list[str]:
    head = f"model.{len(network.model) - 1}."
    found = [
        path
        for path in convolutions
        if target == ALL
        or (target == HEAD and path.startswith(head))
        or any(fnmatchcase(place, target) for place in _places(path))
    ]
    allowed = [path for path in found if not _decodes_boxes(path)]
    if not found:
        near = difflib.get_close_matches(target, sorted({*convolutions, HEAD, ALL}), n=3)
        raise ConfigError(
            f"no convolution matches '{target}' of unstructured.targets",
            expected=f"{HEAD}, {ALL}, or the path of a module" + (f", such as {', '.join(near)}" if near else ""),
            remedy="yolo-prune inspect shows them",
        )
    if not allowed:
        raise ConfigError(
            f"'{target}' of unstructured.targets is the layer that decodes boxes (DFL)",
            expected="layers with learned weights: these are the numbers 0, 1, 2, ...",
        )
    return allowed


def _places(path: str) -> list[str]:
    """Return the path of a module and of all modules that it is in."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _decodes_boxes(path: str) -> bool:
    return ".dfl." in f"{path}."


def _fitting(
    network: nn.Module, chosen: dict[str, nn.Conv2d], options: UnstructuredOptions, group: int
) -> dict[str, nn.Conv2d]:
    """Return the layers that groups of M input channels fit; a named one that they do not fit is refused."""
    merged = tuple(f"{path}." for path, module in network.named_modules() if isinstance(module, tuple(MERGED)))
    fitting = {
        path: conv
        for path, conv in chosen.items()
        if fits_groups(conv.weight, group) and not f"{path}.".startswith(merged)
    }
    for path in chosen if not fitting else options.targets:
        if path in chosen and path not in fitting:
            require_width(chosen[path].weight, group, path)
            raise ConfigError(
                f"{options.pattern} on '{path}', which deployment adds to another kernel",
                expected="a kernel of its own: the sum would not have the pattern",
            )
    return fitting


@dataclass
class UnstructuredPruning:
    """The callbacks of one training that begins with zeros; that they are kept is the trainer's, in every training.

    Attributes:
        options: Which weights become zero.
    """

    options: UnstructuredOptions

    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        """Return what the host's trainer calls, by event. Picklable before training begins."""
        return {MODEL_SETUP: self.prune, "on_train_end": self.report}

    def prune(self, trainer: Any) -> None:
        """Zero the chosen weights before optimizer and average know them; a resumed network has its zeros."""
        network = network_of(trainer.model)
        if trainer.resume:
            return
        paths = zero_weights(network, self.options, seed=int(trainer.args.seed))
        if RANK in {-1, 0}:
            trainer.save_dir.mkdir(parents=True, exist_ok=True)
            write_json(trainer.save_dir / RECORD, {"options": asdict(self.options)}, replace=True)
            LOGGER.info(f"unstructured: {zeros_of(network, paths).in_words()}")

    def report(self, trainer: Any) -> None:
        """Count the zeros of the checkpoint that is left, and check the pattern where it will run: fused.

        Raises:
            VerificationError: An N:M pattern that does not hold.
        """
        best = trainer.best if trainer.best.is_file() else trainer.last
        network: Any = read_checkpoint(best).model
        paths = pruned_layers(network)
        require_pattern(network, self.options.pattern)
        zeros = zeros_of(network, paths)
        record = {"options": asdict(self.options), "checkpoint": best.name, **zeros.to_json()}
        write_json(trainer.save_dir / RECORD, record, replace=True)
        LOGGER.info(f"unstructured: {zeros.table()}{zeros.in_words()}")


def zero_weights(network: Any, options: UnstructuredOptions, *, seed: int) -> list[str]:
    """Zero the chosen weights of a network in place, note them in its marker, and return the layers' paths.

    Raises:
        ConfigError: See `target_layers`.
    """
    layers, remarks = target_layers(network, options)
    for remark in remarks:
        if RANK in {-1, 0}:
            LOGGER.warning(f"unstructured: {remark}")
    weights = {path: conv.weight for path, conv in layers.items()}
    masks = pruned_masks(weights, options.pattern, amount=options.amount, seed=seed)
    with torch.no_grad():
        for path, mask in masks.items():
            weights[path].mul_(mask)
    earlier = getattr(network, MARKER, {}).get(ZEROS, [])
    names = [f"{path}.weight" for path in layers]
    mark(
        network,
        method="unstructured",
        pattern=options.pattern,
        pruned=list(layers),
        zeros=list(dict.fromkeys([*earlier, *names])),
    )
    return list(layers)


def pruned_layers(network: nn.Module) -> list[str]:
    """Return the paths of the layers that unstructured pruning zeroed last, as the marker has them."""
    return [str(path) for path in getattr(network, MARKER, {}).get("pruned", ())]


def require_pattern(network: Any, pattern: str) -> None:
    """Assert that an N:M pattern holds in the layers that the marker names, as they are and with batch norms folded in.

    Raises:
        VerificationError: It does not.
    """
    pair = n_of_m(pattern)
    if pair is None:
        return
    fused = bare_copy(network).fuse(verbose=False)
    for name, model in (("the checkpoint", network), ("the fused checkpoint", fused)):
        modules = dict(model.named_modules())
        wrong = [
            path
            for path in pruned_layers(network)
            if isinstance(conv := modules.get(path), nn.Conv2d) and not is_n_of_m(conv.weight, *pair)
        ]
        if wrong:
            raise VerificationError(
                f"{pattern} does not hold in {len(wrong)} layers of {name}, first '{wrong[0]}'",
                expected=f"at most {pair[0]} weights in every {pair[1]} consecutive input channels",
            )


@dataclass(frozen=True, kw_only=True)
class ZeroCounts:
    """Zeros of layers, and of the network.

    Attributes:
        layers: By path, (zeros, weights).
        network: (zeros, weights) of all convolutions that learn.
    """

    layers: dict[str, tuple[int, int]]
    network: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        layers = {path: {"zeros": zeros, "weights": weights} for path, (zeros, weights) in self.layers.items()}
        return {"layers": layers, "network": {"zeros": self.network[0], "weights": self.network[1]}}

    def table(self) -> str:
        """Return one line for each layer."""
        rows = (f"  {path}: {zeros:,} of {weights:,}" for path, (zeros, weights) in self.layers.items())
        return "\n".join(["zeros of the pruned layers", *rows, ""])

    def in_words(self) -> str:
        """Return the sums in a sentence."""
        zeros, weights = (sum(values) for values in zip(*self.layers.values(), strict=True))
        return (
            f"{zeros:,} of {weights:,} weights of {len(self.layers)} layers are zero "
            f"({self.network[0] / self.network[1]:.1%} of all convolutions'); zeros alone make nothing faster"
        )


def zeros_of(network: nn.Module, paths: Iterable[str]) -> ZeroCounts:
    """Count the zeros of some layers of a network, and of all its convolutions."""
    counts = {
        path: (int((module.weight == 0).sum()), module.weight.numel())
        for path, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and not _decodes_boxes(path)
    }
    zeros, weights = (sum(values) for values in zip(*counts.values(), strict=True))
    return ZeroCounts(layers={path: counts[path] for path in paths if path in counts}, network=(zeros, weights))


def unstructured_options_of(folder: Path) -> UnstructuredOptions | None:
    """Return which weights a run in a folder has zeroed; None if it has none.

    Raises:
        ConfigError: The record is damaged.
    """
    return from_record(folder / RECORD, _options_in)


def _options_in(record: dict[str, Any]) -> UnstructuredOptions:
    return UnstructuredOptions(**{**record["options"], "targets": tuple(record["options"]["targets"])})
