"""A bundle alone: in a process where torch cannot be imported, and in an install that does not have it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import cv2
import pytest
from bundles import IMGSZ_PX, assert_same, manifest
from command_line import contents
from ultralytics import YOLO

BLOCKED = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "ultralytics", "yaml", "omegaconf", "rich", "scipy"}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
sys.path[0] = ""
runpy.run_path(sys.argv[0], run_name="__main__")
"""


OFFLINE = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        os.write(2, f"network: {event} {arguments}\\n".encode())
        os._exit(77)
sys.addaudithook(refuse)
"""
"""As `sitecustomize`, in every Python that is started: whoever wants to reach the network ends there and then."""


def environment() -> dict[str, str]:
    """What a device has: neither our package on the path, nor a setting that keeps Python from leaving files."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Keep every process off the network, those that the runner starts too; the hook is proven first.

    Returns:
        Two new folders: where to work, and the user's home.
    """
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(OFFLINE)
    changed = {**environment(), "PYTHONPATH": str(tmp_path / "hook"), "HOME": str(tmp_path / "home")}
    monkeypatch.setattr(f"{__name__}.environment", lambda: changed)
    talks = "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)"
    starts = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {talks!r}]))"
    assert run(sys.executable, "-c", starts, cwd=tmp_path).returncode == 77
    folders = (tmp_path / "desk", tmp_path / "home")
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.parametrize("words", [["check"], ["detect", "source=REFERENCE"], ["benchmark", "runs=1", "warmup=0"]])
def test_nobody_asks_the_network_or_writes_into_the_home(cpu_bundle, offline, words):
    """OpenVINO would do both: it tells its maker of every import."""
    desk, home = offline
    words = [word.replace("REFERENCE", str(cpu_bundle / "reference")) for word in words]
    done = run(sys.executable, cpu_bundle / "run.py", *words, cwd=desk)
    assert done.returncode == 0, done.stderr
    assert "network: " not in done.stdout + done.stderr
    assert not list(home.iterdir())


@pytest.mark.parametrize("words", [["check"], ["detect", "source=REFERENCE"], ["benchmark", "runs=1", "warmup=0"]])
def test_what_we_need_here_is_not_imported_there(cpu_bundle, tmp_path, words):
    """The runner's own copy of the package runs, from another folder, and writes nothing into the bundle."""
    before = contents(cpu_bundle)
    words = [word.replace("REFERENCE", str(cpu_bundle / "reference")) for word in words]
    done = run(sys.executable, "-c", BLOCKED, cpu_bundle / "run.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(cpu_bundle) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["cv2", "numpy"])
def test_without_the_first_packages(cpu_bundle, tmp_path, package):
    script = BLOCKED.replace('"torch",', f'"torch", "{package}",')
    done = run(sys.executable, "-c", script, cpu_bundle / "run.py", "check", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not installed" in done.stderr
    assert "requirements-cpu.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_reader_who_has_had_enough(cpu_bundle, tmp_path):
    pipe = f"'{sys.executable}' '{cpu_bundle / 'run.py'}' detect source='{cpu_bundle / 'reference'}' | true"
    done = subprocess.run(
        ["sh", "-c", pipe], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment()
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.fixture(scope="session")
def clean_python(tmp_path_factory, cpu_bundle):
    """Python in an install of its own with what the bundle's list names."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--retries=1"]
    done = run(*pip, "-r", cpu_bundle / "requirements-cpu.txt", cwd=folder)
    if done.returncode:
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    for package in ("torch", "ultralytics", "yolo_prune"):
        assert run(python, "-c", f"import {package}", cwd=folder).returncode == 1, "the test would prove nothing"
    return python


@pytest.mark.slow
class TestCleanInstall:
    def test_check(self, clean_python, cpu_bundle, tmp_path):
        done = run(clean_python, cpu_bundle / "run.py", "check", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(" yes\n") == 3

    def test_benchmark(self, clean_python, cpu_bundle, tmp_path):
        words = ("benchmark", "runs=2", "warmup=0", "json=zeiten ä.json")
        done = run(clean_python, cpu_bundle / "run.py", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "zeiten ä.json").read_text())
        assert {entry["backend"] for entry in found["entries"]} == {"onnxruntime", "ncnn", "openvino"}

    @pytest.mark.parametrize("backend", ["onnxruntime", "ncnn", "openvino"])
    def test_detect_as_the_host_predicts_here(self, clean_python, cpu_bundle, finding_checkpoint, tmp_path, backend):
        source = shutil.copytree(cpu_bundle / "reference", tmp_path / "meine Bilder")
        words = ("detect", "source=meine Bilder", f"backend={backend}", "save=gemalt")
        done = run(clean_python, cpu_bundle / "run.py", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        images = [Path(name).name for name in manifest(cpu_bundle)["reference"]["images"]]
        assert [Path(line["source"]).name for line in lines] == images
        yolo, found = YOLO(finding_checkpoint), 0
        for line, name in zip(lines, images, strict=True):
            image = cv2.imread(str(source / name))
            boxes = yolo.predict(image, imgsz=IMGSZ_PX, rect=False, verbose=False)[0].boxes
            assert_same(line["detections"], boxes)
            assert (tmp_path / "gemalt" / name).is_file()
            found += len(boxes)
        assert found > 0

    def test_missing_camera(self, clean_python, cpu_bundle, tmp_path):
        done = run(clean_python, cpu_bundle / "run.py", "detect", "source=camera:97", cwd=tmp_path)
        assert done.returncode == 2
        assert "camera 97 does not answer" in done.stderr
        assert "Traceback" not in done.stderr
