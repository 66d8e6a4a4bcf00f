"""Reports of runs that lack parts: killed ones, older ones, those of other methods; and of damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pages import Html
from run_folders import (
    CANDIDATES,
    COSTS,
    EVALUATIONS,
    PREDICTED,
    SETTINGS,
    SPARSITY,
    SUMMARY,
    run_folder,
    write,
    write_lines,
)

from yolo_prune.report.plots import pareto

PLAN = {"groups": {"model.1.conv": {"width": 32, "keep": [0, 3, 5]}}, "before": COSTS["dense"], "after": COSTS["slim"]}


@pytest.fixture
def page(command):
    """Report on a run folder; return the page and what was printed."""

    def made(folder: Path, *words: str) -> tuple[Html, str]:
        outcome = command("report", f"run={folder}", *words)
        assert outcome.code == 0, outcome.err
        return Html((folder / "report.html").read_text(encoding="utf-8")), outcome.out

    return made


def sections(found: Html) -> set[str]:
    return {values["id"] for values in found.all("h2")}


class TestMissing:
    def test_everything_but_the_settings(self, page, tmp_path):
        write(tmp_path / "run.json", SETTINGS)
        found, printed = page(tmp_path)
        assert sections(found) == {"provenance"}
        assert "This run has pruned nothing yet." in found.text()
        for what in ("the slim model", "mAP of the slim model", "latencies", "widths", "pictures of detections"):
            assert f"the report lacks {what}" in printed
            assert what in found.text()

    def test_killed_after_evaluation(self, page, tmp_path):
        write(tmp_path / "run.json", SETTINGS)
        write(tmp_path / "stages" / "prune.json", {"plan": PLAN, "verification": {"max_abs_error": 2.5e-13}})
        for name in ("dense", "slim"):
            write(tmp_path / "stages" / f"evaluate_{name}.json", EVALUATIONS[name])
        write(tmp_path / "stages" / "export_slim_onnx.json", {"path": "-", "parity": SUMMARY["parity"]["slim_onnx"]})
        found, printed = page(tmp_path)
        assert sections(found) == {"models", "widths", "provenance"}
        assert "keeps 49.8% of the MACs" in printed
        assert "Its latency was not measured." in found.text()
        assert "faster" not in found.text().lower()
        assert "2.5e-13" in found.text()
        assert "slim.onnx" in found.text()
        assert "model.1.conv 32 3 9.4%" in found.text()

    def test_a_pruning_fine_tune_and_a_rewrite(self, page, tmp_path):
        """The first has another stage; the second makes the network that is pruned larger than the dense one."""
        write(tmp_path / "run.json", SETTINGS)
        grown = {"macs": 2 * COSTS["dense"]["macs"], "params": COSTS["dense"]["params"]}
        write(tmp_path / "stages" / "pruned.json", {"plan": {"before": grown, "after": COSTS["slim"]}})
        write(tmp_path / "stages" / "rewrite.json", {"before": COSTS["dense"], "after": grown})
        assert "keeps 49.8% of the MACs" in page(tmp_path)[1]

    @pytest.mark.parametrize(
        ("lost", "section"),
        [
            ("dense/sparsity.json", "sparsity"),
            ("stages/detections.json", "detections"),
            ("stages/widths.json", "widths"),
        ],
    )
    def test_a_part_has_no_section(self, page, tmp_path, lost, section):
        folder = run_folder(tmp_path / "run")
        before = sections(page(folder)[0])
        (folder / lost).unlink()
        assert before - sections(page(folder)[0]) == {section}

    def test_an_older_record(self, page, tmp_path):
        """Neither versions nor hashes, widths of layers, pictures, controls or what a machine is called."""
        folder = tmp_path / "run"
        known = ("model", "data", "imgsz", "seed", "train", "prune", "finetune", "splits", "formats")
        write(folder / "run.json", {key: SETTINGS[key] for key in known})
        late = ("version", "machine", "parity", "settings")
        write(folder / "summary.json", {key: value for key, value in SUMMARY.items() if key not in late})
        write(folder / "stages" / "prune.json", {"plan": PLAN})
        found, _ = page(folder)
        assert sections(found) == {"models", "latency", "widths", "provenance"}
        assert "yolo_prune not recorded" in found.text()
        assert "onnx 1.63x (1.46..1.79), faster" in found.text()


class TestSearch:
    def test_of_the_plan_that_was_applied_is_found(self, page, tmp_path):
        write_lines(tmp_path / "search" / "candidates.jsonl", CANDIDATES)
        folder = run_folder(tmp_path / "run", prune={"plan": str(tmp_path / "search" / "best.json")})
        found, _ = page(folder)
        assert "search" in sections(found)
        assert "4 candidates" in found.text()

    def test_latencies_that_a_profile_predicted_are_shown(self, page, tmp_path):
        folder = run_folder(tmp_path / "run", prune={"plan": str(tmp_path / "search" / "best.json")})
        write_lines(tmp_path / "search" / "candidates.jsonl", CANDIDATES)
        write(tmp_path / "search" / "latencies.json", PREDICTED)
        found, _ = page(folder)
        assert "ncnn, 320 px, 2 threads, a processor" in found.text()
        assert "53.0%" in found.text()
        assert "Candidates of the search, by latency" in found.text()

    def test_that_was_moved_away_is_no_error(self, page, tmp_path):
        folder = run_folder(tmp_path / "run", prune={"plan": str(tmp_path / "search" / "best.json")})
        assert "search" not in sections(page(folder)[0])

    def test_pareto_front_by_hand(self):
        points = [(1.0, 0.2), (2.0, 0.1), (2.0, 0.5), (3.0, 0.5), (4.0, 0.6), (1.0, 0.2)]
        assert pareto(points) == [(1.0, 0.2), (2.0, 0.5), (4.0, 0.6)]
        assert pareto([]) == []


def torn(text: str) -> str:
    return text[: len(text) // 2]


class TestRefused:
    def test_a_folder_without_a_run(self, command, tmp_path):
        refused = command("report", f"run={tmp_path}")
        assert refused.code == 2
        assert "holds no run" in refused.err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "name", ["run.json", "summary.json", "stages/widths.json", "stages/detections.json", "dense/sparsity.json"]
    )
    @pytest.mark.parametrize("damage", [torn, lambda _: "[1, 2]", lambda _: '"text"', lambda _: "\x00"])
    def test_a_damaged_record(self, command, tmp_path, name, damage):
        folder = run_folder(tmp_path / "run")
        path = folder / name
        path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
        refused = command("report", f"run={folder}")
        assert refused.code == 2
        assert str(path) in refused.err
        assert not (folder / "report.html").exists()

    @pytest.mark.parametrize(
        ("part", "value"),
        [
            ("costs", {"slim": {"macs": "many", "params": 1}}),
            ("evaluations", {"slim": {"val": {"map50": 0.5}}}),
            ("latency_ms", {"slim_onnx": {"median_ms": None}}),
            ("speed_up", {"onnx": {"ratio": 1.5}}),
            ("parity", {"slim_onnx": {"max_rel": "small"}}),
            ("verification", {"max_abs_error": "none"}),
            ("machine", "this one"),
        ],
    )
    def test_a_summary_with_a_part_that_no_run_writes(self, command, tmp_path, part, value):
        folder = run_folder(tmp_path / "run")
        write(folder / "summary.json", {**SUMMARY, part: value})
        refused = command("report", f"run={folder}")
        assert refused.code == 2
        assert "summary.json" in refused.err
        assert "Traceback" not in refused.err

    def test_a_sparsity_record_without_epochs(self, page, tmp_path):
        folder = run_folder(tmp_path / "run")
        write(folder / "dense" / "sparsity.json", {**SPARSITY, "epochs": []})
        assert "sparsity" not in sections(page(folder)[0])

    @pytest.mark.parametrize("word", ["search=absent", "correlation=absent.jsonl"])
    def test_what_is_named_and_not_there(self, command, tmp_path, word):
        refused = command("report", f"run={run_folder(tmp_path / 'run')}", word)
        assert refused.code == 2
        assert "absent" in refused.err

    def test_a_search_record_of_something_else(self, command, tmp_path):
        path = tmp_path / "search" / "candidates.jsonl"
        write_lines(path, [{"number": 1}])
        refused = command("report", f"run={run_folder(tmp_path / 'run')}", f"search={path.parent}")
        assert refused.code == 2
        assert str(path) in refused.err


def test_not_a_number_is_shown_as_such(page, tmp_path):
    """A training that diverged has mAP, but its figures may be anything that JSON of Python can hold."""
    folder = run_folder(tmp_path / "run")
    text = json.dumps(SUMMARY).replace(str(EVALUATIONS["slim"]["val"]["map50_95"]), "NaN")
    (folder / "summary.json").write_text(text, encoding="utf-8")
    assert ("nan", "nan") in page(folder)[0].figures
