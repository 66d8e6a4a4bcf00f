"""The arithmetic of tools/emulate_aarch64.py; the emulation itself is run by hand."""

from __future__ import annotations

import emulate_aarch64
import pytest
from emulate_aarch64 import EmulationResult, compare

from yolo_prune.cli import script


def line(*detections):
    keys = ("class", "score", "box")
    return {"ms": {"forward": 2000.0}, "detections": [dict(zip(keys, one, strict=True)) for one in detections]}


BOX = [10.0, 10.0, 30.0, 30.0]


class TestCompare:
    def test_same(self):
        found = compare("ncnn", [line((0, 0.5, BOX)), line()], [line((0, 0.5, BOX)), line()], 0.25)
        assert (found.here, found.there, found.paired, found.forward_s, found.same) == (1, 1, 1, 2.0, True)

    @pytest.mark.parametrize(
        ("backend", "there", "same"),
        [
            ("ncnn", (0, 0.49, BOX), True),
            ("onnxruntime", (0, 0.49, BOX), False),
            ("ncnn", (0, 0.5, [10.0, 10.0, 30.9, 30.0]), True),
            ("ncnn", (0, 0.5, [10.0, 10.0, 33.0, 30.0]), False),
            ("onnxruntime", (0, 0.5, [10.0, 10.0, 30.1, 30.0]), False),
            ("ncnn", (1, 0.5, BOX), False),
            ("ncnn", (0, 0.5, [40.0, 40.0, 60.0, 60.0]), False),
        ],
    )
    def test_different(self, backend, there, same):
        assert compare(backend, [line((0, 0.5, BOX))], [line(there)], 0.25).same == same

    def test_beside_the_threshold_either_side_is_right(self):
        assert compare("ncnn", [line((0, 0.26, BOX))], [line()], 0.25).same
        assert not compare("ncnn", [line((0, 0.30, BOX))], [line()], 0.25).same
        assert not compare("ncnn", [line()], [line((0, 0.30, BOX))], 0.25).same


@pytest.mark.parametrize(
    ("there", "code", "said"),
    [((0, 0.5, BOX), 0, ""), ((1, 0.5, BOX), 1, "other detections"), (None, 1, "shows nothing")],
)
def test_nothing_detected_shows_nothing(capsys, monkeypatch, tmp_path, there, code, said):
    sides = ([line((0, 0.5, BOX))], [line(there)]) if there else ([line()], [line()])
    result = EmulationResult(check="", comparisons=(compare("ncnn", *sides, 0.25),))
    monkeypatch.setattr(emulate_aarch64, "emulate", lambda _: result)
    words = ["model=a.pt", f"cache={tmp_path}", f"out={tmp_path / 'out'}"]
    assert script("s", emulate_aarch64.EmulationConfig, emulate_aarch64._work, words) == code
    assert said in capsys.readouterr().err


def test_needs_root_and_tools(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda _name: None)
    words = ["model=a.pt", f"cache={tmp_path}", f"out={tmp_path / 'out'}"]
    assert script("s", emulate_aarch64.EmulationConfig, emulate_aarch64._work, words) == 2
    assert "apt install debootstrap qemu-user-static" in capsys.readouterr().err
