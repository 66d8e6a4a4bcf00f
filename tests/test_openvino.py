"""OpenVINO's CPU device gives a thread another stack for its signals, and may take it away from another thread.

It lends the stack to the thread that compiles and unmaps it wherever the last reference goes. If that is another
thread, in which the garbage collector ran, the first one dies at its next signal: SIGCHLD of a data loader's worker.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import sys
import threading

import pytest

from yolo_prune.device.detections import letterbox
from yolo_prune.device.images import synthetic_images
from yolo_prune.device.runtimes import runtime_for
from yolo_prune.export.quantization import quantize
from yolo_prune.hosts.ultralytics.evaluation import evaluate_artefact
from yolo_prune.hosts.ultralytics.export import export_model

IMGSZ_PX = 64

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sigaltstack as Linux has it")


class Stack(ctypes.Structure):
    """`stack_t` of signal.h."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def signal_stack() -> int | None:
    """Where this thread's signals are handled."""
    stack = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.ss_sp


def in_another_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.fixture(scope="module")
def artefact(dense_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "w_openvino_model"
    return export_model(dense_checkpoint, format="openvino", imgsz_px=IMGSZ_PX, out=folder)


@pytest.fixture
def no_collector():
    """Cycles stay until somebody collects them, in whatever thread that is."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def signals():
    """Signals that arrived; their handler is Python's, which asks for the other stack."""
    found = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: found.append(number))
    yield found
    signal.signal(signal.SIGUSR1, before)


def test_a_session_may_end_in_another_thread(artefact, signals):
    with runtime_for(artefact).load(artefact, imgsz_px=IMGSZ_PX, threads=1) as session:
        held = [session]
    del session
    in_another_thread(held.clear)
    signal.raise_signal(signal.SIGUSR1)  # a process without a stack for it ends here
    assert signals == [signal.SIGUSR1]


@pytest.mark.usefixtures("no_collector")
def test_quantizing_leaves_nothing_to_end_elsewhere(artefact, tmp_path, signals):
    before = signal_stack()
    inputs = [letterbox(image, IMGSZ_PX)[0] for image in synthetic_images(4, IMGSZ_PX)]
    quantize(artefact, inputs, tmp_path / "s_openvino_model", format="openvino")
    assert signal_stack() == before
    in_another_thread(gc.collect)
    signal.raise_signal(signal.SIGUSR1)
    assert signals == [signal.SIGUSR1]


@pytest.mark.usefixtures("no_collector")
def test_measuring_leaves_nothing_to_end_elsewhere(artefact, tiny_data, signals):
    before = signal_stack()
    evaluate_artefact(artefact, task="detect", data=tiny_data, split="val", imgsz_px=IMGSZ_PX)
    assert signal_stack() == before
    in_another_thread(gc.collect)
    signal.raise_signal(signal.SIGUSR1)
    assert signals == [signal.SIGUSR1]
