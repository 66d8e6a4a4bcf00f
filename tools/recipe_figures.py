"""What `bench_recipes.py` measured, as a table and as curves over the epochs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from races import speed_up_in_words
from recipes import CONTROLS, RECIPES
from svg_picture import svg_picture

from yolo_prune.report import quantity, render

PLACE = ("model", "data", "imgsz_px", "batch", "dense_epochs")
"""What cells have to share to be compared."""


OTHERS = "other methods"

FAMILIES = {
    "direct": "one cut", "searched": "one cut", "gradual": "cuts in steps", "distilled": "cuts in steps",
    "sparse": "sparsity training, then one cut",
}  # fmt: skip
"""What recipes are drawn with, by the first word of their names; the rest are `OTHERS`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of a record, and the latencies of what they made."""

    records: list[dict[str, Any]]
    races: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {"cells": self.records, "latencies": self.races}

    def table(self, *, markdown: bool = False) -> str:
        """Return one row a recipe and budget: means over the seeds, with the spread where there are several."""
        backends = list(dict.fromkeys(race["cell"]["backend"] for race in self.races))
        rows = [[*_row(found), *self._speed_ups(found, backends)] for found in _grouped(self.records)]
        head = ["recipe", "epochs", "seeds", "MACs", "params", "silent", "before pruning", "pruned", "val", "test"]
        return render(["model, data", *head, *backends], rows, markdown=markdown) + _gaps(self.records)

    def _speed_ups(self, records: list[dict[str, Any]], backends: list[str]) -> list[str]:
        cells = [record["cell"] for record in records]
        shared = (*PLACE, "budget", "epochs")
        return [
            speed_up_in_words(self.races, cells, cells[0]["recipe"], backend, shared=shared) for backend in backends
        ]

    def draw(self, path: Path) -> None:
        """Draw mAP on val over the epochs, a panel for each family of recipes, and the share of silent channels.

        Args:
            path: SVG file, written anew; the same cells give the same bytes. None where there are controls only.
        """
        panels: list[Callable[[Any], None]] = []
        for title, cells in _comparisons(self.records).items():
            panels += [partial(_draw_map, cells=own, title=f"{title}\n{kind}") for kind, own in _families(cells)]
            if any("silent" in stage for record in cells for stage in record["stages"]):
                panels.append(partial(_draw_silent, cells=cells))
        if not panels:
            return
        rows = -(-len(panels) // 2)
        with svg_picture(path, size=(11, 3.6 * rows)) as figure:
            axes = list(figure.subplots(rows, 2, squeeze=False).flat)
            for one, draw in zip(axes, panels, strict=False):
                draw(one)
            for one in axes[len(panels) :]:
                one.set_axis_off()


def _grouped(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the records of each cell but for the seed: controls before all, then large budgets first."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        cell = record["cell"]
        budget = 1.0 if cell["recipe"] in CONTROLS else cell["budget"]
        key = (*(cell[name] for name in PLACE), -budget, cell["epochs"], list(RECIPES).index(cell["recipe"]))
        groups.setdefault(key, []).append(record)
    return [groups[key] for key in sorted(groups)]


def _row(records: list[dict[str, Any]]) -> list[str]:
    cell = records[0]["cell"]
    figures = [record["figures"] for record in records]
    silent = [stage["silent"][-1] for record in records for stage in record["stages"] if "silent" in stage]
    return [
        f"{cell['model']}, {cell['data']}, {cell['imgsz_px']} px",
        cell["recipe"],
        str(cell["epochs"]) if RECIPES[cell["recipe"]] else "0",
        " ".join(str(record["cell"]["seed"]) for record in records),
        f"{np.mean([one['macs_kept'] for one in figures]):.1%}{_in_stripes(figures)}",
        quantity(int(np.mean([one["params"] for one in figures]))),
        f"{np.mean(silent):.0%}" if silent else "-",
        *(spread([one[key] for one in figures]) for key in ("unpruned", "pruned", "val", "test")),
    ]


def _gaps(records: list[dict[str, Any]]) -> str:
    """Say what the conversion of networks with compactors changed, a line a cell; nothing where there are none."""
    return "".join(
        f"\n{record['cell']['recipe']}, seed {record['cell']['seed']}, before and after its conversion: "
        + ", ".join(
            f"{split} {before:.4f} and {record['figures'][split]:.4f}"
            for split, before in record["figures"]["before_conversion"].items()
        )
        + "\n"
        for record in records
        if "before_conversion" in record["figures"]
    )


def _in_stripes(figures: list[dict[str, Any]]) -> str:
    """Return the share of MACs that living stripes count, which no export saves; nothing where there are none."""
    found = [one["stripe_macs_kept"] for one in figures if "stripe_macs_kept" in one]
    return f" ({np.mean(found):.1%} in stripes)" if found else ""


def spread(values: list[float | None]) -> str:
    """Return the mean mAP50-95, with the lowest and highest of several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{np.mean(known):.3f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.3f}..{max(known):.3f})"


