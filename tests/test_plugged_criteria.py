"""Criteria of other packages: one class there, one line of its `pyproject.toml`, nothing here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from yolo_prune.importance.plugged import CRITERIA, plugged_criteria

NOT_ONE = "\nNOT_ONE, ODD = 3, SmallestWeight(normalization='median')\n"


def criterion_of_the_guide() -> str:
    """Return the module that CONTRIBUTING shows."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    return guide.partition("```python\n")[2].partition("```")[0]


def install(site: Path, point: str, *, name: str = "outside") -> Path:
    """Lay a package out as pip would."""
    site.mkdir(exist_ok=True)
    (site / f"{name}.py").write_text(criterion_of_the_guide() + NOT_ONE)
    facts = site / f"{name}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[yolo_prune.criteria]\n{point}\n")
    return site


@pytest.mark.parametrize("more", [(), ("consumers=true",)], ids=["alone", "consumers"])
def test_a_criterion_of_another_package_prunes(desk: Path, dense: Path, more: tuple[str, ...]) -> None:
    site = install(desk / "site", "smallest = outside:SMALLEST")
    words = ("prune", f"model={dense}", "target_macs=0.5", "criterion=smallest", "out=slim.pt", *more)
    outcome = subprocess.run(
        [sys.executable, "-m", "yolo_prune", *words],
        env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert (desk / "slim.pt").is_file()


@pytest.mark.parametrize(
    ("point", "told"),
    [
        ("smallest = outside:MISSING", "has no attribute 'MISSING'"),
        ("smallest = nowhere:SMALLEST", "No module named 'nowhere'"),
        ("smallest = outside:NOT_ONE", "a int is no criterion"),
        ("smallest = outside:SmallestWeight", "is a class"),
        ("smallest = outside:ODD", "normalization 'median'"),
        ("other = outside:SMALLEST", "calls itself 'smallest'"),
        ("l2 = outside:SMALLEST", "'l2' is one of yolo_prune's own"),
    ],
)
def test_one_that_does_not_load_is_told_of_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, told: str
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site", point))
    monkeypatch.delitem(sys.modules, "outside", raising=False)
    with pytest.warns(UserWarning, match="of outside 1.0 is left out: ") as warned:
        assert plugged_criteria(taken=CRITERIA) == {}
    assert told in str(warned[0].message)


def test_one_of_two_distributions_with_the_same_name_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("outside", "outside_too"):
        monkeypatch.syspath_prepend(install(tmp_path / "site", f"smallest = {name}:SMALLEST", name=name))
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(UserWarning, match="is left out") as warned:
        found = plugged_criteria(taken=CRITERIA)
    assert [one.name for one in found.values()] == ["smallest"]
    assert len(warned) == 1
