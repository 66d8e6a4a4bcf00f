"""EagleEye: candidates by closed-form cost, scored on held-out training images, in a record that only grows."""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import write_yaml
from models import lively

import yolo_prune.pipeline.search as search_module
from yolo_prune.allocation import Allocation, Budget, Constraints, WidthSolver, allocate
from yolo_prune.allocation.budget import lowest_go
from yolo_prune.allocation.latency import LatencyModel, fit_latency
from yolo_prune.allocation.paths import Ratios
from yolo_prune.channels import ChannelGraph
from yolo_prune.device.machine import Machine
from yolo_prune.errors import ConfigError, DataError, InfeasibleTargetError, MissingDependencyError
from yolo_prune.export.profile import Profile
from yolo_prune.files import read_lines, sha256
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.collection import TrainingImages
from yolo_prune.hosts.ultralytics.scoring import Scorer
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model
from yolo_prune.importance import Evidence, score_channels
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.pipeline.cliff import steepest
from yolo_prune.pipeline.profile import drawn
from yolo_prune.pipeline.sensitivity import curves
from yolo_prune.search.sampling import BAND, TRIES, Sampler
from yolo_prune.search.strategies import STRATEGIES, UNINFORMED, InformedSearch


def sampler_of(name: str = "yolov8n", ratio: float = 0.5, **more: Any) -> tuple[ChannelGraph, Sampler, float]:
    """A sampler, and what a candidate may cost."""
    graph = trace_model(lively(name))
    budget = Budget(unit="macs", ratio=ratio, imgsz_px=320)
    sampler = Sampler(graph, WidthSolver(graph, Constraints()), budget, **more)
    return graph, sampler, ratio * budget.cost(graph, graph.widths())


class TestSampler:
    @pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
    @pytest.mark.parametrize("ratio", [0.7, 0.5, 0.3])
    def test_candidates_meet_the_budget_and_can_be_built(self, name, ratio):
        graph, sampler, limit = sampler_of(name, ratio)
        for number in range(20):
            candidate = sampler.draw(number)
            cost = float(graph.cost.macs(candidate.widths, imgsz_px=320))
            assert cost <= limit
            assert candidate.moved or cost >= (1 - BAND) * limit
            assert cost >= 0.95 * limit  # one that was moved comes near, too
            graph.check_keep(lowest_go(graph, np.arange(graph.channel_count, dtype=float), candidate.widths))

    @pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
    @pytest.mark.parametrize("ratio", [0.7, 0.5, 0.3])
    def test_most_of_them_are_drawn_and_not_moved(self, name, ratio):
        """What the largest ratio is for: by the paper's 0.7, no draw ever keeps 70% or 30%."""
        _, sampler, _ = sampler_of(name, ratio)
        moved = [sampler.draw(number).moved for number in range(20)]
        assert sum(moved) <= 8

    def test_what_is_tied_shares_one_ratio(self):
        graph = trace_model(lively("yolo11n"))
        solver = WidthSolver(graph, Constraints(round_to=1, min_channels=1))
        sampler = Sampler(graph, solver, Budget(unit="macs", ratio=0.5))
        tied = [unit.groups for unit in solver.units if len(unit.groups) > 1]
        assert tied
        for number in range(5):
            gone = 1.0 - sampler.draw(number).widths / graph.widths()
            for groups in tied:
                np.testing.assert_allclose(gone[groups], gone[groups[0]])

    def test_smaller_budgets_draw_larger_ratios(self):
        largest = [sampler_of(ratio=ratio)[1].largest for ratio in (0.7, 0.5, 0.3)]
        assert 0.1 < largest[0] < largest[1] < largest[2] < 1.0

    def test_a_number_is_a_candidate_whatever_was_drawn_before(self):
        _, first, _ = sampler_of(seed=3)
        _, second, _ = sampler_of(seed=3)
        forwards = [first.draw(number).widths.tolist() for number in range(6)]
        backwards = [second.draw(number).widths.tolist() for number in reversed(range(6))]
        assert forwards == backwards[::-1]
        assert len({str(widths) for widths in forwards}) == 6
        _, other, _ = sampler_of(seed=4)
        assert other.draw(0).widths.tolist() != forwards[0]

    def test_what_is_never_met_is_moved_after_a_bounded_number_of_draws(self):
        """A known bug of a fork: to draw for ever."""
        graph, sampler, limit = sampler_of(ratio=0.3, largest=0.05)
        candidate = sampler.draw(0)
        assert candidate.moved
        assert candidate.tries == TRIES
        assert 0.95 * limit <= float(graph.cost.macs(candidate.widths, imgsz_px=320)) <= limit

    def test_bad_input(self):
        with pytest.raises(InfeasibleTargetError):
            sampler_of(ratio=0.001)
        for largest in (0.0, 1.0, -0.5):
            with pytest.raises(ConfigError, match="largest ratio"):
                sampler_of(largest=largest)


