"""Latency as a function of the kept widths, fitted to whole networks that were timed.

Formula tables and sums of single layers mispredict engines, which fuse, pad and choose kernels as they like. So the
truth is the timing of a whole candidate beside the dense network, and a model of few parts only interpolates between
candidates of this very network on this very target: a constant, and for each kind of layer its MACs and the channels
that it reads and writes, all as shares of the dense network's. A kind is a kernel size at a resolution. Widths count as
padded to a multiple; which one, the timings say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from yolo_prune.channels import ChannelGraph
from yolo_prune.errors import ConfigError
from yolo_prune.importance import FloatArray

MULTIPLES = (1, 2, 4, 8, 16, 32)
"""Multiples that widths may be padded to."""

PULLS = (1e-4, 1e-3, 1e-2, 1e-1)
"""How strongly a fit is pulled towards "latency is proportional to MACs"; which one, the left-out candidates say."""

SURE = 1e3
"""Weight of what is known without timing, beside 1 for what was timed."""

FEWEST = 8
"""Fewest candidates that a fit makes sense of."""


def structure_of(graph: ChannelGraph) -> str:
    """Return a hash of what decides a network's latency: its groups, their widths, and what layers make of them."""
    terms = [(term.coef, term.axes, term.area_power) for term in graph.cost.macs_terms]
    groups = [(group.name, group.width) for group in graph.groups]
    return hashlib.sha256(json.dumps([groups, terms, graph.cost.imgsz_px]).encode()).hexdigest()[:16]


