"""Reports of runs that lack parts: killed ones, older ones, those of other methods; and of damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pages import Html
from run_folders import (
    BY_METHOD,
    CANDIDATES,
    COSTS,
    EVALUATIONS,
    PREDICTED,
    SETTINGS,
    SPARSITY,
    SUMMARY,
    TUNED,
    run_folder,
    write,
    write_lines,
)

from yolo_prune.hosts.ultralytics.records import FILES
from yolo_prune.pipeline.training_methods import METHODS
from yolo_prune.report.methods import TOLD
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


class TestMethods:
    """What training did beside training, from the records that it leaves."""

    def test_every_method_is_told_of(self):
        others = [method for method in METHODS if method != "sparsity"]  # which has a section of its own
        assert {method: told.record for method, told in TOLD.items()} == {name: FILES[name][0] for name in others}

    @pytest.mark.parametrize(
        ("method", "told"),
        [
            ("pruning", ["criterion taylor, allocation uniform", "step 1, after epoch 2 81.3% of the MACs",
                         "step 2, after epoch 4 48.7% of the MACs, 17,000 parameters"]),
            ("resrep", ["target 60.0% of the MACs", "0.00123, 0.99", "0.0% after epoch 1, 34.5% after epoch 3",
                        "100.0% after epoch 1, 59.9% after epoch 3", "3.2e-13"]),
            ("stripes", ["21,000 of 45,000", "81.2% after epoch 1, 59.9% after epoch 2", "0.000321",
                         "MACs of an export 49.8% of the dense model's", "Stripes alone are no latency"]),
            ("grafting", ["net1 with 0.50 of lr0, net2 with 1.00 of lr0", "0.412 to 0.588",
                          "net2; fitness net1 0.4321, net2 0.5432"]),
            ("unstructured", ["pattern 2:4", "zeros in 2 layers 201 of 400, 50.2%",
                              "zeros in all convolutions 20.1%", "Zeros, not speed"]),
        ],
    )  # fmt: skip
    def test_what_its_record_tells(self, page, tmp_path, method, told):
        folder = run_folder(tmp_path / "run")
        write(folder / "slim" / FILES[method][0], BY_METHOD[method])
        found, printed = page(folder)
        assert f"{TOLD[method].heading}, the slim model" in found.text()
        assert not [words for words in told if words not in found.text()]
        drawn = any("MACs over the epochs of training" in word for word in found.words)
        assert drawn == (method in ("pruning", "resrep", "stripes"))
        said = "Its living stripes are 59.9% of the MACs that their training began with, which is no latency"
        assert (said in found.text()) == (said in printed) == (method == "stripes")

    @pytest.mark.parametrize(
        ("method", "change", "told"),
        [
            ("stripes", {"epochs": [], "options": {"target": None}}, ["none: the threshold decides", "0 of 45,000"]),
            ("resrep", {"epochs": [], "converted": {"difference": 0.0}}, ["no epoch is done"]),
            ("grafting", {"nets": {}, "options": {"mode": "noise"}, "epochs": [{"epoch": 1, "grafted": 7}]},
             ["mode noise", "filters revived 7 in 1 epochs"]),
            ("pruning", {"steps": []}, ["criterion taylor"]),
        ],
    )  # fmt: skip
    def test_a_training_that_is_under_way(self, page, tmp_path, method, change, told):
        folder = run_folder(tmp_path / "run")
        write(folder / "dense" / FILES[method][0], {**BY_METHOD[method], **change})
        found, _ = page(folder)
        assert f"{TOLD[method].heading}, the dense model" in found.text()
        assert not [words for words in told if words not in found.text()]

    @pytest.mark.parametrize("method", BY_METHOD)
    @pytest.mark.parametrize("damage", [{}, {"options": 3}, {"epochs": [{}], "layers": {"a": {}}, "steps": [{}]}])
    def test_a_damaged_record(self, command, tmp_path, method, damage):
        folder = run_folder(tmp_path / "run")
        path = folder / "slim" / FILES[method][0]
        write(path, {**BY_METHOD[method], **damage} if damage else {})
        refused = command("report", f"run={folder}")
        assert refused.code == 2
        assert str(path) in refused.err


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


class TestCorrelation:
    @pytest.mark.filterwarnings("error")
    def test_of_scores_that_are_all_equal_is_undefined(self, page, tmp_path):
        path = write_lines(tmp_path / "tuned.jsonl", [{**one, "as_pruned": 0.0} for one in TUNED])
        found, _ = page(run_folder(tmp_path / "run"), f"correlation={path}")
        assert "as pruned undefined: all equal." in found.text()
        assert ("1.0", "+1.00") in found.figures
        assert not [shown for _, shown in found.figures if "nan" in shown]

    def test_lines_that_tell_of_pricing_are_no_candidates(self, page, command, tmp_path):
        folder, priced = run_folder(tmp_path / "run"), {"cell": {"kind": "pricing", "model": "m"}, "a_second": 30000}
        path = write_lines(tmp_path / "tuned.jsonl", [priced, *TUNED])
        assert "over 3 candidates" in page(folder, f"correlation={path}")[0].text()
        other = write_lines(tmp_path / "other.jsonl", [{"cell": {"model": "m"}, "seconds": 3}])
        refused = command("report", f"run={folder}", f"correlation={other}")
        assert refused.code == 2
        assert str(other) in refused.err


def test_not_a_number_is_shown_as_such(page, tmp_path):
    """A training that diverged has mAP, but its figures may be anything that JSON of Python can hold."""
    folder = run_folder(tmp_path / "run")
    text = json.dumps(SUMMARY).replace(str(EVALUATIONS["slim"]["val"]["map50_95"]), "NaN")
    (folder / "summary.json").write_text(text, encoding="utf-8")
    assert ("nan", "nan") in page(folder)[0].figures