class TestStrategies:
    def scored(self, strategy: Any, count: int, worth: Any) -> dict[int, tuple[np.ndarray, float]]:
        """Candidates and what they are worth, round by round."""
        lines: dict[int, tuple[np.ndarray, float]] = {}
        for numbers in strategy.rounds(count):
            proposed = strategy.propose(numbers, lines)
            assert [candidate.number for candidate in proposed] == list(numbers)
            lines |= {candidate.number: (candidate.widths, worth(candidate.widths)) for candidate in proposed}
        assert list(lines) == list(range(count))
        return lines

    @pytest.mark.parametrize("name", list(STRATEGIES))
    def test_more_candidates_begin_with_the_same_ones(self, name):
        def worth(widths: np.ndarray) -> float:
            return float(widths[3])

        short, long = (self.scored(STRATEGIES[name](sampler_of()[1]), count, worth) for count in (19, 26))
        for number, (widths, _) in short.items():
            np.testing.assert_array_equal(widths, long[number][0])

    def test_informed_ones_are_within_the_budget_and_learn(self):
        """The worth is the width of one group: random candidates stay near the middle, informed ones go up."""
        graph, sampler, limit = sampler_of()
        lines = self.scored(InformedSearch(sampler), 48, lambda widths: float(widths[5]))
        assert all(float(graph.cost.macs(widths, imgsz_px=320)) <= limit for widths, _ in lines.values())
        worths = np.array([worth for _, worth in lines.values()])
        assert worths[32:].mean() > worths[:UNINFORMED].mean()

    def test_the_informed_one_begins_as_the_random_one(self):
        random, informed = (
            self.scored(STRATEGIES[name](sampler_of()[1]), UNINFORMED, lambda _: 0.0) for name in STRATEGIES
        )
        assert all((random[number][0] == informed[number][0]).all() for number in random)

    def test_optuna_is_asked_for(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "optuna", None)
        with pytest.raises(MissingDependencyError, match="optuna"):
            InformedSearch(sampler_of()[1])


class TestRatios:
    def test_groups_shrink_in_proportion_and_to_nothing(self):
        graph = trace_model(lively("yolov8n"))
        ratios = np.random.default_rng(0).uniform(0.1, 0.7, size=len(graph.groups))
        path = Ratios(graph, ratios)
        wishes = np.array([path.wish(step) for step in range(0, path.steps + 1, 50)])
        assert (np.diff(wishes, axis=0) <= 0).all()
        np.testing.assert_allclose(wishes[0], graph.widths())
        np.testing.assert_allclose(wishes[-1], 0.0, atol=1e-9)
        early = 1.0 - wishes[1] / graph.widths()
        np.testing.assert_allclose(early / early.max(), ratios / ratios.max(), rtol=1e-6)


@pytest.fixture(scope="module")
def images(tiny_data):
    return TrainingImages(data=tiny_data, imgsz_px=64, batches=2, batch=4, workers=0)


def statistics_of(model: torch.nn.Module) -> float:
    """A number that stands for all batch-norm statistics."""
    return sum(float(value.double().sum()) for name, value in model.named_buffers() if "running" in name)


