"""Numbered lines in a folder: only appended to, whole, and of one set of settings."""

from __future__ import annotations

import pytest

from yolo_prune.errors import ConfigError, OutputError
from yolo_prune.pipeline.record import Record

SETTINGS = {"seed": 0, "images": (3, 4)}


def test_goes_on_where_it_was(tmp_path):
    folder = tmp_path / "new"
    with Record(folder, "lines.jsonl", SETTINGS) as record:
        assert not folder.exists()  # bad input leaves nothing: the folder comes with the first line
        record.add({"number": 2, "score": 0.5})
    before = (folder / "lines.jsonl").read_bytes()
    with Record(folder, "lines.jsonl", SETTINGS) as again:
        again.add({"number": 0, "score": 0.25})
    assert (folder / "lines.jsonl").read_bytes().startswith(before)
    assert [line["number"] for line in again.in_order()] == [0, 2]
    assert again.lines == Record(folder, "lines.jsonl", SETTINGS).lines


@pytest.mark.parametrize("torn", ['{"number": 1, "sco', '{"number": 1', "{"])
def test_a_line_that_a_kill_cut_off_is_lost_alone(tmp_path, torn):
    with Record(tmp_path, "lines.jsonl", SETTINGS) as record:
        record.add({"number": 0})
    with (tmp_path / "lines.jsonl").open("a") as stream:
        stream.write(torn)
    with Record(tmp_path, "lines.jsonl", SETTINGS) as again:
        assert list(again.lines) == [0]
        again.add({"number": 1})
    assert list(Record(tmp_path, "lines.jsonl", SETTINGS).lines) == [0, 1]


def test_of_two_that_begin_a_folder_together_one_goes_on(tmp_path):
    folder = tmp_path / "new"
    with Record(folder, "lines.jsonl", SETTINGS) as first, Record(folder, "lines.jsonl", SETTINGS) as second:
        first.add({"number": 0})
        with pytest.raises(OutputError, match="another process works in"):
            second.add({"number": 0})
    with Record(folder, "lines.jsonl", SETTINGS) as third:
        assert list(third.lines) == [0]


def test_of_two_one_after_the_other_none_writes_a_line_twice(tmp_path):
    folder = tmp_path / "new"
    early, known = Record(folder, "lines.jsonl", SETTINGS), Record(folder, "lines.jsonl", SETTINGS)
    with known:
        with Record(folder, "lines.jsonl", SETTINGS) as first:
            first.add({"number": 0})
        with pytest.raises(OutputError, match=r"began .* meanwhile"):
            known.add({"number": 0})
    with early:  # read before there was a line, held after
        assert list(early.lines) == [0]


def test_other_settings_are_refused(tmp_path):
    Record(tmp_path, "lines.jsonl", SETTINGS).add({"number": 0})
    with pytest.raises(ConfigError, match="begun with other settings: seed=0"):
        Record(tmp_path, "lines.jsonl", {**SETTINGS, "seed": 1})


@pytest.mark.parametrize("content", ["{", "[1, 2]", "5"])
def test_damaged_settings_are_refused(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(OutputError, match="cannot be read"):
        Record(tmp_path, "lines.jsonl", SETTINGS)


def test_lines_of_nobody_are_left_alone(tmp_path):
    (tmp_path / "lines.jsonl").write_text("mine\n")
    with pytest.raises(OutputError, match="stands without"):
        Record(tmp_path, "lines.jsonl", SETTINGS)
    assert (tmp_path / "lines.jsonl").read_text() == "mine\n"


def test_nor_is_a_result_of_nobody(tmp_path):
    (tmp_path / "best.json").write_text("mine\n")
    with pytest.raises(OutputError, match="stands without"):
        Record(tmp_path, "lines.jsonl", SETTINGS, results=("best.json",))
    assert (tmp_path / "best.json").read_text() == "mine\n"


@pytest.mark.parametrize("line", ["5", "{}", '{"number": "one"}'])
def test_lines_without_a_number_are_refused(tmp_path, line):
    Record(tmp_path, "lines.jsonl", SETTINGS).add({"number": 0})
    with (tmp_path / "lines.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(OutputError, match="without a number"):
        Record(tmp_path, "lines.jsonl", SETTINGS)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        Record(tmp_path / "taken", "lines.jsonl", SETTINGS)
