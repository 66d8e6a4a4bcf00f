"""What methods of training write into a run's folder, as a report tells it: one function a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Facts: TypeAlias = tuple[tuple[str, str], ...]
"""Names and values in words."""

Course: TypeAlias = tuple[tuple[int, float], ...]
"""Epochs, from 1, and the fraction of the start's MACs that is left after them."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """How a report tells of a method.

    Attributes:
        heading: What it is called.
        record: Name of its record in the folder of a training.
        tell: From the record to its facts and its course, which is empty where nothing is removed.
        note: What is to be known of the figures.
        sentence: For the summary of a run whose slim model it made, with `{kept}` for the fraction of the MACs that is
            left; empty where the plain figures say it all.
        computed: Whether an export computes the MACs that its course counts, and no others.
    """

    heading: str
    record: str
    tell: Callable[[Mapping[str, Any]], tuple[Facts, Course]]
    note: str = ""
    sentence: str = ""
    computed: bool = True


def _pruning(record: Mapping[str, Any]) -> tuple[Facts, Course]:
    options, start = record["options"], float(record["macs"])
    course = tuple((int(step["epoch"]), step["after"]["macs"] / start) for step in record["steps"])
    steps = tuple(
        (f"step {step['step']}, after epoch {epoch}", f"{kept:.1%} of the MACs, {step['after']['params']:,} parameters")
        for step, (epoch, kept) in zip(record["steps"], course, strict=True)
    )
    return (("chosen by", f"criterion {options['criterion']}, allocation {options['allocation']}"), *steps), course


def _resrep(record: Mapping[str, Any]) -> tuple[Facts, Course]:
    epochs = record["epochs"]
    facts = [
        ("target", _of_the_macs(record["options"]["target"])),
        ("strength, momentum", f"{record['strength']:.3g}, {record['momentum']:g}"),
        ("masked rows", _over(epochs, "masked")),
        ("MACs without them", _over(epochs, "macs")),
    ]
    if "converted" in record:
        facts.append(("max |converted - before|", f"{record['converted']['difference']:.1e}"))
    return tuple(facts), _course(epochs, "macs")


def _stripes(record: Mapping[str, Any]) -> tuple[Facts, Course]:
    epochs, target = record["epochs"], record["options"]["target"]
    dead = epochs[-1]["dead"] if epochs else 0
    facts = (
        ("target", "none: the threshold decides" if target is None else _of_the_macs(target)),
        ("strength", f"{record['strength']:.3g}"),
        ("dead stripes", f"{dead:,} of {record['stripes']:,}"),
        ("MACs of the living stripes", _over(epochs, "kept_macs")),
    )
    return facts, _course(epochs, "kept_macs")


def _unstructured(record: Mapping[str, Any]) -> tuple[Facts, Course]:
    facts = [("pattern", str(record["options"]["pattern"]))]
    if "layers" in record:  # the end of a training counts them
        layers = list(record["layers"].values())
        zeros, weights = (sum(layer[key] for layer in layers) for key in ("zeros", "weights"))
        network = record["network"]
        facts += [
            (f"zeros in {len(layers)} layers", f"{zeros:,} of {weights:,}, {zeros / weights:.1%}"),
            ("zeros in all convolutions", f"{network['zeros'] / network['weights']:.1%}"),
        ]
    return tuple(facts), ()


def _grafting(record: Mapping[str, Any]) -> tuple[Facts, Course]:
    epochs, nets = record["epochs"], record["nets"]
    facts = [("mode", str(record["options"]["mode"]))]
    if not nets:
        facts.append(("filters revived", f"{sum(epoch['grafted'] for epoch in epochs):,} in {len(epochs)} epochs"))
        return tuple(facts), ()
    facts.append(("networks", ", ".join(f"{name} with {net['lr_factor']:.2f} of lr0" for name, net in nets.items())))
    own = [weight for epoch in epochs for weight in epoch["grafted"].values() if weight is not None]
    if own:
        facts.append(("weight of the own layers", f"{min(own):.3f} to {max(own):.3f}, means of an epoch"))
    if "best" in record:
        fitness = ", ".join(f"{name} {value:.4f}" for name, value in record["fitness"].items())
        facts.append(("best network", f"{record['best']}; fitness {fitness}"))
    return tuple(facts), ()


TOLD: dict[str, Told] = {
    "pruning": Told(heading="Pruning in steps", record="pruning.json", tell=_pruning),
    "resrep": Told(heading="ResRep", record="resrep.json", tell=_resrep),
    "stripes": Told(
        heading="Stripe-wise pruning",
        record="stripes.json",
        tell=_stripes,
        note="Stripes alone are no latency: an export computes dense convolutions, zeros included. Only filters that "
        "lost every stripe are gone from it.",
        sentence="Its living stripes are {kept:.1%} of the MACs that their training began with, which is no latency: "
        "an export computes the dead ones, too.",
        computed=False,
    ),
    "grafting": Told(heading="Filter grafting", record="grafting.json", tell=_grafting),
    "unstructured": Told(
        heading="Unstructured pruning",
        record="zeros.json",
        tell=_unstructured,
        note="Zeros, not speed: a dense convolution computes them. Only units that skip a pattern such as 2:4 gain.",
    ),
}
"""Every method with a record, by its name; sparsity training has a section of its own."""


def _of_the_macs(fraction: float) -> str:
    return f"{fraction:.1%} of the MACs"


def _over(epochs: Sequence[Mapping[str, Any]], key: str) -> str:
    """Return the first and the last of a fraction's values."""
    shown = [f"{epoch[key]:.1%} after epoch {epoch['epoch']}" for epoch in (*epochs[:1], *epochs[1:][-1:])]
    return ", ".join(shown) or "no epoch is done"


def _course(epochs: Sequence[Mapping[str, Any]], key: str) -> Course:
    return tuple((int(epoch["epoch"]), float(epoch[key])) for epoch in epochs)
