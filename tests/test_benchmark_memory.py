"""Peak memory: what a fresh process says, and what is said when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_onnx import SIDE_PX, tiny_onnx

from yolo_prune.device.memory import PeakMemory, peak_memory
from yolo_prune.errors import ConfigError

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells")

BALLAST = 64 << 20


def test_what_is_loaded_shows(tmp_path):
    """Names with blanks and letters beyond ASCII; the second file holds 64 MiB more than the first."""
    light, heavy = (
        peak_memory(tiny_onnx(tmp_path / f"räk {size}.onnx", ballast_bytes=size), imgsz_px=SIDE_PX, threads=1)
        for size in (0, BALLAST)
    )
    assert isinstance(light, PeakMemory)
    assert isinstance(heavy, PeakMemory)
    assert 0 < light.artefact_bytes < BALLAST
    assert BALLAST <= heavy.artefact_bytes - light.artefact_bytes < 8 * BALLAST
    assert abs(heavy.idle_bytes - light.idle_bytes) < BALLAST / 8


def test_a_refusal_keeps_its_words(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"broken\.onnx' cannot be loaded") as caught:
        peak_memory(broken, imgsz_px=SIDE_PX, threads=1)
    assert caught.value.remedy == "export it again"


def test_another_batch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="takes batches of 2, asked to run with 3"):
        peak_memory(tiny_onnx(tmp_path / "a.onnx", batch=2), imgsz_px=SIDE_PX, threads=1, batch=3)


def test_a_process_that_dies(tmp_path):
    """A file that does not note its size can be loaded for any, and fails when it runs."""
    artefact = tiny_onnx(tmp_path / "a.onnx", notes=False)
    with pytest.raises(ConfigError, match=r"died \(exit code 1\): InvalidArgument: .*Got: 64") as caught:
        peak_memory(artefact, imgsz_px=64, threads=1)
    assert "memory=false" in caught.value.remedy


def test_it_needs_neither_torch_nor_the_working_directory(tmp_path):
    """The process finds the very package that asked for it, wherever that lies: as a bundle carries it."""
    package = tmp_path / "bündel" / "yolo_prune"
    package.mkdir(parents=True)
    source = Path(__file__).resolve().parents[1] / "yolo_prune"
    for name in ("__init__.py", "errors.py", "device"):
        (package / name).symlink_to(source / name)
    artefact = tiny_onnx(tmp_path / "tiny.onnx")
    script = (
        "import sys; sys.modules.update(torch=None, ultralytics=None)\n"
        "from pathlib import Path\n"
        "from yolo_prune.device.memory import peak_memory\n"
        f"print(peak_memory(Path({str(artefact)!r}), imgsz_px={SIDE_PX}, threads=1).artefact_bytes)"
    )
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 0
