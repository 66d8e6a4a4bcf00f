"""Damaged checkpoints, plans and configurations: a clear error or an answer, never a traceback, never a changed file.

A sample of random damages; YOLO_PRUNE_FUZZ=1000 does as many of each kind.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Command, contents, run_settings

SAMPLES = int(os.environ.get("YOLO_PRUNE_FUZZ", "20"))

ODD = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x",
    "0.5", "1e9", "../..", "\0", "äöü 日本", "${x}", "%s", [], [[]], [None], ["x", 1], {}, {"x": 1}, {"": None},
    "yolov8n.yaml",
]  # fmt: skip
"""Values that a careless hand or program might write."""


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


def wrong(tree: Any, chance: random.Random) -> Any:
    """Return a tree in which one to three values are odd, gone, twice there or elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.randint(1, 3)):
        *path, key = chance.choice(places(tree))
        parent = tree
        for step in path:
            parent = parent[step]
        match chance.randrange(6):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[f"{key}x"] = parent.pop(key)
            case 2 if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(parent[key]))
            case 3:
                parent[key] = copy.deepcopy(chance.choice([ODD, parent]))
            case 4 if isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
                parent[key] += chance.choice([1, -1, 0.5, 10**6])
            case _:
                parent[key] = copy.deepcopy(chance.choice(ODD))
        if not places(tree):
            break
    return tree


def torn(text: bytes, chance: random.Random) -> bytes:
    """Return bytes that are cut off, or in which some are other ones, gone or added."""
    found = bytearray(text)
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        at = chance.randrange(len(found))
        match chance.randrange(4):
            case 0:
                found[at] = chance.randrange(256)
            case 1:
                del found[at : at + chance.randint(1, 4)]
            case 2:
                found[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 4)))
            case _:
                found[at] ^= 1 << chance.randrange(8)
    return bytes(found[: chance.randrange(len(found))]) if chance.random() < 0.15 else bytes(found)


def damaged(checkpoint: bytes, chance: random.Random) -> bytes:
    """Return a checkpoint with damage in the file, or inside its archive, whose checksums are right again."""
    if chance.random() < 0.2:
        return torn(checkpoint, chance)
    archive, made = zipfile.ZipFile(io.BytesIO(checkpoint)), io.BytesIO()
    entries = {name: archive.read(name) for name in archive.namelist()}
    pickle = next(name for name in entries if name.endswith("data.pkl"))
    victim = pickle if chance.random() < 0.8 else chance.choice(list(entries))
    if chance.random() < 0.1:
        del entries[victim]
    elif entries[victim]:
        entries[victim] = torn(entries[victim], chance)
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as target:
        for name, content in entries.items():
            target.writestr(name, content)
    return made.getvalue()


def settled(command: Command, words: list[str], desk: Path, *, made: Callable[[], None] = lambda: None) -> int:
    """Run words that may be refused; whatever happens, it happens in words, and no file of the user's changes."""
    before = contents(desk)
    outcome = command(*words)  # any other exception than ours comes through, and fails the test
    if outcome.code:
        assert outcome.code in (1, 2), outcome.err
        assert outcome.err.startswith("error: ")
        assert "Traceback" not in outcome.err
        assert contents(desk) == before, "a refusal left something behind"
    else:
        made()
        assert contents(desk) == before, "a file of the user's changed"
    return outcome.code


@pytest.mark.parametrize("seed", range(SAMPLES))
def test_checkpoints(seed, desk, dense_checkpoint, command):
    (desk / "best.pt").write_bytes(damaged(dense_checkpoint.read_bytes(), random.Random(seed)))
    settled(command, ["inspect", "model=best.pt"], desk)


@pytest.fixture(scope="module")
def plan(tmp_path_factory, dense_checkpoint) -> Any:
    from yolo_prune.cli import main

    folder = tmp_path_factory.mktemp("plan")
    words = [f"model={dense_checkpoint}", f"out={folder / 'slim.pt'}", f"save_plan={folder / 'plan.json'}"]
    assert main(["prune", "target_macs=0.5", *words]) == 0
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.parametrize("seed", range(SAMPLES))
def test_plans(seed, desk, dense, plan, command):
    chance = random.Random(seed)
    text = json.dumps(wrong(plan, chance)).encode()
    (desk / "plan.json").write_bytes(torn(text, chance) if seed % 4 == 0 else text)
    words = ["prune", f"model={dense}", "plan=plan.json", "out=slim.pt"]
    settled(command, words, desk, made=(desk / "slim.pt").unlink)


@pytest.mark.parametrize("seed", range(SAMPLES))
def test_configurations_of_run(seed, desk, dense, data, command, monkeypatch):
    """Those that are accepted are not run, only begun."""
    chance = random.Random(seed)
    whole = {
        "prune": {"target_macs": 0.5, "criterion": "taylor", "allocation": "uniform", "round_to": 8},
        "finetune": {"epochs": 1, "batch": 4, "lr0": 0.01, "optimizer": "SGD", "workers": 0},
        "rewrite": {"shortcuts": "remove"}, "direct": {"allocation": "global"}, "control": True,
        "splits": ["val", "test"], "formats": ["onnx", "ncnn"], "precisions": ["fp32"], "runs": 10, "threads": 1,
    }  # fmt: skip
    file = run_settings(desk, data, model=str(dense), **whole)
    known = yaml.safe_load(file.read_text())
    text = yaml.safe_dump(wrong(known, chance), allow_unicode=True).encode()
    file.write_bytes(torn(text, chance) if seed % 4 == 0 else text)

    class Begun:
        """What a run would have found."""

        def table(self) -> str:
            return ""

        def to_json(self) -> dict[str, Any]:
            return {}

    opened: list[Path] = []
    monkeypatch.setattr("yolo_prune.pipeline.run._Run.open", lambda work: opened.append(work.folder))
    monkeypatch.setattr("yolo_prune.pipeline.run.claimed", lambda _folder: contextlib.nullcontext())
    monkeypatch.setattr("yolo_prune.pipeline.run._Run.all", lambda _work: Begun())
    code = settled(command, ["run", str(file)], desk)
    assert bool(opened) == (code == 0)
