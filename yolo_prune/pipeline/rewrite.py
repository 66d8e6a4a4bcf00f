"""`rewrite`: an equal network in another form, proven, as a checkpoint that stock Ultralytics loads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolo_prune.configuration import json_setting, require_choice, setting
from yolo_prune.files import require_new_outputs
from yolo_prune.hosts.refusals import require_imgsz
from yolo_prune.hosts.slim import require_no_zeros
from yolo_prune.hosts.ultralytics.blocks import host_for
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint, write_rewritten
from yolo_prune.hosts.ultralytics.shortcuts import LayerNote, remove_shortcuts
from yolo_prune.hosts.ultralytics.surgery import trace_model, trace_side
from yolo_prune.plan import Cost, cost_at
from yolo_prune.report import quantity, render
from yolo_prune.surgery.equivalence import Equivalence, prove_equivalence

SHORTCUTS = ("remove",)
"""What may be done to shortcuts."""


@dataclass(kw_only=True)
class RewriteConfig:
    """Settings of `rewrite`."""

    model: str = setting(help="checkpoint (.pt) to rewrite, dense or slim")
    out: str = setting(help="where the rewritten checkpoint shall stand; must not exist")
    shortcuts: str = setting("remove", help="remove: what reads a sum reads its terms side by side, exactly")
    imgsz: int = setting(640, help="image side at which MACs are counted", unit="px")
    json: str | None = json_setting("the table")


@dataclass(frozen=True, kw_only=True)
class RewriteResult:
    """What `rewrite` did."""

    out: Path
    imgsz_px: int
    before: Cost
    after: Cost
    layers: tuple[int, int]
    expanded: tuple[LayerNote, ...]
    left: tuple[LayerNote, ...]
    proof: Equivalence

    def to_json(self) -> dict[str, Any]:
        """Return costs, blocks and proof as plain values."""
        return {**asdict(self), "out": str(self.out)}

    def table(self) -> str:
        """Return costs before and after, what became of the blocks, and what was proven."""
        costs = (
            (f"MACs at {self.imgsz_px} px", self.before.macs, self.after.macs),
            ("parameters", self.before.params, self.after.params),
            ("layers", *self.layers),
        )
        rows = [
            [name, quantity(before), quantity(after), f"{after / before:.3f}x"] for name, before, after in costs
        ]  # fmt: skip
        gone = ", ".join(f"{note.number} ({note.block})" for note in self.expanded)
        kept = [f"left as it is: layer {note.number} ({note.block}): {note.reason}\n" for note in self.left]
        return (
            render(["", "before", "after", "growth"], rows)
            + f"shortcuts removed from layers {gone}\n"
            + "".join(kept)
            + f"proven equal: max |original - rewritten| = {self.proof.max_abs_error:.1e} in fp64 on lively weights, "
            + f"{self.proof.own_max_abs_error:.1e} on its own; {self.proof.rounded_max_abs_error:.1e} in fp32\n"
            + f"rewritten checkpoint: {self.out}\n"
        )


def rewrite(config: RewriteConfig) -> RewriteResult:
    """Rewrite a checkpoint, prove that nothing changed, then write it.

    Raises:
        YoloPruneError: Bad input, nothing to rewrite, or a proof that failed (nothing is written).
    """
    require_choice("shortcuts", config.shortcuts, SHORTCUTS)
    require_new_outputs({"out": config.out, "json": config.json})
    source = read_checkpoint(Path(config.model))
    original: Any = source.model
    require_no_zeros(original, "rewrite")
    require_imgsz(config.imgsz, stride=max(32, int(original.stride.max())))
    rewriting = remove_shortcuts(original)
    rewritten: Any = rewriting.model
    proof = prove_equivalence(
        original,
        rewritten,
        lambda model: remove_shortcuts(model).model,
        host=host_for(original),
        side_px=trace_side(original),
    ).require()
    before, after = (_cost(model, config.imgsz) for model in (original, rewritten))
    layers = (len(original.model), len(rewritten.model))
    write_rewritten(
        Path(config.out), rewritten, source, before=before, after=after, kind=f"shortcuts={config.shortcuts}"
    )
    return RewriteResult(
        out=Path(config.out),
        imgsz_px=config.imgsz,
        before=before,
        after=after,
        layers=layers,
        expanded=rewriting.expanded,
        left=rewriting.left,
        proof=proof,
    )


def _cost(model: Any, imgsz_px: int) -> Cost:
    graph = trace_model(model)
    return cost_at(graph, graph.widths(), imgsz_px)
