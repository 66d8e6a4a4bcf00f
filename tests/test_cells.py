"""Cells of records: each is run once, one that cannot be is told, and old lines are still known."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import bench_criteria
import bench_export
import bench_recipes
import pytest
from cells import cell_key, completed, data_name, failures, run_missing

from yolo_prune.errors import ConfigError, InfeasibleTargetError
from yolo_prune.files import append_line, read_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    number: int
    sizes: tuple[int, ...] = ()
    late: int = 3


def line(cell: Cell) -> dict[str, Any]:
    return {"cell": dataclasses.asdict(cell), "square": cell.number**2}


def refuse(cell: Any) -> dict[str, Any]:
    raise AssertionError(f"{cell} is run again")


def test_each_is_run_once_tuples_or_not(tmp_path):
    cells = [Cell(number=1, sizes=(320, 640)), Cell(number=2), Cell(number=1, sizes=(320, 640))]
    found = run_missing(tmp_path / "r.jsonl", cells, line)
    assert [one["square"] for one in found] == [1, 4]
    assert run_missing(tmp_path / "r.jsonl", cells, refuse) == found


def test_a_line_that_is_older_than_a_field_has_its_default(tmp_path):
    append_line(tmp_path / "r.jsonl", {"cell": {"number": 1, "sizes": []}, "square": 1})
    assert len(run_missing(tmp_path / "r.jsonl", [Cell(number=1)], refuse)) == 1
    assert [one["square"] for one in run_missing(tmp_path / "r.jsonl", [Cell(number=1, late=4)], line)] == [1, 1]
    assert completed({"number": 1, "sizes": []}, Cell) == {"number": 1, "sizes": [], "late": 3}


def test_one_that_cannot_be_is_a_line_and_the_others_are_run(tmp_path, capsys):
    def run(cell: Cell) -> dict[str, Any]:
        if cell.number == 1:
            raise InfeasibleTargetError("too small", expected="more", remedy="less")
        return line(cell)

    cells = [Cell(number=1), Cell(number=2)]
    failed, done = run_missing(tmp_path / "r.jsonl", cells, run, cannot_be=(InfeasibleTargetError,))
    assert failed == {"cell": {"number": 1, "sizes": [], "late": 3}, "failed": "too small"}
    assert done["square"] == 4
    assert "failed: too small" in capsys.readouterr().out
    assert failures([failed, done]) == "failed: number=1, sizes=[], late=3: too small\n"
    assert run_missing(tmp_path / "r.jsonl", cells, refuse, cannot_be=(InfeasibleTargetError,)) == [failed, done]


def test_what_is_wrong_with_all_of_them_ends_the_bench(tmp_path):
    def run(_: Cell) -> dict[str, Any]:
        raise ConfigError("batch=0", expected="at least 1")

    with pytest.raises(ConfigError, match="batch=0"):
        run_missing(tmp_path / "r.jsonl", [Cell(number=1)], run, cannot_be=(InfeasibleTargetError,))
    assert read_lines(tmp_path / "r.jsonl") == []


def test_a_key_names_one_cell():
    keys = {cell_key(Cell(number=1)), cell_key(Cell(number=2)), cell_key(Cell(number=1, late=4))}
    assert len(keys) == 3
    assert cell_key(Cell(number=1)) in keys


@pytest.mark.parametrize("bench", [bench_criteria, bench_export, bench_recipes], ids=lambda bench: bench.__name__)
def test_the_cells_of_the_repository_are_not_run_again(bench, tmp_path):
    record = shutil.copy(bench.RECORD, tmp_path / "r.jsonl")
    lines = read_lines(record)
    cells = [bench.Cell(**completed(one["cell"], bench.Cell)) for one in lines]
    assert lines
    assert run_missing(record, cells, refuse) == lines


def test_a_data_set_has_one_name_wherever_its_yaml_is_named_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_name("data.yaml") == data_name(str(tmp_path / "data.yaml")) == tmp_path.name
