"""Recipes: ways from a dense checkpoint to a slim one that has recovered. A new recipe is a new row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a recipe.

    Attributes:
        verb: `train`, `prune`, `search` (and prune by the best plan), or `rewrite`.
        settings: Its settings, beside those that every cell has; from the epochs of the step and the budget. A `train`
            takes those of `yolo-prune train` and every training key of the host.
        share: Share of the recipe's epochs that a `train` takes.
        nets: How many networks it trains side by side: each epoch counts as so many.
    """

    verb: Literal["train", "prune", "search", "rewrite"]
    settings: Callable[[int, float], Mapping[str, Any]]
    share: float = 0.0
    nets: int = 1


def cut(**settings: Any) -> Step:
    """Prune to the budget."""
    return Step(verb="prune", settings=lambda _epochs, budget: {"target_macs": budget, **settings})


def look(**settings: Any) -> Step:
    """Search for the best plan within the budget, and prune by it."""
    return Step(verb="search", settings=lambda _epochs, budget: {"target_macs": budget, **settings})


def plain() -> Step:
    """Turn shortcuts into concatenations."""
    return Step(verb="rewrite", settings=lambda _epochs, _budget: {"shortcuts": "remove"})


def tune(share: float = 1.0, *, nets: int = 1, **settings: Any) -> Step:
    """Train what there is."""
    return Step(verb="train", share=share, settings=lambda _epochs, _budget: settings, nets=nets)


def tune_to(**settings: Any) -> Step:
    """Train what there is with a method that has the budget as its target."""
    return Step(verb="train", share=1.0, settings=lambda _epochs, budget: {"target_macs": budget, **settings})


def cut_in_steps(*, steps: int, until: float, criterion: str = "l2", share: float = 1.0, **settings: Any) -> Step:
    """Prune while training, the last step after about a share of its epochs: steps are whole epochs apart."""

    def made(epochs: int, budget: float) -> Mapping[str, Any]:
        every = max(1, round(until * epochs / steps))
        when = {"prune_every": every, "prune_steps": steps}
        return {**when, "target_macs": budget, "criterion": criterion, **settings}

    return Step(verb="train", share=share, settings=made)


OFTEN: dict[str, Any] = {"nbs": 16}
"""An optimizer step every 16 images. The host gathers 64 by default, which leaves a small data set a hundred steps."""

SPARSE = 0.4
"""Share of the epochs that sparsity training takes; the fine-tune after pruning has the rest."""


def sparse(**sparsity: Any) -> list[Step]:
    """Sparsity training, pruning by what it did, fine-tune."""
    scales = cut(criterion="bn_scale", allocation="global", data="data", recalibrate=100)
    return [tune(SPARSE, **sparsity, **OFTEN), scales, tune(1.0 - SPARSE, **OFTEN)]


RECIPES: dict[str, list[Step]] = {
    "start": [],
    "dense": [tune()],
    "dense_often": [tune(**OFTEN)],
    "direct": [cut(allocation="uniform"), tune()],
    "direct_often": [cut(allocation="uniform"), tune(**OFTEN)],
    "direct_global": [cut(allocation="global"), tune(**OFTEN)],
    "direct_taylor": [cut(allocation="uniform", criterion="taylor", data="data", recalibrate=100), tune(**OFTEN)],
    "direct_taylor_global": [cut(allocation="global", criterion="taylor", data="data", recalibrate=100), tune(**OFTEN)],
    "direct_fisher_global": [cut(allocation="global", criterion="fisher", data="data", recalibrate=100), tune(**OFTEN)],
    "searched": [look(candidates=50, recalibrate=100), tune(**OFTEN)],
    "searched_informed": [look(candidates=50, strategy="informed", recalibrate=100), tune(**OFTEN)],
    "distilled": [cut(allocation="uniform"), tune(distill="dense", **OFTEN)],
    "gradual": [cut_in_steps(steps=5, until=0.4)],
    "gradual_often": [cut_in_steps(steps=5, until=0.4, **OFTEN)],
    "gradual_distilled": [cut_in_steps(steps=5, until=0.4, distill="dense", **OFTEN)],
    "gradual_taylor": [cut_in_steps(steps=5, until=0.4, criterion="taylor", **OFTEN)],
    "gradual_taylor_distilled": [cut_in_steps(steps=5, until=0.4, criterion="taylor", distill="dense", **OFTEN)],
    "gradual_taylor_global": [cut_in_steps(steps=5, until=0.4, criterion="taylor", allocation="global", **OFTEN)],
    "gradual_fisher_global": [cut_in_steps(steps=5, until=0.4, criterion="fisher", allocation="global", **OFTEN)],
    "gradual_taylor_knapsack": [cut_in_steps(steps=5, until=0.4, criterion="taylor", allocation="knapsack", **OFTEN)],
    "plain_direct": [plain(), cut(allocation="uniform"), tune(**OFTEN)],
    "plain_sparse": [plain(), *sparse(sparsity="auto", sparsity_share=0.5)],
    "plain_gradual_taylor": [plain(), cut_in_steps(steps=5, until=0.4, criterion="taylor", **OFTEN)],
    "resrep": [tune_to(method="resrep", **OFTEN)],
    "stripes": [tune_to(method="stripes", **OFTEN)],
    "grafted": [
        tune(0.5, nets=2, method="grafting", grafting={"nets": 2}, **OFTEN),
        cut_in_steps(steps=5, until=0.4, criterion="taylor", share=0.5, **OFTEN),
    ],
    "gradual_soft": [cut_in_steps(steps=5, until=0.4, prune_soft=True, **OFTEN)],
    "gradual_sparse": [
        cut_in_steps(steps=5, until=0.4, sparsity="auto", sparsity_share=0.3, sparsity_schedule="linear", **OFTEN)
    ],
    "sparse_proximal_weak": sparse(sparsity="auto", sparsity_share=0.25),
    "sparse_proximal_strong": sparse(sparsity="auto", sparsity_share=0.5),
    "sparse_subgradient_weak": sparse(sparsity="auto", sparsity_share=0.25, sparsity_mode="subgradient"),
    "sparse_subgradient_strong": sparse(sparsity="auto", sparsity_share=0.5, sparsity_mode="subgradient"),
}
"""Every recipe by name."""

CONTROLS = ("start", "dense", "dense_often")
"""Recipes that prune nothing: the dense checkpoint as it is, or trained as long as the others; no budget matters."""