class TestScorer:
    def test_images_are_held_out(self, dense_checkpoint, images):
        scorer = Scorer(read_checkpoint(dense_checkpoint).model, images, held_out=0.25, seed=0)
        assert scorer.counts == (12, 4)
        scored, used = (set(loader.dataset.im_files) for loader in (scorer._scoring, scorer._recalibration))
        assert not scored & used
        assert len(scored | used) == 16
        assert {Path(file).parent.name for file in scored} == {"train"}

    def test_a_score_is_of_the_candidate_alone(self, dense_checkpoint, images, monkeypatch):
        """The same after other candidates were scored, and the candidate is left as it was."""
        model = read_checkpoint(dense_checkpoint).model
        graph = trace_model(model)
        scores = score_channels(graph, Evidence.of(model), CRITERIA["l1"])
        scorer = Scorer(model, images, held_out=0.25, seed=0)
        sampler = Sampler(graph, WidthSolver(graph, Constraints()), Budget(unit="macs", ratio=0.8))
        masks = [lowest_go(graph, scores, sampler.draw(number).widths) for number in range(2)]
        slims = [slim_copy(model, graph, keep) for keep in masks]
        before = {name: value.clone() for name, value in slims[0].state_dict().items()}
        assert 0.0 <= scorer.score(slims[0]) <= 1.0
        assert all(torch.equal(before[name], value) for name, value in slims[0].state_dict().items())
        # The mAP of random weights is 0 for all: what it would be measured on tells more.
        monkeypatch.setattr(Scorer, "_map", lambda _, candidate: statistics_of(candidate))
        first, other, again = (scorer.score(slim) for slim in (slims[0], slims[1], slims[0]))
        assert first == again != other
        assert first != statistics_of(slims[0])  # recalibrated

    def test_too_few_images(self, dense_checkpoint, images):
        with pytest.raises(DataError, match="leaves 0 to score"):
            Scorer(read_checkpoint(dense_checkpoint).model, images, held_out=0.01, seed=0)


def words_for(model: Path, data: Path, out: Path, *, verb: str = "search", **more: Any) -> list[str]:
    settings = {"imgsz": 64, "batches": 2, "batch": 4, "held_out": 0.25, **more}
    if verb == "search":
        settings = {"target_macs": 0.5, "candidates": 3, **settings}
    return [verb, f"model={model}", f"data={data}", f"out={out}", *(f"{k}={v}" for k, v in settings.items())]


@pytest.fixture
def profile_of(tmp_path) -> Any:
    """Writes profiles of a device whose latency is half constant and half in proportion to the MACs."""

    def write(checkpoint: Path, *, imgsz_px: int, dense_ms: float = 10.0) -> tuple[Profile, Path]:
        graph = trace_model(read_checkpoint(checkpoint).model)
        kept = np.array([drawn(graph, seed=0, number=number)[0] for number in range(24)])
        macs = graph.cost.macs(kept, imgsz_px=imgsz_px) / graph.cost.macs(graph.widths(), imgsz_px=imgsz_px)
        machine = Machine(cpu="a", cores=2, system="b", python="3", runtimes={"ncnn": "1"})
        found = Profile(
            machine=machine, backend="ncnn", imgsz_px=imgsz_px, threads=2, candidates=24, dense_ms=dense_ms,
            fit=fit_latency(graph, kept, 0.5 + 0.5 * macs),
        )  # fmt: skip
        path = tmp_path / f"profile_{dense_ms:g}.json"
        path.write_text(json.dumps(found.to_json()), encoding="utf-8")
        return found, path

    return write


