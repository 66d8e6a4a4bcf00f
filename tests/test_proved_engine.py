"""An engine from checkpoint to proof, without a GPU: what the stand-in for TensorRT built is run by ONNX Runtime."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from recorded_tensorrt import StandIn, install

from yolo_prune.errors import ParityError
from yolo_prune.export.provenance import read_provenance
from yolo_prune.files import sha256
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.pipeline.artefacts import Variant, export_proved

IMGSZ_PX = 64


class Computing:
    """Lets a stand-in compute: the plan is the ONNX file that was parsed, and the buffers are the session's own.

    Args:
        trt: The stand-in.
        error_px: Added to every output.
    """

    def __init__(self, trt: StandIn, error_px: float) -> None:
        self.trt, self.error_px = trt, error_px
        self.onnx = b""
        trt.TensorIOMode.INPUT = 1
        trt.stated.update(
            {
                ("OnnxParser", "parse_from_file"): self.parse,
                ("Builder", "build_serialized_network"): lambda *_: b"ptrt" + self.onnx,
                ("Runtime", "deserialize_cuda_engine"): self.load,
            }
        )

    def parse(self, path: str) -> bool:
        self.onnx = Path(path).read_bytes()
        return True

    def load(self, plan: bytes) -> object:
        session = onnxruntime.InferenceSession(plan[len(b"ptrt") :])
        self.session = session
        tensors = {one.name: one for one in [*session.get_inputs(), *session.get_outputs()]}
        kinds = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF"}
        self.trt.stated.update(
            {
                ("ICudaEngine", "num_io_tensors"): len(tensors),
                ("ICudaEngine", "get_tensor_name"): lambda index: list(tensors)[index],
                ("ICudaEngine", "get_tensor_shape"): lambda name: tuple(tensors[name].shape),
                ("ICudaEngine", "get_tensor_dtype"): lambda name: kinds[tensors[name].type],
                ("ICudaEngine", "get_tensor_mode"): lambda name: 1 if name == session.get_inputs()[0].name else 2,
                ("IExecutionContext", "get_tensor_shape"): lambda name: tuple(tensors[name].shape),
                ("IExecutionContext", "execute_async_v3"): self.run,
            }
        )
        return self.trt.make("ICudaEngine")

    def run(self, _stream: int) -> bool:
        addresses = dict(self.trt.calls("IExecutionContext.set_tensor_address"))
        (image,) = self.session.get_inputs()
        number = np.dtype(np.float16 if image.type == "tensor(float16)" else np.float32)
        data = ctypes.string_at(addresses[image.name], int(np.prod(image.shape)) * number.itemsize)
        found = self.session.run(None, {image.name: np.frombuffer(data, number).reshape(image.shape)})
        for output, values in zip(self.session.get_outputs(), found, strict=True):
            wrong = np.ascontiguousarray(values + values.dtype.type(self.error_px))
            ctypes.memmove(addresses[output.name], wrong.tobytes(), wrong.nbytes)
        return True


@pytest.fixture
def export(dense, tmp_path, monkeypatch):
    """Export an engine in 16 bit with a version of TensorRT that is wrong by so much."""

    def export(version: str, *, error_px: float = 0.0):
        Computing(install(monkeypatch, version), error_px)
        variant = Variant(format="engine", imgsz_px=IMGSZ_PX, precision="fp16")
        return export_proved(read_checkpoint(dense), tmp_path / "out", variant, images=None)

    return export


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "11.1.0"])
def test_one_that_agrees_stands_and_says_so(export, dense, tmp_path, version):
    """Up to 10 TensorRT itself takes the file to 16 bit, which the stand-in does not; of 11 the file is in 16 bit."""
    found = export(version)
    assert (found.error, found.path) == (None, tmp_path / "out" / "dense_fp16.engine")
    assert (found.parity.backend, found.parity.precision, found.parity.passed) == ("tensorrt", "fp16", True)
    assert (found.parity.max_rel > 1e-4) == (version == "11.1.0")
    told = read_provenance(found.path)
    assert told.verified
    assert (told.checkpoint_sha256, told.precision, told.parity) == (sha256(dense), "fp16", found.parity.to_json())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dense_fp16.engine"]


def test_one_that_disagrees_is_kept_aside_with_its_figures(export, tmp_path):
    found = export("10.3.0", error_px=50.0)
    assert isinstance(found.error, ParityError)
    assert found.path == tmp_path / "out" / "dense_fp16.engine.failed"
    figures = json.loads((tmp_path / "out" / "dense_fp16.engine.failed.json").read_text())
    assert figures["parity"] == found.parity.to_json()
    assert figures["parity"]["max_abs"] >= 49
    assert not (tmp_path / "out" / "dense_fp16.engine").exists()
    assert not read_provenance(found.path.rename(tmp_path / "dense_fp16.engine")).verified
