"""A disk that is full in the middle of a file: a clear error, no half of a file, and what was there is as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import contents, run_settings, words_of

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)  # a write beyond it fails as on a full disk
from yolo_prune.cli import main
sys.exit(main(sys.argv[2:]))
"""

MORE = pytest.mark.exhaustive


def full_disk(largest_bytes: int, words: list[str], desk: Path) -> tuple[str, set[str]]:
    """Run words where no file gets larger than so many bytes; return the message, and the files that are new."""
    before = contents(desk)
    command = [sys.executable, "-c", LIMITED, str(largest_bytes), *words]
    outcome = subprocess.run(command, cwd=desk, capture_output=True, text=True, check=False)
    assert outcome.returncode == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    message = outcome.stderr[outcome.stderr.index("error: ") :]
    assert "cannot write" in message
    assert "free space" in message
    after = contents(desk)
    assert {name: after.get(name) for name in before} == before
    return message, {name for name in after if name not in before and not name.endswith("/")}


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("prune", []),
        ("export", ["format=onnx"]),
        pytest.param("export", ["format=ncnn"], marks=MORE),
        pytest.param("export", ["format=openvino"], marks=MORE),
        pytest.param("rewrite", [], marks=MORE),
        pytest.param("bundle", [], marks=MORE),
    ],
)
def test_what_writes_one_thing_leaves_nothing(verb, more, dense, data, desk):
    words = [*words_of(verb, dense, data, desk), "imgsz=64", *more]
    assert full_disk(500_000, words, desk)[1] == set()


def test_a_training_keeps_what_was_whole(dense, data, desk):
    words = ["train", f"model={dense}", f"data={data}", "epochs=1", "imgsz=64", "batch=8", "workers=0", "plots=false"]
    message, new = full_disk(300_000, [*words, f"project={desk}", "name=a"], desk)
    assert "last.pt" in message
    assert not any(name.startswith("a/weights/") for name in new)


@MORE
def test_a_run_goes_on_when_there_is_room(dense, data, desk, command):
    settings = run_settings(desk, data, train={}, finetune={"epochs": 1, "workers": 0, "batch": 8, "plots": False})
    words = ["run", str(settings), f"model={dense}"]
    message, new = full_disk(500_000, words, desk)
    assert "pruned.pt" in message
    assert new == {"run/.lock", "run/run.json", "run/stages/dense.json"}
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    assert "[1/" in outcome.out
    assert "dense: done before" in outcome.out


@MORE
def test_a_search_goes_on_when_there_is_room(dense, data, desk, command):
    words = [*words_of("search", dense, data, desk), "candidates=2", "imgsz=64", "batches=1", "workers=0", "batch=4"]
    assert "search/" in full_disk(5_000, words, desk)[0]
    assert command(*words).code == 0
