"""Settings of the host, which reads them when it is first imported, and files that many tests share."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

HOST_SETTINGS = tempfile.TemporaryDirectory(prefix="yolo_prune_tests_")  # the host would write into the user's home
os.environ["YOLO_CONFIG_DIR"] = HOST_SETTINGS.name
os.environ["YOLOV5_CONFIG_DIR"] = str(Path(HOST_SETTINGS.name, "Ultralytics"))  # classic YOLOv5's own
os.environ["YOLO_OFFLINE"] = "1"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # processes that tests start
os.environ.pop("ULTRALYTICS_SAFE_LOAD", None)  # the guards of yolo_prune have to hold without it

ROOT = Path(__file__).resolve().parents[1]

REAL_DATA = Path(os.environ.get("YOLO_PRUNE_REAL_DATA", ROOT.parent / "shared" / "data"))
"""Real data and weights, which are no part of the project: folders `bccd`, `coco_subset` and `weights`."""

NO_REAL_DATA = f"no real data and weights in '{REAL_DATA}': YOLO_PRUNE_REAL_DATA names another folder"
sys.path[:0] = [str(ROOT / "datasets"), str(ROOT / "tools")]  # scripts, not packages

import matplotlib  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

torch.set_num_threads(1)
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
Path(HOST_SETTINGS.name, "Ultralytics").mkdir()
shutil.copy(FONTS / "DejaVuSans.ttf", Path(HOST_SETTINGS.name, "Ultralytics", "Arial.ttf"))  # or it would download one

import ultralytics.utils  # noqa: E402, F401  # the host first, as in a user's script: before us it is not yet guarded
from bundles import NAME, Runner, make, talkative  # noqa: E402
from checkpoint_files import save_as_host  # noqa: E402
from command_line import Command, contents, write_yaml  # noqa: E402
from models import lively  # noqa: E402
from own_labels import detector_with_its_labels  # noqa: E402
from shapes import draw_dataset  # noqa: E402

from yolo_prune.hosts.ultralytics.evaluation import image_files  # noqa: E402
from yolo_prune.pipeline.prune import prune  # noqa: E402
from yolo_prune.pipeline.prune_config import PruneConfig  # noqa: E402


@pytest.fixture(autouse=True)
def network_attempts(monkeypatch):
    """Refuse every connection and fail the test that tried: the host hides its attempts."""
    attempts = []

    def refuse(*address, **_):
        attempts.append(address)
        raise OSError("tests stay off the network")

    connect = socket.socket.connect
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(
        socket.socket,
        "connect",
        lambda self, address: connect(self, address) if self.family == socket.AF_UNIX else refuse(address),
    )
    yield attempts
    assert not attempts


@pytest.fixture(scope="session")
def real_data():
    """The folder with real data and weights."""
    if not REAL_DATA.is_dir():
        pytest.skip(NO_REAL_DATA)
    return REAL_DATA


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """The data yaml of a drawn data set: four classes, a few small images."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return draw_dataset(folder, seed=0, train=16, val=8, test=8, imgsz_px=96)


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory):
    """A small detector with random weights, as the host stores it after training."""
    return save_as_host(lively("yolov8n"), tmp_path_factory.mktemp("dense") / "dense.pt")


@pytest.fixture(scope="session")
def known_detector(tmp_path_factory):
    """A detector whose slim versions score differently on its data: the checkpoint and the data yaml."""
    return detector_with_its_labels(tmp_path_factory.mktemp("known"))


@pytest.fixture(scope="session")
def slim_checkpoint(tmp_path_factory, dense_checkpoint):
    """`dense_checkpoint`, pruned to half its MACs."""
    out = tmp_path_factory.mktemp("slim") / "slim.pt"
    config = PruneConfig(model=str(dense_checkpoint), out=str(out), target_macs=0.5)
    return prune(config).out


@pytest.fixture(scope="session")
def finding_checkpoint(tmp_path_factory, slim_checkpoint, tiny_data):
    """`slim_checkpoint` with scores high enough that it finds things."""
    image = image_files(tiny_data, "val")[0]
    return talkative(slim_checkpoint, image, tmp_path_factory.mktemp("finding") / "slim.pt")


@pytest.fixture(scope="session")
def cpu_bundle(tmp_path_factory, finding_checkpoint, tiny_data):
    """A bundle of `finding_checkpoint` for target cpu, in a folder of a difficult name; not to be changed."""
    return make(finding_checkpoint, tmp_path_factory.mktemp("bundle") / NAME, "cpu", data=str(tiny_data))


@pytest.fixture(scope="session")
def jetson_bundle(tmp_path_factory, finding_checkpoint, tiny_data):
    """A bundle of `finding_checkpoint` for a Jetson, with calibration images; not to be changed."""
    out = tmp_path_factory.mktemp("jetson") / NAME
    return make(finding_checkpoint, out, "jetson", data=str(tiny_data), int8=True, calibration=3)


@pytest.fixture
def runner(capsys):
    """The command line of a bundle as a function of its folder and words."""
    return Runner(capsys)


@pytest.fixture
def command(capsys):
    """The command line as a function of words."""
    return Command(capsys)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The user's folder, and the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def dense(desk, dense_checkpoint):
    """A dense checkpoint of the user's."""
    return Path(shutil.copy(dense_checkpoint, desk / "dense.pt"))


@pytest.fixture
def slim(desk, slim_checkpoint):
    """A slim checkpoint of the user's."""
    return Path(shutil.copy(slim_checkpoint, desk / "slim_before.pt"))


@pytest.fixture
def data(desk, tiny_data):
    """A data yaml of the user's that names the drawn images."""
    return write_yaml(desk / "data.yaml", {**yaml.safe_load(tiny_data.read_text()), "path": str(tiny_data.parent)})


@pytest.fixture
def refused(desk, command):
    """Run words that must be refused; return the message."""

    def run(*words: object) -> str:
        before = contents(desk)
        outcome = command(*words)
        assert outcome.code == 2
        assert contents(desk) == before
        assert outcome.err.startswith("error: ")
        assert "expected: " in outcome.err
        assert "Traceback" not in outcome.err
        return outcome.err

    return run