def numbered(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a folder's record, by number."""
    return sorted(read_lines(folder / "candidates.jsonl"), key=lambda line: line["number"])


def require_a_winner(lines: list[dict[str, Any]]) -> None:
    """Agreement about scores that are all alike, or about the first candidate, would say little."""
    scores = [line["score"] for line in lines]
    assert len(set(scores)) == len(scores)
    assert max(scores) > max(0.0, scores[0])


@pytest.mark.slow
class TestSearch:
    def test_the_best_is_a_plan_that_prune_applies(self, command, known_detector, tmp_path):
        dense_checkpoint, data = known_detector
        words = words_for(
            dense_checkpoint, data, tmp_path / "s", criterion="taylor", target_macs=0.8, candidates=5, seed=2
        )
        outcome = command(*words)
        assert outcome.code == 0
        lines = read_lines(tmp_path / "s" / "candidates.jsonl")
        assert [line["number"] for line in lines] == [0, 1, 2, 3, 4]
        require_a_winner(lines)
        best = max(lines, key=lambda line: line["score"])
        plan = json.loads((tmp_path / "s" / "best.json").read_text())
        assert plan["after"]["macs"] == best["macs"]
        assert plan["choice"]["criterion"] == "taylor"
        best_plan, slim = tmp_path / "s" / "best.json", tmp_path / "slim.pt"
        assert command("prune", f"model={dense_checkpoint}", f"plan={best_plan}", f"out={slim}").code == 0
        found = trace_model(read_checkpoint(slim).model)
        assert sum(found.widths()) < sum(trace_model(read_checkpoint(dense_checkpoint).model).widths())

    def test_more_candidates_go_on_and_other_settings_do_not(self, command, dense_checkpoint, tiny_data, tmp_path):
        folder = tmp_path / "s"
        assert command(*words_for(dense_checkpoint, tiny_data, folder, candidates=1)).code == 0
        before = (folder / "candidates.jsonl").read_bytes()
        assert command(*words_for(dense_checkpoint, tiny_data, folder, candidates=2)).code == 0
        after = (folder / "candidates.jsonl").read_bytes()
        assert after.startswith(before)
        assert after.count(b"\n") == 2
        refused = command(*words_for(dense_checkpoint, tiny_data, folder, seed=1))
        assert refused.code == 2
        assert "seed=0" in refused.err
        assert (folder / "candidates.jsonl").read_bytes() == after

    def test_a_profile_tells_latencies_of_candidates_that_are_known(
        self, command, dense_checkpoint, tiny_data, tmp_path, profile_of
    ):
        folder, words = tmp_path / "s", words_for(dense_checkpoint, tiny_data, tmp_path / "s", round_to=8)
        assert command(*words).code == 0
        record = (folder / "candidates.jsonl").read_bytes()
        assert not (folder / "latencies.json").exists()
        known, path = profile_of(dense_checkpoint, imgsz_px=64)
        outcome = command(*words, f"profile={path}")
        assert outcome.code == 0
        assert "not timed" in outcome.out
        assert (folder / "candidates.jsonl").read_bytes() == record
        found = json.loads((folder / "latencies.json").read_text())
        model = LatencyModel(trace_model(read_checkpoint(dense_checkpoint).model), known.fit)
        for line, (number, fraction) in zip(numbered(folder), found["fractions"], strict=True):
            assert number == line["number"]
            assert fraction == pytest.approx(float(model.predict(np.array(line["widths"]))))

    def test_a_latency_is_a_budget(self, command, dense_checkpoint, tiny_data, tmp_path, profile_of):
        """Widths are multiples of what the profile found; another profile is another search."""
        known, path = profile_of(dense_checkpoint, imgsz_px=64)
        words = [
            word
            for word in words_for(dense_checkpoint, tiny_data, tmp_path / "s")
            if not word.startswith(("target_macs", "round_to"))
        ]
        words.append("target_latency=0.7")
        assert command(*words, f"profile={path}").code == 0
        found = json.loads((tmp_path / "s" / "latencies.json").read_text())
        assert all(0.6 < fraction <= 0.7 for _, fraction in found["fractions"])
        plan = json.loads((tmp_path / "s" / "best.json").read_text())
        assert (plan["choice"]["target_latency"], plan["choice"]["round_to"]) == (0.7, known.fit.multiple)
        _, other = profile_of(dense_checkpoint, imgsz_px=64, dense_ms=11.0)
        refused = command(*words, f"profile={other}")
        assert refused.code == 2
        assert "profile_sha256" in refused.err

    def test_killed_it_goes_on_and_ends_alike(self, command, known_detector, tmp_path):
        whole, killed = (
            words_for(*known_detector, tmp_path / name, target_macs=0.8, candidates=5, seed=2)
            for name in ("whole", "killed")
        )
        assert command(*whole).code == 0
        require_a_winner(numbered(tmp_path / "whole"))
        process = subprocess.Popen([sys.executable, "-m", "yolo_prune", *killed], stdout=subprocess.DEVNULL)
        record = tmp_path / "killed" / "candidates.jsonl"
        while not record.is_file():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with record.open("a") as stream:
            stream.write('{"number": 1, "sco')  # as if it had been killed while it wrote
        kept = record.read_text().splitlines()[0]
        assert command(*killed).code == 0
        assert record.read_text().splitlines()[0] == kept
        found, expected = (
            [{key: line[key] for key in line if key != "seconds"} for line in numbered(tmp_path / name)]
            for name in ("killed", "whole")
        )
        assert found == expected
        plans = [(tmp_path / name / "best.json").read_text() for name in ("killed", "whole")]
        assert plans[0] == plans[1]


@pytest.mark.slow
class TestFailing:
    """A candidate that cannot be run does not end a search, is told, and is tried again."""

    @pytest.fixture
    def failing(self, monkeypatch) -> set[int]:
        """Which calls of the scorer fail, counted from 0."""
        wanted, calls, whole = set[int](), itertools.count(), Scorer.score

        def score(scorer: Scorer, slim: torch.nn.Module) -> float:
            if next(calls) in wanted:
                raise torch.OutOfMemoryError("no memory for it\nand more")
            return whole(scorer, slim)

        monkeypatch.setattr(Scorer, "score", score)
        return wanted

    def test_one_is_skipped_and_tried_again(self, command, known_detector, tmp_path, failing):
        failing |= {1}
        words = words_for(*known_detector, tmp_path / "s", target_macs=0.8, criterion="l2")
        outcome = command(*words)
        assert outcome.code == 0
        assert "candidate 1 (2 scored): failed: no memory for it" in outcome.out
        assert "1 of them failed" in outcome.out
        failed = numbered(tmp_path / "s")[1]
        assert (failed["score"], failed["failure"]) == (0.0, "no memory for it")
        assert command(*words).code == 0
        lines = read_lines(tmp_path / "s" / "candidates.jsonl")
        assert [line["number"] for line in lines] == [0, 1, 2, 1]
        assert lines[-1]["score"] > 0.0
        assert "failure" not in lines[-1]

    def test_a_score_that_is_no_number_is_a_failure(self, command, known_detector, tmp_path, monkeypatch):
        scores = iter([0.1, math.nan, 0.2])
        monkeypatch.setattr(Scorer, "score", lambda *_: next(scores))
        assert command(*words_for(*known_detector, tmp_path / "s", criterion="l2")).code == 0
        assert [line.get("failure") for line in numbered(tmp_path / "s")] == [None, "mAP50-95 nan", None]
        assert json.loads((tmp_path / "s" / "best.json").read_text())["choice"]["score"] == 0.2

    @pytest.mark.parametrize(("candidates", "tried"), [(8, 3), (2, 2)])
    def test_without_one_that_runs_there_is_no_winner(
        self, command, known_detector, tmp_path, failing, candidates, tried
    ):
        failing |= set(range(8))
        outcome = command(*words_for(*known_detector, tmp_path / "s", criterion="l2", candidates=candidates))
        assert outcome.code == 1
        assert f"all candidates failed, {tried} so far: no memory for it" in outcome.err
        assert not (tmp_path / "s" / "best.json").exists()

    def test_a_curve_needs_every_score(self, command, known_detector, tmp_path, failing):
        failing |= {1}
        words = words_for(*known_detector, tmp_path / "c", verb="cliff", points=2, halvings=0, criterion="l2")
        outcome = command(*words)
        assert outcome.code == 1
        assert "candidate 1 failed: no memory for it" in outcome.err
        assert command(*words).code == 0


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


class TestScoresOfChannels:
    """`importance.npy` belongs to the settings beside it."""

    def begun(self, command: Any, model: Path, data: Path, folder: Path) -> bytes:
        assert command(*words_for(model, data, folder, candidates=1, criterion="l1")).code == 0
        return (folder / "importance.npy").read_bytes()

    @pytest.mark.slow
    def test_another_process_with_other_settings_leaves_them_alone(
        self, command, dense_checkpoint, tiny_data, tmp_path, monkeypatch
    ):
        """It looked at the folder before the first process began it."""
        folder = tmp_path / "s"
        words = words_for(dense_checkpoint, tiny_data, folder, candidates=1, criterion="fpgm")
        real, kept = search_module._searched, list[bytes]()

        def meanwhile(*args: Any) -> Any:
            monkeypatch.setattr(search_module, "_searched", real)
            kept.append(self.begun(command, dense_checkpoint, tiny_data, folder))
            return real(*args)

        monkeypatch.setattr(search_module, "_searched", meanwhile)
        refused = command(*words)
        assert refused.code == 2
        assert "meanwhile" in refused.err
        assert (folder / "importance.npy").read_bytes() == kept[0]

    @pytest.mark.slow
    def test_a_kill_before_the_first_line_leaves_a_folder_that_goes_on(
        self, command, dense_checkpoint, tiny_data, tmp_path
    ):
        folder = tmp_path / "s"
        scores = self.begun(command, dense_checkpoint, tiny_data, folder)
        (folder / "candidates.jsonl").unlink()
        assert self.begun(command, dense_checkpoint, tiny_data, folder) == scores


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
        f"out={tmp_path / 'slim.pt'}", f"json={tmp_path / 'slim.json'}", "criterion=l1",
    )  # fmt: skip
    assert pruned.code == 0
    refused = command(
        "prune", f"model={dense_checkpoint}", f"sensitivity={tmp_path / 's' / 'sensitivity.json'}", "target_macs=0.6",
        f"out={tmp_path / 'other.pt'}",
    )  # fmt: skip
    assert refused.code == 2
    assert "criterion=l2, but the sensitivity was measured with l1" in refused.err
    plan = json.loads((tmp_path / "slim.json").read_text())["plan"]
    assert plan["choice"]["allocation"] == "sensitivity"
    assert plan["choice"]["sensitivity_sha256"] == sha256(tmp_path / "s" / "sensitivity.json")
    assert 0.57 <= plan["after"]["macs"] / plan["before"]["macs"] <= 0.6


