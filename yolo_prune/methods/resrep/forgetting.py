"""Remembering and forgetting: what an optimizer step does to the rows of compactors.

Source: Ding et al., ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting, ICCV 2021, eq. 9 and
algorithm 1: `G_j = m_j dL/dQ_j + s Q_j / |Q_j|`. A masked row (m_j = 0) no longer hears the loss, and the group lasso
takes it to zero; others weigh both. The rule hooks the optimizer, behind AMP's unscaling and clipping, once per step.

Two things differ from the paper. The share of MACs to be masked is scheduled instead of a number of rows, since rows of
different layers weigh differently. And where few steps need a strength above `KEPT_STRENGTH`, it is the masked rows'
alone: the others would follow them to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from yolo_prune.allocation import Allocation, Budget, Constraints, allocate
from yolo_prune.channels import BoolArray, ChannelGraph, IntArray
from yolo_prune.errors import ConfigError
from yolo_prune.importance import FloatArray
from yolo_prune.methods.resrep.schedule import EPS, GONE, Course, Pull
from yolo_prune.methods.resrep.targets import maskable, row_scores
from yolo_prune.methods.steps import skipped

KEPT_STRENGTH = 1e-3
"""Largest strength for rows that are not masked: what the paper's authors use for short trainings."""

PARAM_GROUP = "compactor"
"""Name of the compactors' parameter group, beside the host's "weight", "bn" and "bias"."""


