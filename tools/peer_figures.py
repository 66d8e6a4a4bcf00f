"""What `bench_peers.py` measured, as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from cells import failures
from peers import COMMANDS
from races import speed_up_in_words
from recipe_figures import spread

from yolo_prune.report import quantity, render

SHARED = ("model", "data", "imgsz_px", "batch", "dense_epochs", "epochs", "budget")
"""What cells have to share to be compared; seeds are averaged over."""

ORDER = ("dense", "yolo_prune", "yolo_prune_direct", "torch_pruning", "slimming")
"""Rows of a budget; the first stands once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerFigures:
    """The cells of a record, and the latencies of their artefacts."""

    records: list[dict[str, Any]]
    races: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {"cells": self.records, "latencies": self.races}

    def table(self, *, markdown: bool = False) -> str:
        """Return one row a peer and budget: means over the seeds, with the spread where there are several."""
        backends = list(dict.fromkeys(race["cell"]["backend"] for race in self.races))
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for record in self.records:
            if "failed" in record:
                continue
            groups.setdefault((*_shared(record), record["cell"]["peer"]), []).append(record)
        places = list(dict.fromkeys(key[:-1] for key in groups))
        rows = [
            self._row(groups[(*place, peer)], backends)
            for place in sorted(places, key=lambda place: (place[:-1], -place[-1]))
            for peer in ORDER
            if (*place, peer) in groups
        ]
        head = ["model, data", "epochs", "seeds", "pruned by", "MACs", "params", "val", "recalibrated", "test"]
        head += [*backends, "tool s", "tool MB", "user writes"]
        return render(head, rows, markdown=markdown) + failures(self.records)

    def _row(self, records: list[dict[str, Any]], backends: list[str]) -> list[str]:
        cell, figures = records[0]["cell"], [record["figures"] for record in records]

        def mean(key: str) -> str:
            known = [one[key] for one in figures if key in one]
            return f"{np.mean(known):.1f}" if known else "-"

        return [
            f"{cell['model']}, {cell['data']}, {cell['imgsz_px']} px",
            str(cell["epochs"]),
            " ".join(str(record["cell"]["seed"]) for record in records),
            cell["peer"],
            f"{np.mean([one['macs_kept'] for one in figures]):.1%}",
            quantity(int(np.mean([one["params"] for one in figures]))),
            *(spread([one.get(split) for one in figures]) for split in ("val", "recalibrated", "test")),
            *(
                speed_up_in_words(
                    self.races, [record["cell"] for record in records], cell["peer"], backend, shared=SHARED
                )
                for backend in backends
            ),
            mean("tool_s"),
            mean("tool_mb"),
            _written(cell["peer"], figures[0]["user_lines"]),
        ]


def _written(peer: str, lines: int) -> str:
    """Say what a user writes: commands of ours, code around the peers."""
    return f"{lines} {'command' if peer in COMMANDS else 'line'}{'' if lines == 1 else 's'}" if lines else "-"


def _shared(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record["cell"][name] for name in SHARED)
