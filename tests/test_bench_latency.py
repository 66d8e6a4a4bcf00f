"""Latency targets beside what a fresh process measured: the table by hand, and cells from profile to line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_latency
import pytest
from bench_latency import MATCHED, Cell, Laboratory, LatencyConfig, LatencyFigures, bench

from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.errors import InfeasibleTargetError
from yolo_prune.export.profile import Timed
from yolo_prune.files import read_lines, sha256
from yolo_prune.hosts.slim import MARKER
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint

CELL = Cell(
    model="m", data="d", backend="ncnn", imgsz_px=320, threads=2, target=0.5, allocation="uniform", criterion="l2",
    epochs=0, seed=0, candidates=40, runs=100, batch=16,
)  # fmt: skip


def line(ratio: float, **more: Any) -> dict[str, Any]:
    fresh = {"ratio": ratio, "p25": ratio - 0.01, "p75": ratio + 0.01}
    same = {"by_latency": {"ratio": ratio}, "by_macs": {"ratio": ratio + 0.01, "matched": True}}
    figures = {"predicted": 0.5, "confirmed": 0.49, "fresh": fresh, "macs_kept": 0.4, **same}
    return {"cell": dataclasses.asdict(CELL), **figures, **more}


def test_the_table_by_hand():
    """.51 where .5 was asked for is 2% more."""
    row = LatencyFigures(records=[line(0.51)]).table().splitlines()[2]
    for cell in ("ncnn, 320 px, 2 threads", "0.510 (0.500..0.520)", "+2.0%", "40.0%", "not tuned, at 0.520"):
        assert cell in row


def test_what_was_fine_tuned_is_shown_with_how_fast_it_is():
    tuned = {"by_latency": {"map50_95": 0.5, "ratio": 0.51}, "by_macs": {"map50_95": 0.4, "ratio": 0.52}}
    row = LatencyFigures(records=[line(0.51, **tuned)]).table().splitlines()[2]
    assert "0.500 at 0.510" in row
    assert "0.400 at 0.520" in row
    assert "matched" not in row
    tuned["by_macs"] |= {"ratio": 0.56, "matched": False}
    assert "0.400 at 0.560, not matched" in LatencyFigures(records=[line(0.51, **tuned)]).table()


def test_seeds_of_a_fine_tune_share_a_row() -> None:
    """The mean of .5 and .6, and of .4 and .5, with what they lie between."""
    found = []
    for seed, value in enumerate((0.5, 0.6)):
        tuned = {"by_latency": {"map50_95": value, "ratio": 0.51}, "by_macs": {"map50_95": value - 0.1, "ratio": 0.52}}
        found.append(line(0.51, cell=dataclasses.asdict(dataclasses.replace(CELL, seed=seed, epochs=6)), **tuned))
    (row,) = LatencyFigures(records=found).table().splitlines()[2:]
    for cell in ("0 1", "0.550 (0.500..0.600) at 0.510", "0.450 (0.400..0.500) at 0.520"):
        assert cell in row


def test_what_cannot_be_is_a_row_and_says_why():
    failed = {"cell": dataclasses.asdict(CELL), "failed": "target_latency=0.5 cannot be reached"}
    for markdown in (False, True):
        text = LatencyFigures(records=[failed, line(0.51)]).table(markdown=markdown)
        row = next(one for one in text.splitlines() if "cannot be" in one)
        assert "ncnn, 320 px, 2 threads" in row
        assert text.endswith("batch=16: target_latency=0.5 cannot be reached\n")
    assert text.splitlines()[-2] == ""  # or it would be a row of the Markdown table


def share(model: Path) -> float:
    """The fraction of the MACs that a slim checkpoint keeps."""
    marker = getattr(read_checkpoint(model).model, MARKER)
    return marker["after"]["macs"] / marker["before"]["macs"]


class Clock:
    """Latencies by a formula, a little longer with every call, instead of an export and a clock for each network."""

    def __init__(self) -> None:
        self.calls = 0
        self.stop_at: int | None = None
        self.again = 1.0
        self.wanted: float | None = None

    def ratio(self, macs: float) -> float:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return 0.2 + 0.8 * macs + 0.0001 * self.calls

    def fresh(self, slim: Path, base: Path) -> dict[str, float]:
        ratio = self.ratio(share(slim))
        if base.suffix == ".pt":  # a slim model, beside which the candidates are timed
            ratio /= self.wanted or 0.2 + 0.8 * share(base)
        if slim.with_name(f"{slim.stem}.json").exists():  # the one that was picked
            ratio *= self.again
        return {"ratio": ratio, "p25": ratio, "p75": ratio, "slim_ms": 10 * ratio, "dense_ms": 10.0}

    @contextlib.contextmanager
    def beside(self, _source: Any, graph: ChannelGraph, target: Any, **_: Any) -> Iterator[Any]:
        clock = self

        class Beside:
            def time(self, keep: BoolArray) -> Timed:
                widths = (graph.kept_widths(keep), graph.widths())
                kept, whole = (float(graph.cost.macs(one, imgsz_px=target.imgsz_px)) for one in widths)
                ratio = clock.ratio(kept / whole)
                return Timed(ratio=ratio, p25=ratio, p75=ratio, slim_ms=10 * ratio, dense_ms=10.0)

        yield Beside()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("yolo_prune.pipeline.profile.timing_beside", found.beside)
    monkeypatch.setattr("yolo_prune.pipeline.prune.timing_beside", found.beside)
    monkeypatch.setattr(Laboratory, "_fresh", lambda _laboratory, slim, base: found.fresh(slim, base))
    return found


@pytest.fixture
def config(tmp_path, dense_checkpoint, tiny_data) -> LatencyConfig:
    return LatencyConfig(
        model=str(dense_checkpoint), data=str(tiny_data), out=str(tmp_path / "out"), backends=["onnxruntime"],
        imgsz=[64], targets=[0.7], allocation="uniform", criterion="l2", threads=1, candidates=24, batch=4, workers=0,
        record=str(tmp_path / "latency.jsonl"),
    )  # fmt: skip


def laboratory(config: LatencyConfig, **values: Any) -> Laboratory:
    cell = {"model": sha256(Path(config.model))[:12], "data": Path(config.data).parent.name, "backend": "onnxruntime"}
    kept = {"allocation", "criterion", "threads", "candidates", "epochs", "seed", "runs", "batch"}
    cell |= {name: getattr(config, name) for name in kept}
    return Laboratory(config, Cell(**{**cell, "imgsz_px": 64, "target": 0.7, **values}))


@pytest.mark.usefixtures("clock")
class TestCells:
    def test_one_is_measured_once_and_one_that_cannot_be_is_told(self, config):
        config.targets = [0.01, 0.7]
        failed, found = bench(config).records
        assert "target_latency=0.01 cannot be reached" in failed["failed"]
        assert failed["cell"]["target"] == 0.01
        assert found["confirmed"] == pytest.approx(0.7, rel=0.05)
        slim = next(Path(config.out).rglob("by_latency.pt"))
        assert found["macs_kept"] == share(slim)
        assert found["fresh"]["ratio"] == pytest.approx(0.2 + 0.8 * share(slim), abs=0.02)
        assert found["machine"]["cores"] > 0
        before = Path(config.record).read_bytes()
        assert bench(config).records == [failed, found]
        assert Path(config.record).read_bytes() == before

    def test_whatever_changes_the_result_is_another_cell(self, config):
        others = {"target": 0.6, "allocation": "global", "criterion": "l1", "batch": 8}
        others |= {"candidates": 30, "runs": 7, "data": "else"}
        folders = {laboratory(config, **{name: value}).folder for name, value in others.items()}
        assert len({laboratory(config).folder, *folders}) == len(others) + 1
        for name, value in {"epochs": 3, "seed": 1}.items():  # these start from the same cuts
            other = laboratory(config, **{name: value})
            assert other.folder == laboratory(config).folder
            assert other.tunes != laboratory(config).tunes

    @pytest.mark.slow
    @pytest.mark.parametrize("again", [1.0, 1.1])
    def test_a_killed_one_goes_on_where_it_was(self, config, clock, again, monkeypatch):
        """Stopped in the second timing of the way to a MACs target."""
        cuts: list[str] = []
        monkeypatch.setattr(bench_latency, "prune", _noting(bench_latency.prune, cuts))
        config.epochs, clock.again = 1, again
        work = laboratory(config, epochs=1)
        work._pruned("by_latency", target_latency=0.7, profile=str(_profiled(work)))
        clock.stop_at = clock.calls + 3  # by_latency, by_macs0, by_macs1
        with pytest.raises(KeyboardInterrupt):
            bench(config)
        assert read_lines(Path(config.record)) == []
        kept = {path: sha256(path) for path in work.folder.rglob("*") if path.is_file()}
        assert work.folder / "by_macs0.json" in kept

        clock.stop_at = None
        (found,) = bench(config).records
        assert {path: sha256(path) for path in kept} == kept
        files = sorted(path.stem for path in work.folder.glob("*.pt"))
        assert sorted(cuts) == files
        assert "by_macs1" in files
        timed = {path.stem: json.loads(path.read_text())["ratio"] for path in work.folder.glob("*.json")}
        (nearest,) = set(timed) - set(files)
        assert nearest.removesuffix("_again") in set(files) - {"by_latency"}
        assert len(set(timed.values())) == len(timed)

        ratio = found["by_latency"]["ratio"]
        assert ratio == found["fresh"]["ratio"] == timed["by_latency"]
        assert found["by_macs"]["ratio"] == timed[nearest] * ratio  # not that for which it was picked
        assert found["by_macs"]["matched"] == (again == 1.0)
        assert (abs(found["by_macs"]["ratio"] / ratio - 1.0) <= MATCHED) == (again == 1.0)
        assert all(0.0 <= found[name]["map50_95"] <= 1.0 for name in ("by_latency", "by_macs"))

    def test_what_was_timed_is_not_timed_again_for_its_fine_tune(self, config, clock, monkeypatch):
        """All cells can be timed on a quiet machine, and tuned on one that is not."""
        monkeypatch.setattr(Laboratory, "_tuned", lambda _, slim: 0.5 if slim.stem == "by_latency" else 0.4)
        (timed,) = bench(config).records
        assert "map50_95" not in timed["by_macs"]
        calls, config.epochs = clock.calls, 1
        _, tuned = bench(config).records
        assert clock.calls == calls
        for name, value in {"by_latency": 0.5, "by_macs": 0.4}.items():
            assert tuned[name] == {**timed[name], "map50_95": value}

    def test_a_macs_target_below_the_floors_is_not_the_end(self, config, clock):
        """Nothing is as fast as was asked for, so the nearest is told; widths of 64 leave most of the MACs."""
        work, clock.wanted = laboratory(config), 0.21
        wanted = Path(config.model)
        nearest, _ = work._as_fast(wanted, 64)
        cut = {path.stem: share(path) for path in work.folder.glob("*.pt")}
        assert 1 < len(cut) < bench_latency.TRIES
        assert cut[nearest.stem] == min(cut.values())
        with pytest.raises(InfeasibleTargetError, match="target_macs"):
            laboratory(config, runs=7)._as_fast(wanted, 1024)


def _noting(prune: Any, cuts: list[str]) -> Any:
    def noted(asked: Any) -> Any:
        result = prune(asked)
        cuts.append(Path(asked.out).stem)
        return result

    return noted


def _profiled(work: Laboratory) -> Path:
    """Profile as the cell will, so that the calls of the clock which follow are its own."""
    cell, out = work.cell, work.shared / f"profile-{work.cell.candidates}"
    return bench_latency.profile(
        bench_latency.ProfileConfig(
            model=work.config.model, out=str(out), backend=cell.backend, imgsz=cell.imgsz_px, threads=cell.threads,
            candidates=cell.candidates,
        )
    ).path  # fmt: skip


@pytest.mark.slow
def test_a_fresh_process_times_slim_beside_dense_which_is_exported_once(config, slim_checkpoint, monkeypatch):
    exported: list[str] = []
    export = bench_latency.export_one
    monkeypatch.setattr(
        bench_latency, "export_one", lambda model, *rest: exported.append(model.stem) or export(model, *rest)
    )
    for target in (0.7, 0.8):  # cells share the dense one
        work = laboratory(config, target=target, runs=3)
        found = work._fresh(slim_checkpoint, work._dense())
        assert 0.0 < found["p25"] <= found["ratio"] <= found["p75"]
    assert exported == ["dense", "slim", "slim"]
    work._fresh(slim_checkpoint, Path(config.model))  # a candidate is timed beside a checkpoint
    assert exported[3:] == ["slim", "dense"]
