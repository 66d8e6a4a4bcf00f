"""Several runs in one table and page: what they share, what they lack, and nothing compared that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import contents
from pages import Html
from run_folders import COSTS, EVALUATIONS, HOSTILE, SETTINGS, SUMMARY, evaluation, latency, run_folder, speed_up, write

OTHERS = {"direct": 0.4444, "smaller": 0.55}

FULL = {
    **SUMMARY,
    "costs": {**COSTS, "direct": {"macs": 538000001, "params": 1900001}, "smaller": {"macs": 500000003, "params": 7}},
    "evaluations": {**EVALUATIONS, **{name: {"val": evaluation("val", value)} for name, value in OTHERS.items()}},
    "latency_ms": {**SUMMARY["latency_ms"], "smaller_onnx": latency(9.876)},
    "control_speed_up": {"smaller": {"onnx": speed_up(2.1646, faster=True)}},
}  # fmt: skip


@pytest.fixture
def two(tmp_path):
    """A run with one control, and one with all of them, which differs in its seed."""
    first, second = run_folder(tmp_path / "first"), run_folder(tmp_path / "second", seed=1, smaller="yolov8n.yaml")
    write(second / "summary.json", FULL)
    return first, second


def compared(command, folders: tuple[Path, ...], *words: str) -> str:
    outcome = command("compare", f"runs={','.join(map(str, folders))}", *words)
    assert outcome.code == 0, outcome.err
    return outcome.out


def rows_of(printed: str) -> dict[tuple[str, str], list[str]]:
    cells = [line.split() for line in printed.splitlines()]
    return {(row[0], row[1]): row[2:] for row in cells if row[:1] in (["first"], ["second"]) and row[1] != "lacks"}


class TestTable:
    def test_has_every_model_with_its_figures(self, command, two):
        rows = rows_of(compared(command, two))
        assert [*rows] == [
            *(("first", name) for name in ("dense", "slim", "control")),
            *(("second", name) for name in ("dense", "slim", "control", "direct", "smaller")),
        ]
        assert rows["first", "slim"][:6] == ["50", "538M", "49.8%", "1.88M", "0.497", "0.480"]
        assert rows["second", "direct"][:6] == ["50", "538M", "49.8%", "1.9M", "0.444", "-"]

    def test_counts_the_epochs_that_each_was_asked_for(self, command, two):
        rows = rows_of(compared(command, two))
        epochs = {name: int(rows["second", name][0]) for name in ("dense", "slim", "control", "direct", "smaller")}
        assert epochs == {"dense": 30, "slim": 50, "control": 20, "direct": 50, "smaller": 50}

    def test_compares_speed_within_a_run_alone(self, command, two):
        printed = compared(command, two)
        assert "2.16x (1.95..2.38), faster" in printed
        assert "against the dense model of the same run" in printed
        assert "21.4" not in printed  # no milliseconds of two runs beside each other

    def test_says_which_controls_are_not_there(self, command, two):
        printed = compared(command, two)
        assert "first lacks a control, `direct: {}`" in printed
        assert "first lacks a control, `smaller: MODEL`" in printed
        assert "second lacks" not in printed

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"seed": 1}, "seed differs (0, 1)"),
            ({"imgsz": 640}, "imgsz differs (320, 640): neither mAP nor MACs can be compared"),
            ({"threads": 4}, "threads differs (2, 4): their milliseconds cannot be compared"),
            ({"model": "yolov8s.pt"}, "model differs"),
            ({"data": "other/data.yaml", "files_sha256": {}}, "data differs"),
            (
                {"files_sha256": {"shapes/data.yaml": "ef" * 32}},
                "content of the data yaml differs (cdcdcdcdcdcd, efefef",
            ),
        ],
    )
    def test_says_what_the_runs_do_not_share(self, command, tmp_path, settings, said):
        folders = (run_folder(tmp_path / "first"), run_folder(tmp_path / "second", **settings))
        assert said in compared(command, folders)

    def test_says_nothing_of_what_they_share(self, command, tmp_path):
        assert "differs" not in compared(command, (run_folder(tmp_path / "a"), run_folder(tmp_path / "b")))


class TestPage:
    def test_is_whole_and_runs_nothing(self, command, two, tmp_path):
        printed = compared(command, two, f"out={tmp_path / 'page.html'}")
        found = Html((tmp_path / "page.html").read_text(encoding="utf-8"))
        assert {values["id"] for values in found.all("h2")} == {"models", "speed", "controls", "provenance"}
        assert not found.all("script")
        assert len(found.all("svg")) == 2
        assert "seed differs" in found.text()
        shown = {float(value) for value, _ in found.figures}
        assert {0.4444, 0.55, 538000001.0, 500000003.0, EVALUATIONS["slim"]["test"]["map50_95"]} <= shown
        assert "2.16x (1.95..2.38), faster" in found.text()
        assert printed

    def test_joins_only_what_can_be_compared(self, command, tmp_path):
        first = run_folder(tmp_path / "first")
        for number, settings in enumerate(({}, {"imgsz": 640})):
            second = run_folder(tmp_path / f"second{number}", **settings)
            compared(command, (first, second), f"out={tmp_path / f'{number}.html'}")
        pages = [(tmp_path / f"{number}.html").read_text(encoding="utf-8") for number in range(2)]
        assert ["a line joins" in page for page in pages] == [True, False]

    def test_escapes_names(self, command, tmp_path):
        first = run_folder(tmp_path / "<img src=x onerror=alert(1)>", model=HOSTILE)
        compared(command, (first, run_folder(tmp_path / "b")), f"out={tmp_path / 'page.html'}")
        found = Html((tmp_path / "page.html").read_text(encoding="utf-8"))
        assert not found.all("img")
        assert HOSTILE in found.text()

    def test_json(self, command, two, tmp_path):
        compared(command, two, f"json={tmp_path / 'j.json'}")
        found = json.loads((tmp_path / "j.json").read_text(encoding="utf-8"))
        assert [*found["runs"]] == ["first", "second"]
        assert found["runs"]["second"]["settings"]["seed"] == 1
        assert [setting for setting, _ in found["lacking"]["first"]] == ["direct: {}", "smaller: MODEL"]


def test_runs_of_the_same_name_are_called_by_their_paths(command, tmp_path):
    folders = (run_folder(tmp_path / "a" / "run"), run_folder(tmp_path / "b" / "run"))
    printed = compared(command, folders)
    assert all(str(folder) in printed for folder in folders)


def test_an_unfinished_run_stands_with_what_it_has(command, two, tmp_path):
    write(tmp_path / "third" / "run.json", SETTINGS)
    printed = compared(command, (*two, tmp_path / "third"))
    assert "third lacks a control, `control: true`" in printed


@pytest.mark.parametrize("runs", [",", "first,first", "first,absent", "first,first/../first"])
def test_refused(command, tmp_path, monkeypatch, runs):
    run_folder(tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    refused = command("compare", f"runs={runs}", "out=page.html")
    assert refused.code == 2
    assert "Traceback" not in refused.err
    assert contents(tmp_path) == before
