"""Cliffs and sensitivities: scores over ratios, by hand and from the command line."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from models import lively
from searches import numbered, words_for

from yolo_prune.allocation import Allocation, Budget, Constraints, WidthSolver, allocate
from yolo_prune.files import sha256
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.pipeline.cliff import steepest
from yolo_prune.pipeline.sensitivity import curves


@pytest.mark.slow
class TestCliff:
    def test_stretches_are_halved_and_the_edge_is_a_plan(self, command, known_detector, tmp_path):
        words = words_for(*known_detector, tmp_path / "c", verb="cliff", points=3, halvings=2, lowest=0.4)
        outcome = command(*words, f"json={tmp_path / 'c.json'}")
        assert outcome.code == 0
        assert [line["ratio"] for line in numbered(tmp_path / "c")][:4] == pytest.approx([1.0, 0.8, 0.6, 0.4])
        found = json.loads((tmp_path / "c.json").read_text())
        macs = [line["macs"] for line in found["budgets"]]
        assert macs == sorted(macs, reverse=True)
        slopes = [
            (upper["score"] - lower["score"]) / max(upper["macs"] - lower["macs"], 1)
            for upper, lower in itertools.pairwise(found["budgets"])
        ]
        steepest = slopes.index(max(slopes))
        ends = (found["edge"]["number"], found["foot"]["number"])
        assert ends == tuple(line["number"] for line in found["budgets"][steepest : steepest + 2])
        assert "steepest from" in outcome.out
        again = command(*words)  # everything is known
        assert again.out.splitlines()[-3:] == outcome.out.splitlines()[-3:]

    def test_by_hand(self):
        """From .5 at 100 to .4 at 60 and .1 at 50: .0025 and .03 a MAC."""
        lines = [{"macs": 100, "score": 0.5}, {"macs": 60, "score": 0.4}, {"macs": 50, "score": 0.1}]
        assert steepest(lines) == (lines[1], lines[2])


class TestCurves:
    def test_by_hand(self):
        """A cut of 16 of 32 channels of one group, then of 8, beside a dense score of .6."""
        graph = trace_model(lively("yolov8n"))
        index = graph.group_names()["model.2.m.0.cv1.conv"]
        whole = graph.widths()
        lines = {0: {"widths": whole.tolist(), "score": 0.6}}
        for number, (kept, score) in enumerate([(whole[index] // 2, 0.5), (whole[index] * 3 // 4, 0.62)], start=1):
            widths = whole.copy()
            widths[index] = kept
            lines[number] = {"widths": widths.tolist(), "score": score}
        found = curves(graph, lines)
        assert list(found) == ["model.2.m.0.cv1.conv"]
        assert found["model.2.m.0.cv1.conv"].removed == pytest.approx((0.25, 0.5))
        assert found["model.2.m.0.cv1.conv"].drops == pytest.approx((-0.02, 0.1))

    def test_a_head_may_go_whole_and_two_cuts_may_leave_a_group_alike(self):
        """Whole heads: the group of a head that went lost all of its channels, at the drop that was seen."""
        graph = trace_model(lively("yolo12n"))
        solver = WidthSolver(graph, Constraints(attention="heads"))
        cuts = []
        for unit in solver.units:
            wish = graph.widths().astype(float)
            wish[unit.groups] *= 0.5
            cuts.append(solver.settle(wish))
        kept = next(cut for cut in cuts if not cut.all())
        lines = {0: {"widths": graph.widths().tolist(), "score": 0.6}}
        lines |= {number: {"widths": kept.tolist(), "score": score} for number, score in ((1, 0.5), (2, 0.4))}
        found = curves(graph, lines)
        gone = [curve for curve in found.values() if curve.removed == (1.0,)]
        assert gone
        assert all(curve.drops == pytest.approx((0.2,)) for curve in gone)
        allocation = Allocation(constraints=Constraints(attention="heads"), drops=found)
        keep = allocate(graph, np.ones(graph.channel_count), Budget(unit="macs", ratio=0.9), allocation)
        assert float(graph.cost.macs(graph.kept_widths(keep), imgsz_px=640)) > 0


@pytest.mark.slow
def test_sensitivity_is_measured_once_and_prune_takes_it(command, dense_checkpoint, tiny_data, tmp_path):
    words = words_for(
        dense_checkpoint, tiny_data, tmp_path / "s", verb="sensitivity", fractions="[0.5]", criterion="l1"
    )
    outcome = command(*words)
    assert outcome.code == 0
    graph = trace_model(read_checkpoint(dense_checkpoint).model)
    content = json.loads((tmp_path / "s" / "sensitivity.json").read_text())
    assert set(content["drops"]) == {group.name for group in graph.groups if not group.lock}
    record = (tmp_path / "s" / "candidates.jsonl").read_bytes()
    assert command(*words).out.splitlines()[-3:] == outcome.out.splitlines()[-3:]
    assert (tmp_path / "s" / "candidates.jsonl").read_bytes() == record
    pruned = command(
        "prune", f"model={dense_checkpoint}", f"sensitivity={tmp_path / 's' / 'sensitivity.json'}", "target_macs=0.6",
        f"out={tmp_path / 'slim.pt'}", f"json={tmp_path / 'slim.json'}",
    )  # fmt: skip
    assert pruned.code == 0
    refused = command(
        "prune", f"model={dense_checkpoint}", f"sensitivity={tmp_path / 's' / 'sensitivity.json'}", "target_macs=0.6",
        f"out={tmp_path / 'other.pt'}", "criterion=l2",
    )  # fmt: skip
    assert refused.code == 2
    assert "criterion=l2, but the sensitivity was measured with l1" in refused.err
    plan = json.loads((tmp_path / "slim.json").read_text())["plan"]
    assert (plan["choice"]["criterion"], plan["choice"]["allocation"]) == ("l1", "sensitivity")
    assert plan["choice"]["sensitivity_sha256"] == sha256(tmp_path / "s" / "sensitivity.json")
    assert 0.57 <= plan["after"]["macs"] / plan["before"]["macs"] <= 0.6