def _comparisons(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the cells of one seed by what they share: the budget and the number of epochs; controls join in."""
    found: dict[str, list[dict[str, Any]]] = {}
    firsts = [group[0] for group in _grouped(records)]
    for group in firsts:
        cell = group["cell"]
        if cell["recipe"] in CONTROLS:
            continue
        place = [cell[name] for name in (*PLACE, "epochs")]
        title = f"{cell['model']}, {cell['data']}, {cell['imgsz_px']} px, {cell['epochs']} epochs"
        title += f", {cell['budget']:.0%} of the MACs"
        if (cell["batch"], cell["dense_epochs"]) != (16, 30):  # the tool's defaults
            title += f", batch {cell['batch']}, dense {cell['dense_epochs']} epochs"
        if title not in found:
            found[title] = [
                control
                for control in firsts
                if control["cell"]["recipe"] in CONTROLS
                and [control["cell"][name] for name in (*PLACE, "epochs")] == place
            ]
        found[title].append(group)
    return found


def _families(cells: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the recipes of each family that there are, with the controls, which join all of them."""
    controls = [record for record in cells if record["cell"]["recipe"] in CONTROLS]
    for kind in dict.fromkeys([*FAMILIES.values(), OTHERS]):
        own = [record for record in cells if _family(record["cell"]["recipe"]) == kind]
        if own:
            yield kind, controls + own


def _family(recipe: str) -> str | None:
    return None if recipe in CONTROLS else FAMILIES.get(recipe.partition("_")[0], OTHERS)


def _curve(record: dict[str, Any]) -> list[float]:
    """Return mAP50-95 on val after each epoch of a recipe, the dense training aside."""
    return [value for stage in record["stages"][1:] if "train" in stage for value in record["curves"][stage["train"]]]


def _draw_map(axes: Any, cells: list[dict[str, Any]], title: str) -> None:
    for number, record in enumerate(cells):
        curve = _curve(record)
        style = "--" if record["cell"]["recipe"] in CONTROLS else "-"
        colour = f"C{number % 10}"
        if curve:
            axes.plot(range(1, len(curve) + 1), curve, style, color=colour, label=record["cell"]["recipe"])
        else:
            axes.axhline(record["figures"]["val"], color=colour, linestyle=":", label=record["cell"]["recipe"])
    axes.set(xlabel="epoch of the recipe", ylabel="mAP50-95 on val")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small", ncols=2, loc="lower right")


def _draw_silent(axes: Any, cells: list[dict[str, Any]]) -> None:
    for number, record in enumerate(cells):
        silent = [value for stage in record["stages"] for value in stage.get("silent", [])]
        if silent:
            axes.plot(range(len(silent)), silent, color=f"C{number % 10}", label=record["cell"]["recipe"])
    axes.set(xlabel="epoch of the recipe", ylabel="share", ylim=(0, 1))
    axes.set_title("silent channels in sparsity training", fontsize="medium")
    axes.legend(fontsize="small")