class Features:
    """What a network's latency is explained by, each as a share of the dense network's: 1 for that itself.

    Args:
        graph: Its channel graph.

    Attributes:
        names: Of the features.
        macs_share: Share of the dense network's MACs behind each feature; 0 for those that count no MACs.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        kinds: dict[tuple[int, float, int], list[tuple[int, ...]]] = {}
        for term in graph.cost.macs_terms:
            if term.axes:
                kinds.setdefault((len(term.axes), term.area_power, term.coef), []).append(term.axes)
        self._incidence, self._widths = graph.cost.incidence, graph.widths()
        self._kinds = {kind: np.array(axes) for kind, axes in kinds.items()}
        macs = {kind: self._macs(self._sizes(self._widths, 1), kind) for kind in self._kinds}
        total = float(sum(macs.values()))
        self.names = ("constant", *(f"{part} {kind}" for kind in self._kinds for part in ("MACs", "channels")))
        shares = [(float(macs[kind]) / total, 0.0) for kind in self._kinds]
        self.macs_share = np.array([0.0, *(share for pair in shares for share in pair)])

    def __call__(self, kept: npt.ArrayLike, multiple: int) -> FloatArray:
        """Return the features of kept widths.

        Args:
            kept: Kept channels per group, shape (groups,) or (candidates, groups).
            multiple: Sizes of layers are padded to it.

        Returns:
            Shape (features,) or (candidates, features).
        """
        return self._raw(np.asarray(kept), multiple) / self._raw(self._widths, multiple)

    def _raw(self, kept: npt.NDArray[Any], multiple: int) -> FloatArray:
        sizes = self._sizes(kept, multiple)
        columns = [np.ones(sizes.shape[:-1])]
        for kind, axes in self._kinds.items():
            columns += [self._macs(sizes, kind), sizes[..., axes].sum(axis=(-1, -2))]
        return np.stack(columns, axis=-1)

    def _macs(self, sizes: FloatArray, kind: tuple[int, float, int]) -> FloatArray:
        macs: FloatArray = kind[2] * sizes[..., self._kinds[kind]].prod(axis=-1).sum(axis=-1)
        return macs

    def _sizes(self, kept: npt.NDArray[Any], multiple: int) -> FloatArray:
        sizes: FloatArray = np.ceil(kept @ self._incidence.T / multiple) * multiple
        return sizes


@dataclass(frozen=True, kw_only=True)
class LatencyFit:
    """What was learned of timed candidates.

    Attributes:
        structure: Of the network; see `structure_of`.
        multiple: Widths count as padded to it.
        pull: Of `PULLS`, the one that fitted best.
        weights: Latency behind each feature, as a share of the dense network's; see `Features`.
        error: Median of |predicted / measured - 1| over the candidates, each predicted by a fit to the others.
        worst: The largest of these.
    """

    structure: str
    multiple: int
    pull: float
    weights: tuple[float, ...]
    error: float
    worst: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LatencyFit:
        """Undo `to_json`."""
        return cls(**{**value, "weights": tuple(value["weights"])})


class LatencyModel:
    """Predicts latencies of slim networks as fractions of the dense one's.

    Args:
        graph: The channel graph of the network.
        fit: What was learned of it.

    Raises:
        ConfigError: It was learned of another network.
    """

    def __init__(self, graph: ChannelGraph, fit: LatencyFit) -> None:
        if fit.structure != structure_of(graph):
            raise ConfigError(
                f"the profile is of another network ({fit.structure}, not {structure_of(graph)})",
                expected="the profile of a checkpoint with the same layers and widths",
                remedy="yolo-prune profile model=... measures this one",
            )
        self.fit, self._features = fit, Features(graph)

    def predict(self, kept: npt.ArrayLike) -> FloatArray:
        """Return latencies at kept widths, shape (groups,) or (candidates, groups), as shape () or (candidates,)."""
        latencies: FloatArray = self._features(kept, self.fit.multiple) @ np.array(self.fit.weights)
        return latencies


def fit_latency(
    graph: ChannelGraph, kept: npt.ArrayLike, measured: npt.ArrayLike, *, multiples: Sequence[int] = MULTIPLES
) -> LatencyFit:
    """Fit timed candidates, weighing relative errors; multiple and pull are those that predict left-out ones best.

    Args:
        graph: The channel graph.
        kept: Kept channels per group, shape (candidates, groups).
        measured: Latencies as fractions of the dense network's, shape (candidates,).
        multiples: Which ones come into question.

    Raises:
        ConfigError: Too few candidates, or a latency that is none.
    """
    kept, measured = np.asarray(kept), np.asarray(measured, dtype=float)
    if len(measured) < FEWEST:
        raise ConfigError(f"{len(measured)} timed candidates", expected=f"{FEWEST} or more")
    if not (np.isfinite(measured) & (measured > 0)).all():
        raise ConfigError("a latency that is not above 0", expected="timings")
    features = Features(graph)
    best: tuple[float, int, float, FloatArray] | None = None
    for multiple in multiples:
        table = features(kept, multiple)
        for pull in PULLS:
            errors = _left_out(table, measured, features.macs_share, pull)
            score = float(np.sqrt(np.mean(errors**2)))
            if best is None or score < best[0]:
                best = (score, multiple, pull, errors)
    assert best is not None  # there are multiples
    _, multiple, pull, errors = best
    weights = _solve(features(kept, multiple), measured, features.macs_share, pull)
    return LatencyFit(
        structure=structure_of(graph),
        multiple=multiple,
        pull=pull,
        weights=tuple(float(weight) for weight in weights),
        error=float(np.median(np.abs(errors))),
        worst=float(np.abs(errors).max()),
    )


def _solve(table: FloatArray, measured: FloatArray, prior: FloatArray, pull: float) -> FloatArray:
    """Return weights, none below 0, of least squared relative errors and least distance from a prior.

    All features of the dense network are 1, and so is its latency: the weights add up to 1, as nearly as matters.
    """
    from scipy.optimize import nnls  # 30 MB, for those who ask for a latency

    rows, dense = table / measured[:, None], np.full((1, len(prior)), SURE)
    strength = np.sqrt(pull * len(measured))
    left = np.concatenate([rows, strength * np.eye(len(prior)), dense])
    right = np.concatenate([np.ones(len(measured)), strength * prior, [SURE]])
    weights: FloatArray = nnls(left, right)[0]
    return weights


def _left_out(table: FloatArray, measured: FloatArray, prior: FloatArray, pull: float) -> FloatArray:
    """Return predicted / measured - 1 of each candidate by a fit to the others."""
    errors = np.empty(len(measured))
    for index in range(len(measured)):
        others = np.arange(len(measured)) != index
        weights = _solve(table[others], measured[others], prior, pull)
        errors[index] = table[index] @ weights / measured[index] - 1.0
    return errors
