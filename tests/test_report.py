"""The page of a run: whole, self-contained, true to the records, and safe whatever things are called."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import yaml
from command_line import contents
from pages import Html
from run_folders import (
    CANDIDATES,
    COSTS,
    EVALUATIONS,
    HOSTILE,
    SETTINGS,
    SPARSITY,
    SUMMARY,
    TUNED,
    WIDTHS,
    detections,
    run_folder,
    whole_run,
    write,
    write_picture,
)

from yolo_prune.configuration import load
from yolo_prune.pipeline.run_config import RunConfig
from yolo_prune.report.summary import in_words
from yolo_prune.report.table import quantity


@pytest.fixture
def page(command):
    """Report on a run folder; return the page."""

    def made(folder: Path, *words: str) -> Html:
        outcome = command("report", f"run={folder}", *words)
        assert outcome.code == 0, outcome.err
        assert f"report: {folder / 'report.html'}" in outcome.out
        return Html((folder / "report.html").read_text(encoding="utf-8"))

    return made


def headings(page: Html) -> set[str]:
    return {values["id"] for values in page.all("h2")}


def numbers_in(value: object) -> set[float]:
    if isinstance(value, dict):
        return set().union(*map(numbers_in, value.values()))
    if isinstance(value, list):
        return set().union(*map(numbers_in, value))
    return {float(value)} if isinstance(value, int | float) else set()


class TestPage:
    def test_has_every_section_of_a_whole_run(self, page, tmp_path):
        folder, words = whole_run(tmp_path / "run")
        found = headings(page(folder, *words))
        assert found == {
            *("models", "latency", "detections", "widths", "methods", "sparsity", "search", "correlation", "provenance")
        }

    def test_is_self_contained_and_runs_nothing(self, page, tmp_path):
        folder, words = whole_run(tmp_path / "run")
        found = page(folder, *words)
        assert not [tag for tag, _ in found.elements if tag in ("script", "link", "iframe", "object", "embed")]
        for tag, values in found.elements:
            assert not [name for name in values if name.startswith("on")]
            for name in ("src", "href", "action", "data", "srcset"):
                if name in values and tag != "data":
                    assert re.match(r"#|data:image/jpeg;base64,", values[name])
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert "url(http" not in text
        assert "@import" not in text
        assert "default-src 'none'" in text

    def test_identifiers_are_unique_and_references_lead_somewhere(self, page, tmp_path):
        folder, words = whole_run(tmp_path / "run")
        found = page(folder, *words)
        names = Counter(values["id"] for _, values in found.elements if "id" in values)
        assert max(names.values()) == 1
        for _, values in found.elements:
            referred = values.get("aria-labelledby", "").split() + re.findall(r"url\(#([^)]*)\)", str(values))
            referred += [values["href"][1:]] if values.get("href", "").startswith("#") else []
            assert set(referred) <= set(names)

    def test_every_plot_has_a_name_and_a_description(self, page, tmp_path):
        folder, words = whole_run(tmp_path / "run")
        drawings = page(folder, *words).all("svg")
        assert len(drawings) == 9
        assert all(values["role"] == "img" and len(values["aria-labelledby"].split()) == 2 for values in drawings)

    def test_is_the_same_for_the_same_records(self, page, tmp_path):
        folder, words = whole_run(tmp_path / "run")
        page(folder, *words)
        first = (folder / "report.html").read_bytes()
        page(folder, *words)
        assert (folder / "report.html").read_bytes() == first


class TestFigures:
    def test_each_is_of_the_records_and_shown_rounded(self, page, tmp_path):
        folder, words = whole_run(tmp_path / "run")
        known = numbers_in([SUMMARY, SPARSITY, CANDIDATES, TUNED, WIDTHS])
        kept = {WIDTHS["slim"][name] / WIDTHS["dense"][name] for name in WIDTHS["slim"]}
        ranks = {1.0, 0.5}  # Spearman of three candidates: in order; one pair swapped
        for value, shown in page(folder, *words).figures:
            assert float(value) in known | kept | ranks
            forms = {f"{float(value):{form}}" for form in (".1f", ".2f", ".3f", ".6f", ".1%", "+.2f")}
            assert shown in forms | {quantity(float(value))}

    def test_what_the_record_tells_is_there(self, page, tmp_path):
        found = page(run_folder(tmp_path / "run"))
        shown = {float(value) for value, _ in found.figures}
        assert numbers_in(COSTS) <= shown
        for splits in EVALUATIONS.values():
            assert {figures[key] for figures in splits.values() for key in ("map50", "map50_95")} <= shown
        for latency in SUMMARY["latency_ms"].values():
            assert {latency[f"{name}_ms"] for name in ("median", "p5", "p25", "p75", "p95")} <= shown
        assert "1.1e-14" in found.text()
        assert "1.2e-05" in found.text()

    def test_faster_is_said_only_where_the_record_says_it(self, page, tmp_path):
        found = page(run_folder(tmp_path / "run"))
        ratios = SUMMARY["speed_up"]
        for ratio in ratios.values():
            assert in_words(ratio) in found.text()
        lede = found.text().partition("MACs 1.08G")[0]
        assert f"onnx {in_words(ratios['onnx'])}" in lede
        assert lede.count("faster") == 1
        assert "pytorch 1.03x (0.93..1.13), not separable" in lede
        assert "keeps 49.8% of the MACs and 59.8% of the parameters" in lede

    def test_json_holds_them_all(self, command, tmp_path):
        folder, words = whole_run(tmp_path / "run")
        assert command("report", f"run={folder}", *words, f"json={tmp_path / 'j.json'}").code == 0
        found = json.loads((tmp_path / "j.json").read_text(encoding="utf-8"))
        assert numbers_in(COSTS) <= numbers_in(found["models"])
        assert [line["score"] for line in found["search"]] == [line["score"] for line in CANDIDATES]


class TestNames:
    def test_that_would_run_are_shown_as_they_are(self, page, tmp_path):
        folder = run_folder(tmp_path / "run", model=f"weights/{HOSTILE}", data=HOSTILE)
        write(folder / "stages" / "detections.json", detections(HOSTILE))
        write(folder / "stages" / "widths.json", {"dense": {HOSTILE: 8}, "slim": {HOSTILE: 4}})
        summary = json.loads(json.dumps(SUMMARY).replace("onnx", "<b onclick=x>$nan_$"))
        write(folder / "summary.json", {**summary, "machine": {HOSTILE: {HOSTILE: HOSTILE}}})
        found = page(folder)
        assert not found.all("script")
        assert not [values for _, values in found.elements if "onclick" in values]
        assert found.text().count(HOSTILE) >= 5
        assert "<b onclick=x>$nan_$, ms" in found.text()

    def test_of_folders_may_hold_spaces_and_letters_of_any_language(self, page, tmp_path):
        folder = run_folder(tmp_path / "мой run; rm -rf ~")
        text = page(folder).text()
        assert f"yolo-prune report run={shlex.quote(str(folder))}" in text

    def test_of_pictures_lead_nowhere_else(self, page, tmp_path):
        folder = run_folder(tmp_path / "run")
        write_picture(tmp_path / "private.jpg")
        (folder / "detections" / "0_slim.jpg").write_text("no JPEG")
        record = detections()
        record["images"][0]["models"]["dense"]["file"] = "../private.jpg"
        write(folder / "stages" / "detections.json", record)
        found = page(folder)
        assert not found.all("img")
        assert found.text().count("missing, or too large") == 2

    def test_of_a_large_picture_are_all_that_is_embedded(self, page, tmp_path):
        folder = run_folder(tmp_path / "run")
        write_picture(folder / "detections" / "0_slim.jpg", side_px=900)
        assert (folder / "detections" / "0_slim.jpg").stat().st_size > 400_000
        found = page(folder)
        assert [values["alt"] for values in found.all("img")] == [
            "a.jpg with the 19 objects that the dense model finds"
        ]
        assert "missing, or too large" in found.text()


class TestSettings:
    def test_can_be_run_again(self, page, tmp_path):
        found = page(run_folder(tmp_path / "run"))
        shown = next(word for word in found.words if word.startswith("model: yolov8n.pt"))
        (tmp_path / "settings.yaml").write_text(shown, encoding="utf-8")
        again = load(RunConfig, tmp_path / "settings.yaml", ["out=again"])
        assert vars(again) == {**vars(again), **{key: SETTINGS[key] for key in yaml.safe_load(shown)}}
        assert set(yaml.safe_load(shown)) == set(SETTINGS) - {"files_sha256"}
        assert "SHA-256 of yolov8n.pt" in found.text()


class TestFiles:
    def test_of_the_user_stay(self, command, tmp_path):
        folder = run_folder(tmp_path / "run")
        (tmp_path / "mine.html").write_text("mine")
        before = contents(tmp_path)
        refused = command("report", f"run={folder}", f"out={tmp_path / 'mine.html'}")
        assert refused.code == 2
        assert "already exists" in refused.err
        assert contents(tmp_path) == before

    def test_out_says_where(self, command, tmp_path):
        folder = run_folder(tmp_path / "run")
        assert command("report", f"run={folder}", f"out={tmp_path / 'page.html'}").code == 0
        assert not (folder / "report.html").exists()
        Html((tmp_path / "page.html").read_text(encoding="utf-8"))