class TestLatencyWithoutItsProfile:
    def test_is_refused(self, refused, dense_checkpoint, data, profile_of):
        words = [one for one in words_for(dense_checkpoint, data, Path("s")) if not one.startswith("target_macs=")]
        assert "0 targets given" in refused(*words)
        assert "target_latency=0.5 without profile=" in refused(*words, "target_latency=0.5")
        _, path = profile_of(dense_checkpoint, imgsz_px=320)
        assert "320, at which the profile was measured" in refused(*words, "target_latency=0.5", f"profile={path}")


class TestBadInput:
    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("target_macs=1.5", "target_macs=1.5"),
            ("target_macs=0.001", "cannot be reached"),
            ("target_latency=0.5", "2 targets given"),
            ("profile=nowhere.json", "cannot read profile 'nowhere.json'"),
            ("criterion=magic", "unknown criterion 'magic'"),
            ("candidates=0", "candidates=0"),
            ("held_out=1", "held_out=1"),
            ("strategy=clever", "unknown strategy 'clever'"),
            ("threads=0", "threads=0"),
            ("device=gpu", "device=gpu"),
            ("device=0", "device=0"),
            ("largest=1", "largest ratio 1"),
            ("attention=none_at_all", "unknown attention"),
            ("imgsz=65", "imgsz=65"),
            ("data=nowhere.yaml", "nowhere.yaml"),
        ],
    )
    def test_is_refused_and_nothing_is_left(self, refused, dense_checkpoint, data, word, said):
        key = word.partition("=")[0]
        words = [one for one in words_for(dense_checkpoint, data, Path("s")) if not one.startswith(f"{key}=")]
        assert said in refused(*words, word)

    def test_no_training_images(self, refused, dense_checkpoint, desk):
        (desk / "nothing").mkdir()
        yaml = write_yaml(desk / "none.yaml", {"train": "nothing", "val": "nothing", "names": ["a", "b", "c", "d"]})
        assert "which has no image" in refused(*words_for(dense_checkpoint, yaml, Path("s")))

    @pytest.mark.parametrize(
        ("verb", "word", "said"),
        [
            ("cliff", "points=0", "points=0"),
            ("cliff", "halvings=-1", "halvings=-1"),
            ("cliff", "lowest=1", "lowest=1"),
            ("cliff", "allocation=ratios", "unknown allocation"),
            ("sensitivity", "fractions=[]", "fractions=[]"),
            ("sensitivity", "fractions=[0.5,1.0]", "fractions=[0.5, 1.0]"),
        ],
    )
    def test_of_the_others_too(self, refused, dense_checkpoint, data, verb, word, said):
        assert said in refused(*words_for(dense_checkpoint, data, Path("s"), verb=verb), word)
