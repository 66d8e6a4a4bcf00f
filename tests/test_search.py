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
from searches import numbered, require_a_winner, words_for

import yolo_prune.pipeline.search as search_module
from yolo_prune.allocation import Budget, Constraints, WidthSolver
from yolo_prune.allocation.budget import lowest_go
from yolo_prune.allocation.latency import LatencyModel, fit_latency
from yolo_prune.device.machine import Machine
from yolo_prune.errors import DataError
from yolo_prune.export.profile import Profile
from yolo_prune.files import read_lines
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.collection import TrainingImages
from yolo_prune.hosts.ultralytics.scoring import Scorer
from yolo_prune.hosts.ultralytics.surgery import slim_copy, trace_model
from yolo_prune.importance import Evidence, score_channels
from yolo_prune.importance.plugged import CRITERIA
from yolo_prune.pipeline.profile import drawn
from yolo_prune.search.sampling import Sampler


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
        loaders = scorer._scoring, scorer._recalibration
        scored, used = ({file for batch in loader for file in batch["im_file"]} for loader in loaders)
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