def give_own_group(optimizer: Optimizer, weights: list[nn.Parameter]) -> None:
    """Move the weights of compactors into a parameter group without weight decay and Nesterov's momentum, in place.

    Raises:
        ConfigError: Not plain SGD: what others make of the rule, no simulation knows.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ConfigError(
            f"method=resrep with {type(optimizer).__name__}",
            expected="SGD: others divide the pull to zero by its own size",
            remedy="optimizer=SGD",
        )
    (lr,) = {group["lr"] for group in optimizer.param_groups}  # the host's; the optimizer's own default is torch's
    moved = {id(weight) for weight in weights}
    for group in optimizer.param_groups:
        group["params"] = [tensor for tensor in group["params"] if id(tensor) not in moved]
    settings = {"lr": lr, "weight_decay": 0.0, "nesterov": False, "param_group": PARAM_GROUP}
    optimizer.add_param_group({"params": weights, **settings})


@torch.no_grad()
def row_norms(weight: Tensor) -> Tensor:
    """Return the norm of each row of a compactor, shape (rows,)."""
    return weight.flatten(1).norm(dim=1)


@torch.no_grad()
def apply_rule(weight: Tensor, masked: Tensor, strength: float) -> None:
    """Make a compactor's gradient that of the rule, in place.

    Args:
        weight: Of shape (rows, rows, 1, 1), with the loss's gradient, or none.
        masked: bool tensor of shape (rows,).
        strength: The paper's lambda.
    """
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    gradient[masked] = 0.0  # assigned: what is not finite would outlive a product
    pulls = weight.new_full((len(weight),), min(strength, KEPT_STRENGTH)).masked_fill_(masked, strength)
    weight.grad = gradient.add_(weight * (pulls / (row_norms(weight) + EPS))[:, None, None, None])


class Forgetting:
    """The compactors of one training: which rows are masked, and what each optimizer step does to them.

    Args:
        graph: Channel graph of the network without compactors.
        targets: The channel of each row, by path of the convolution before the compactor.
        weights: The compactors' weights, by the same paths.
        course: The training.
        pull: Strength and momentum.
        target: Fraction of the MACs that is left in the end.
        constraints: Floors and multiples.
        imgsz_px: Side of the images, at which MACs are counted.
        interval: Optimizer steps between new masks.

    Attributes:
        pull: As given; the tail of the learning rates belongs to it.
        iteration: The batch that the training is at, counted from its very start; the host sets it.
        masked: Which channels are masked, shape (channels,).
        settled: Whether masks stay as they are.
        strength: That of `pull`, or more where a row was larger than 1 when masks settled.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        targets: Mapping[str, IntArray],
        weights: Mapping[str, nn.Parameter],
        *,
        course: Course,
        pull: Pull,
        target: float,
        constraints: Constraints,
        imgsz_px: int,
        interval: int,
    ) -> None:
        self.graph, self.targets, self.weights = maskable(graph, targets), targets, weights
        self.pull, self.strength, self._target, self._constraints = pull, pull.strength, target, constraints
        self._imgsz_px, self._interval = imgsz_px, interval
        self.iteration, self.settled, self._steps = 0, False, 0
        self.masked: BoolArray = np.zeros(graph.channel_count, dtype=bool)
        self._rows = self._mask_rows()
        self.follow(course)

    def follow(self, course: Course) -> None:
        """Take the learning rates of a course, the same one or one of other batches."""
        self.course = course
        self._rates = course.rates * course.tail(self.pull)

    def attach(self, optimizer: Optimizer) -> None:
        """Hook an optimizer that has a group for compactors."""
        self._optimizer = optimizer
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if skipped(optimizer):
            return
        self._remask()
        # Warm-up and schedule of the host set every group, and a state that is read back brings new ones.
        (group,) = (group for group in optimizer.param_groups if group.get("param_group") == PARAM_GROUP)
        group["lr"], group["momentum"] = float(self._rates[self.iteration]), self.pull.momentum
        for path, weight in self.weights.items():
            apply_rule(weight, self._rows[path], self.strength)

    def _remask(self) -> None:
        if self.settled or self.iteration < self.course.mask_from:
            return
        if not all(bool(weight.isfinite().all()) for weight in self.weights.values()):
            return  # the host goes back to its last checkpoint after the epoch
        last = self.iteration >= self.course.mask_until
        if last or self._steps % self._interval == 0:
            self.mask(self._chosen(self.course.kept(self.iteration, self._target)))
        self._steps += 1
        if last:
            self._settle()

    def _chosen(self, kept: float) -> BoolArray:
        """Return the smallest rows of all compactors without which so much of the MACs is kept."""
        if kept >= 1.0:
            return np.zeros(self.graph.channel_count, dtype=bool)
        budget = Budget(unit="macs", ratio=kept, imgsz_px=self._imgsz_px)
        scores = row_scores(self.graph, self.norms(), self.targets)
        return ~allocate(self.graph, scores, budget, Allocation(path="global", constraints=self._constraints))

    def mask(self, masked: BoolArray) -> None:
        """Mask other rows; what newly masked ones remember of the loss is forgotten at once.

        Args:
            masked: Shape (channels,).
        """
        before, self.masked = self._rows, masked
        self._rows = self._mask_rows()
        for path, rows in self._rows.items():
            self._stop(path, rows & ~before[path])

    def restore(self, masked: BoolArray, *, settled: bool, strength: float) -> None:
        """Go on with masks, shape (channels,), and strength of a training that was interrupted, or went back."""
        self.masked, self.settled, self.strength = masked, settled, strength
        self._rows = self._mask_rows()

    def _settle(self) -> None:
        """Keep the masks from now on; rows that grew above 1 need as much more strength to arrive in time.

        Rows and strength in proportion behave in proportion, so what was simulated from 1 holds for them.
        """
        self.settled = True
        self.strength = self.pull.strength * max(self.largest_masked(), 1.0)

    @torch.no_grad()
    def end(self) -> None:
        """Make rows that are masked for good exactly zero once they are below `GONE`: they stay there."""
        for path, weight in self.weights.items() if self.settled else ():
            gone = self._rows[path] & (row_norms(weight) < GONE)
            weight[gone] = 0.0
            self._stop(path, gone)

    @torch.no_grad()
    def _stop(self, path: str, rows: Tensor) -> None:
        """Make rows stand still."""
        remembered = self._optimizer.state.get(self.weights[path], {}).get("momentum_buffer")
        if remembered is not None:
            remembered[rows] = 0.0

    @torch.no_grad()
    def carry(self, average: Mapping[str, Tensor]) -> None:
        """Give a moving average the masked rows as they are, in place: it lags, and a late zero is none in it.

        Args:
            average: The average's weights of compactors, by the same paths.
        """
        for path, weight in self.weights.items():
            rows = self._rows[path]
            average[path][rows] = weight[rows].to(average[path])

    def norms(self) -> dict[str, FloatArray]:
        """Return the norm of each row, shape (rows,), by path."""
        return {path: row_norms(weight).cpu().double().numpy() for path, weight in self.weights.items()}

    def largest_masked(self) -> float:
        """Return the norm of the largest masked row; 0 where none is."""
        scores = row_scores(self.graph, self.norms(), self.targets)
        return float(scores[self.masked].max(initial=0.0))

    def smallest_kept(self) -> float:
        """Return the norm of the smallest row that is not masked."""
        scores = row_scores(self.graph, self.norms(), self.targets)
        return float(scores[~self.masked].min(initial=np.inf))

    def macs(self) -> float:
        """Return the fraction of the MACs that is left without the masked rows."""
        kept = self.graph.cost.macs(self.graph.kept_widths(~self.masked), imgsz_px=self._imgsz_px)
        return float(kept / self.graph.cost.macs(self.graph.widths(), imgsz_px=self._imgsz_px))

    def share(self) -> float:
        """Return the fraction of rows that is masked."""
        return float(self.masked.sum() / sum(len(channels) for channels in self.targets.values()))

    @property
    def gone(self) -> bool:
        """Whether the masks have settled and every masked row is below `GONE`."""
        return self.settled and self.largest_masked() < GONE

    def masked_rows(self) -> dict[str, list[int]]:
        """Return the indices of the masked rows by path, as plain values."""
        return {path: np.flatnonzero(self.masked[channels]).tolist() for path, channels in self.targets.items()}

    def _mask_rows(self) -> dict[str, Tensor]:
        return {
            path: torch.from_numpy(self.masked[channels]).to(self.weights[path].device)
            for path, channels in self.targets.items()
        }


def masked_channels(graph: ChannelGraph, targets: Mapping[str, IntArray], rows: Mapping[str, list[int]]) -> BoolArray:
    """Return which channels are masked, shape (channels,), from indices of rows by path."""
    masked = np.zeros(graph.channel_count, dtype=bool)
    for path, indices in rows.items():
        masked[targets[path][np.array(indices, dtype=np.int64)]] = True
    return masked
