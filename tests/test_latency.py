"""Latency: a fit that finds back what made the timings, and targets that are promised only when they were confirmed."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import lively
from toys import build

from yolo_prune.allocation import Allocation, Budget, Constraints, allocate
from yolo_prune.allocation.budget import lowest_go
from yolo_prune.allocation.latency import Features, LatencyFit, LatencyModel, fit_latency, structure_of
from yolo_prune.channels import BoolArray, ChannelGraph, trace
from yolo_prune.device.machine import Machine
from yolo_prune.device.tensorrt_library import is_installed
from yolo_prune.errors import ConfigError, InfeasibleTargetError
from yolo_prune.export.profile import Profile, Target, Timed
from yolo_prune.files import read_lines
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.pipeline.latency import TRIES, keep_for_latency
from yolo_prune.pipeline.profile import PROBES, drawn
from yolo_prune.pipeline.timing import this_machine, timing_beside


@functools.cache
def network(name: str = "yolov8n") -> ChannelGraph:
    return trace_model(lively(name))


@functools.cache
def candidates(count: int = 40) -> np.ndarray:
    return np.array([drawn(network(), seed=0, number=number)[0] for number in range(count)])


def made_up(multiple: int, kept: np.ndarray) -> np.ndarray:
    """Latencies of a device that pads: a fifth is constant, the rest goes with MACs."""
    features = Features(network())
    return 0.2 + 0.8 * features(kept, multiple) @ features.macs_share


class TestFeatures:
    def test_by_hand(self):
        """Chain: 3x3 of 3 to 4, 1x1 of 4 to 6, 1x1 of 6 to 2: 64 * (108, 24, 12) MACs; kinds are 3x3 and 1x1."""
        graph = trace(build("Chain"), torch.zeros(1, 3, 8, 8))
        features = Features(graph)
        np.testing.assert_allclose(features.macs_share, [0.0, 108 / 144, 0.0, 36 / 144, 0.0])
        kept = graph.widths()
        kept[[graph.group_names()["a"], graph.group_names()["b"]]] = 2, 3
        # 3x3: 3 * 2 of 3 * 4 MACs, 3 + 2 of 3 + 4 channels; 1x1: 2 * 3 + 3 * 2 of 24 + 12, 2 + 3 + 3 + 2 of 18
        np.testing.assert_allclose(features(kept, 1), [1.0, 6 / 12, 5 / 7, 12 / 36, 10 / 18])
        # padded to fours: 4 * 4 of 4 * 4; 4 * 4 + 4 * 4 of 4 * 8 + 8 * 4; 16 of 24 channels
        np.testing.assert_allclose(features(kept, 4), [1.0, 1.0, 1.0, 32 / 64, 16 / 24])

    def test_the_dense_network_is_one_and_many_are_many(self):
        features = Features(network())
        np.testing.assert_allclose(features(network().widths(), 8), 1.0)
        np.testing.assert_allclose(features(candidates(), 8), [features(one, 8) for one in candidates()])


class TestFit:
    @pytest.mark.parametrize("multiple", [1, 8, 32])
    def test_finds_back_what_made_the_timings(self, multiple):
        fit = fit_latency(network(), candidates(), made_up(multiple, candidates()))
        assert fit.multiple == multiple
        assert fit.worst < 0.05
        assert LatencyModel(network(), fit).predict(network().widths()) == pytest.approx(1.0, abs=1e-4)
        unseen = np.array([drawn(network(), seed=1, number=number)[0] for number in range(20)])
        found = LatencyModel(network(), fit).predict(unseen)
        np.testing.assert_allclose(found, made_up(multiple, unseen), rtol=0.05)

    def test_a_narrower_network_is_never_predicted_slower(self):
        noise = np.random.default_rng(0).normal(1.0, 0.05, size=len(candidates()))
        model = LatencyModel(network(), fit_latency(network(), candidates(), made_up(8, candidates()) * noise))
        for kept in candidates()[:10]:
            assert model.predict(np.maximum(kept // 2, 1)) <= model.predict(kept) + 1e-12

    def test_round_trip(self):
        fit = fit_latency(network(), candidates(), made_up(8, candidates()))
        assert LatencyFit.from_json(json.loads(json.dumps(fit.to_json()))) == fit

    def test_bad_input(self):
        with pytest.raises(ConfigError, match="7 timed candidates"):
            fit_latency(network(), candidates()[:7], np.ones(7))
        with pytest.raises(ConfigError, match="not above 0"):
            fit_latency(network(), candidates(), np.zeros(40))
        fit = fit_latency(network(), candidates(), made_up(8, candidates()))
        with pytest.raises(ConfigError, match="profile is of another network"):
            LatencyModel(network("yolo11n"), fit)


def test_candidates_are_a_function_of_their_number_and_spread():
    macs = network().cost.macs(candidates()) / network().cost.macs(network().widths())
    assert (drawn(network(), seed=0, number=7)[0] == candidates()[7]).all()
    widths, multiple = drawn(network(), seed=0, number=7, multiple=16)
    assert multiple == 16
    assert ((widths % 16 == 0) | (widths == network().widths())).all()
    assert macs.min() < 0.2
    assert macs.max() > 0.7


class Device:
    """Times networks by a formula that the profile does not know: `off` times what it predicts."""

    def __init__(self, off: float, model: LatencyModel) -> None:
        self.off, self.model, self.count = off, model, 0

    def time(self, keep: BoolArray) -> Timed:
        self.count += 1
        ratio = self.off * float(self.model.predict(network().kept_widths(keep)))
        return Timed(ratio=ratio, p25=ratio, p75=ratio, slim_ms=10 * ratio, dense_ms=10.0)


@pytest.fixture
def profile() -> Profile:
    machine = Machine(cpu="a", cores=2, system="b", python="3", runtimes={"ncnn": "1"})
    fit = fit_latency(network(), candidates(), made_up(8, candidates()))
    return Profile(machine=machine, backend="ncnn", imgsz_px=320, threads=2, candidates=40, dense_ms=10.0, fit=fit)


def pruned(profile: Profile, device: Device | None, target: float) -> tuple[BoolArray, Any]:
    scores = np.random.default_rng(0).random(network().channel_count)

    @contextlib.contextmanager
    def timing(*_: Any) -> Iterator[Device]:
        yield device

    return keep_for_latency(
        None, network(), scores, Allocation(path="uniform"), target=target, profile=profile,
        timing=timing if device else None,
    )  # fmt: skip


class TestTarget:
    def test_a_prediction_that_is_off_is_aimed_anew(self, profile):
        device = Device(1.15, LatencyModel(network(), profile.fit))
        keep, outcome = pruned(profile, device, 0.6)
        assert outcome.timed.ratio == pytest.approx(0.6, rel=0.05)
        assert outcome.predicted == pytest.approx(outcome.timed.ratio / 1.15)
        assert 2 < device.count <= TRIES + 1
        network().check_keep(keep)

    def test_what_was_not_confirmed_is_not_promised(self, profile):
        device = Device(3.0, LatencyModel(network(), profile.fit))
        with pytest.raises(InfeasibleTargetError, match="was not confirmed: the nearest of"):
            pruned(profile, device, 0.5)

    def test_a_lucky_timing_is_no_confirmation(self, profile):
        """Of several timings the nearest to the target is picked, so it takes another one to confirm it."""

        class Lucky(Device):
            def time(self, keep: BoolArray) -> Timed:
                found = super().time(keep)
                return replace(found, ratio=0.6) if self.count == 1 else found

        device = Lucky(1.3, LatencyModel(network(), profile.fit))
        with pytest.raises(InfeasibleTargetError, match="was not confirmed"):
            pruned(profile, device, 0.6)
        assert device.count == 2

    def test_what_the_floors_do_not_allow_is_refused_with_the_best_reachable(self, profile):
        with pytest.raises(InfeasibleTargetError, match=r"target_latency=0.05 cannot be reached") as error:
            pruned(profile, None, 0.05)
        reachable = float(error.value.expected.split()[2].rstrip(","))
        keep, outcome = pruned(profile, None, reachable)
        assert outcome.predicted <= reachable
        assert outcome.timed is None
        assert "NOT confirmed" in outcome.in_words()
        network().check_keep(keep)

    def test_the_best_reachable_is_timed_where_it_can_be(self, profile):
        device = Device(1.1, LatencyModel(network(), profile.fit))
        with pytest.raises(InfeasibleTargetError, match=r"target_latency=0.05 cannot be reached") as error:
            pruned(profile, device, 0.05)
        assert device.count == 1
        measured, predicted = (float(word.rstrip(",")) for word in re.findall(r"0\.\d{3},?", str(error.value))[:2])
        assert measured == pytest.approx(1.1 * predicted, abs=2e-3)
        assert error.value.expected.startswith(f"at least {measured:.3f},")

    def test_what_the_profile_thinks_impossible_is_tried(self, profile):
        """The device is twice as fast as the profile predicts."""
        device = Device(0.5, LatencyModel(network(), profile.fit))
        with pytest.raises(InfeasibleTargetError) as error:
            pruned(profile, None, 0.05)
        least = float(error.value.expected.split()[2].rstrip(","))
        _, outcome = pruned(profile, device, 0.8 * least)
        assert outcome.timed.ratio == pytest.approx(0.8 * least, rel=0.05)

    def test_as_a_budget_it_is_met(self, profile):
        model = LatencyModel(network(), profile.fit)
        scores = np.random.default_rng(0).random(network().channel_count)
        for path in ("global", "uniform"):
            budget = Budget(unit="latency", ratio=0.6, latency=model)
            keep = allocate(network(), scores, budget, Allocation(path=path, constraints=Constraints(round_to=8)))
            assert 0.57 <= float(model.predict(network().kept_widths(keep))) <= 0.6


def written(profile: Profile, path: Path, **change: Any) -> Path:
    path.write_text(json.dumps(replace(profile, **change).to_json()))
    return path


class TestAsFlags:
    @pytest.fixture
    def known(self, profile, dense_checkpoint) -> Profile:
        """A profile of the small detector, on this machine."""
        structure = structure_of(trace_model(read_checkpoint(dense_checkpoint).model))
        return replace(profile, fit=replace(profile.fit, structure=structure), machine=this_machine("ncnn"))

    def test_unconfirmed_it_says_so(self, command, dense, desk, known):
        path = written(known, desk / "p.json")
        words = [
            "prune",
            f"model={dense}",
            "out=s.pt",
            "target_latency=0.6",
            f"profile={path}",
            "confirm=false",
            "imgsz=320",
        ]
        outcome = command(*words, "json=s.json")
        assert outcome.code == 0
        assert "NOT confirmed" in outcome.out
        choice = json.loads((desk / "s.json").read_text())["plan"]["choice"]
        assert choice["timed"] is None
        assert choice["predicted"] <= 0.6
        assert choice["round_to"] == known.fit.multiple
        assert choice["machine"] == asdict(known.machine)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["target_latency=0.6"], "target_latency=0.6 without profile="),
            (["target_latency=0.6", "profile=none.json"], "cannot read profile 'none.json'"),
            (["target_latency=0.6", "profile=p.json", "target_macs=0.5"], "2 targets given"),
            (["target_latency=0.6", "profile=p.json"], "320, at which the profile was measured"),
            (["target_latency=1.6", "profile=p.json"], "target_latency=1.6"),
            (["target_macs=0.6", "profile=p.json"], "without target_latency="),
            (["target_macs=0.6", "confirm=false"], "confirm=False without target_latency="),
            (["target_latency=0.6", "profile=other.json"], "cpu=another"),
            (["target_latency=0.6", "profile=network.json", "confirm=false"], "profile is of another network"),
            (["target_latency=0.6", "profile=backend.json"], "backend 'abacus', none of onnxruntime, ncnn"),
        ],
    )
    def test_bad_input(self, refused, dense, desk, known, words, said):
        written(known, desk / "p.json")
        written(known, desk / "other.json", machine=replace(known.machine, cpu="another"))
        written(known, desk / "backend.json", backend="abacus")
        written(known, desk / "network.json", fit=replace(known.fit, structure="0"))
        imgsz = [] if said.startswith("320") else ["imgsz=320"]
        assert said in refused("prune", f"model={dense}", "out=s.pt", *words, *imgsz)


class TestProfile:
    @pytest.fixture
    def device(self, monkeypatch) -> list[Target]:
        """A device on which widths count as padded to sixteens, instead of an export and a clock for each network.

        It keeps what it was asked to time.
        """
        targets: list[Target] = []

        class Padding:
            def __init__(self, graph: ChannelGraph) -> None:
                self.graph, self.features = graph, Features(graph)

            def time(self, keep: BoolArray) -> Timed:
                ratio = float(0.3 + 0.7 * self.features(self.graph.kept_widths(keep), 16) @ self.features.macs_share)
                return Timed(ratio=ratio, p25=ratio, p75=ratio, slim_ms=10 * ratio, dense_ms=10.0)

        @contextlib.contextmanager
        def timing(_source: Any, graph: ChannelGraph, target: Target, **_: Any) -> Iterator[Padding]:
            targets.append(target)
            yield Padding(graph)

        monkeypatch.setattr("yolo_prune.pipeline.profile.timing_beside", timing)
        monkeypatch.setattr("yolo_prune.pipeline.prune.timing_beside", timing)
        return targets

    def test_what_is_pruned_is_timed_as_the_profile_was(self, command, dense, device):
        words = ["profile", f"model={dense}", "out=p", "backend=openvino", "imgsz=64", "threads=1", "candidates=24"]
        outcome = command(*words, "half=true")
        assert outcome.code == 0, outcome.err
        assert "openvino, 64 px, 1 threads, fp16" in outcome.out
        slim = command("prune", f"model={dense}", "out=s.pt", "target_latency=0.7", "profile=p", "imgsz=64")
        assert slim.code == 0, slim.err
        assert "64 px, 1 threads, fp16: 0.69" in slim.out
        halved = Target(backend="openvino", imgsz_px=64, threads=1, precision="fp16")
        assert [Target(**{field.name: getattr(one, field.name) for field in fields(Target)}) for one in device] == [
            halved,
            halved,
        ]
        assert "precision=fp16" in command(*words).err  # another target is another folder

    @pytest.mark.skipif(is_installed(), reason="TensorRT is installed here")
    def test_engines_need_the_gpu_that_runs_them(self, refused, dense):
        told = refused("profile", f"model={dense}", "out=p", "backend=tensorrt", "half=true")
        assert "no engine can be built on this machine" in told
        assert "bundle" in told

    @pytest.mark.usefixtures("device")
    def test_is_measured_goes_on_and_serves(self, command, dense, desk):
        words = ["profile", f"model={dense}", "out=p", "backend=onnxruntime", "imgsz=64", "threads=1"]
        assert command(*words, "candidates=24").code == 0
        record = (desk / "p" / "timings.jsonl").read_bytes()
        outcome = command(*words, "candidates=30")
        assert outcome.code == 0
        assert (desk / "p" / "timings.jsonl").read_bytes().startswith(record)
        assert "multiples of 16" in outcome.out
        lines = read_lines(desk / "p" / "timings.jsonl")
        assert {line["multiple"] for line in lines[PROBES:]} == {16}
        assert Profile.load(desk / "p").candidates == 30
        slim = command(
            "prune", f"model={dense}", "out=s.pt", "target_latency=0.7", "profile=p", "imgsz=64", "json=s.json"
        )
        assert slim.code == 0, slim.err
        plan = json.loads((desk / "s.json").read_text())["plan"]
        assert plan["choice"]["round_to"] == 16
        assert plan["choice"]["timed"]["ratio"] == pytest.approx(0.7, rel=0.05)
        refused = command(*[word for word in words if not word.startswith("threads")])
        assert refused.code == 2
        assert "threads=1" in refused.err

    @pytest.mark.slow
    def test_a_network_is_exported_and_timed_beside_the_dense_one(self, dense):
        source = read_checkpoint(dense)
        graph = trace_model(source.model)
        widths, _ = drawn(graph, seed=0, number=0, multiple=8)
        keep = lowest_go(graph, np.zeros(graph.channel_count), widths)
        for backend, precision in (("onnxruntime", "fp32"), ("openvino", "fp16")):
            target = Target(backend=backend, imgsz_px=64, threads=1, precision=precision)
            with timing_beside(source, graph, target, runs=5) as beside:
                timed = beside.time(keep)
            assert timed.p25 <= timed.ratio <= timed.p75
            assert timed.slim_ms > 0
            assert timed.dense_ms > 0
        assert list(dense.parent.iterdir()) == [dense]

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("backend=abacus", "unknown backend 'abacus'"),
            ("candidates=23", "candidates=23"),
            ("threads=0", "threads=0"),
            ("imgsz=65", "imgsz=65"),
            ("seed=-1", "seed=-1"),
        ],
    )
    def test_bad_input(self, refused, dense, word, said):
        assert said in refused("profile", f"model={dense}", "out=p", word)
