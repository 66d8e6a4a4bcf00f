"""What `sweep_models.py` proved, as README's coverage table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from model_cases import NEEDS_DOWNLOAD, OTHER_TASKS, all_cases
from source import engine_hash

from yolo_prune.report import render

NOT_EXPORTED = ("yolov8-world",)
"""Families that the host exports in no format."""

LEAST_PLANS = (200, 20)
"""Random plans of scales n, t and s, and of the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """Records of models by name; see `sweep_model`."""

    records: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the records."""
        return self.records

    def table(self, *, markdown: bool = False) -> str:
        """Return one row a yaml: what was proven of each scale, what can be pruned and what not, and a line in all."""
        families: dict[str, list[dict[str, Any]]] = {}
        for record in self.records.values():
            families.setdefault(record["family"], []).append(record)
        head = [
            "yaml",
            "scales",
            "plans",
            "max error",
            "ONNX",
            "MACs that can go",
            "locked besides image and outputs",
            "",
        ]
        return render(head, [_row(*one) for one in sorted(families.items())], markdown=markdown) + (
            ("\n" if markdown else "") + self._in_all()
        )

    def _in_all(self) -> str:
        """Return how far the sweep is, what it leaves out, and what stands by an earlier engine."""
        plans = sum(record["plans"] for record in self.records.values())
        earlier = [name for name, record in self.records.items() if record["engine"] != engine_hash()]
        deep = sum(record["plans"] >= least_plans(record["scale"]) for record in self.records.values())
        engine = "all by the present engine"
        if earlier:
            engine = f"{len(self.records) - len(earlier)} by the present engine, the others by an earlier one"
        return (
            f"{len(self.records)} of the case table's {len(all_cases())} models, {plans} plans; {deep} models with the "
            f"{LEAST_PLANS[0]} plans of scales n, t and s or the {LEAST_PLANS[1]} of others; "
            f"{engine}. Left out: "
            f"{', '.join(NEEDS_DOWNLOAD)}, which downloads weights when it is built, and yamls of other tasks: "
            f"{' and '.join(OTHER_TASKS)}.\n"
        )


def _row(family: str, records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the cells of a yaml: one entry a scale where they differ, one for all where they do not."""
    failed = [record["scale"] or "it" for record in records if record["failure"]]
    earlier = [record["scale"] or "it" for record in records if record["engine"] != engine_hash()]
    remarks = [f"fails: {' '.join(failed)}"] if failed else []
    if earlier:
        remarks.append("earlier engine" if len(earlier) == len(records) else f"earlier engine: {' '.join(earlier)}")
    onnx = [record["onnx_max_rel"] for record in records if record["onnx_max_rel"] is not None]
    return [
        family,
        " ".join(record["scale"] for record in records),
        _in_turn(str(record["plans"]) for record in records),
        f"{max(record['max_abs_error'] for record in records):.0e}",
        f"{max(onnx):.0e}" if onnx else "not exported by the host" if family in NOT_EXPORTED else "a top-k list",
        _in_turn(f"{record['prunable_macs']:.2%}" if record["plans"] else "-" for record in records),
        "; ".join(sorted(set().union(*(record["locks"] for record in records)))) or "-",
        "; ".join(remarks),
    ]


def _in_turn(texts: Iterable[str]) -> str:
    """Return texts in a row, or the one that they all are."""
    listed = list(texts)
    return listed[0] if len(set(listed)) == 1 else " ".join(listed)


def least_plans(scale: str) -> int:
    """Return how many plans a model of a scale is to be proven by."""
    return LEAST_PLANS[0] if scale in ("n", "t", "s") else LEAST_PLANS[1]
