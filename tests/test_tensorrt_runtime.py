"""Running engines as far as it goes without a GPU: the right calls, and outputs in the host's order."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from recorded_tensorrt import install

from yolo_prune.device.runtimes import TensorRtRuntime
from yolo_prune.device.runtimes.engine_file import EngineFile
from yolo_prune.errors import ConfigError

IMAGE = np.full((1, 3, 64, 64), 0.5, np.float32)


@pytest.fixture
def installed(monkeypatch):
    """Install the stand-in for a version."""
    return partial(install, monkeypatch)


class TestRun:
    """Outputs are copied back from buffers that nothing filled, so only their names, order and shapes are told."""

    SHAPES = {"output1": (1, 32, 16, 16), "images": (1, 3, 64, 64), "output0": (1, 84, 84)}  # noqa: RUF012

    def engine(self, tmp_path, metadata) -> Path:
        path = tmp_path / "a.engine"
        EngineFile(plan=b"ptrt plan", metadata=metadata).write(path)
        return path

    def stated(self, trt, shapes, batch=1):
        names = list(shapes)
        trt.stated.update(
            {
                ("ICudaEngine", "num_io_tensors"): len(names),
                ("ICudaEngine", "get_tensor_name"): lambda index: names[index],
                ("ICudaEngine", "get_tensor_shape"): lambda name: shapes[name],
                ("ICudaEngine", "get_tensor_dtype"): lambda _: trt.float32,
                ("ICudaEngine", "get_tensor_mode"): lambda name: int(name == "images") or 2,
                ("IExecutionContext", "get_tensor_shape"): lambda name: (batch, *shapes[name][1:]),
            }
        )
        trt.TensorIOMode.INPUT = 1

    def test_fixed_shapes(self, installed, tmp_path):
        trt = installed("8.6.1")
        self.stated(trt, self.SHAPES)
        metadata = {"imgsz": "[64, 64]", "names": "{0: 'a', 1: 'b'}", "args": {"quantize": 16}, "end2end": "True"}
        with TensorRtRuntime().load(self.engine(tmp_path, metadata), imgsz_px=64, threads=1) as session:
            outputs = session(IMAGE)
            assert (session.batch, session.classes, session.precision, session.end_to_end) == (1, 2, "fp16", True)
        assert [output.shape for output in outputs] == [(1, 84, 84), (1, 32, 16, 16)]
        assert [name for name, _ in trt.calls("IExecutionContext.set_tensor_address")] == [
            "images",
            "output0",
            "output1",
        ]
        assert trt.calls("IExecutionContext.execute_async_v3") == [[7]]

    def test_open_batch(self, installed, tmp_path):
        trt = installed("10.3.0")
        self.stated(trt, {"images": (-1, 3, 64, 64), "output0": (-1, 84, 84)}, batch=3)
        with TensorRtRuntime().load(self.engine(tmp_path, {}), imgsz_px=64, threads=1) as session:
            (output,) = session(np.repeat(IMAGE, 3, axis=0))
            assert session.batch is None
        assert output.shape == (3, 84, 84)
        assert trt.calls("IExecutionContext.set_input_shape") == [["images", (3, 3, 64, 64)]]

    def test_images_that_do_not_fit(self, installed, tmp_path):
        trt = installed("10.3.0", IExecutionContext__set_input_shape=lambda *_: False)
        for batch in (1, -1):
            self.stated(trt, {"images": (batch, 3, 64, 64), "output0": (1, 84, 84)})
            path = self.engine(tmp_path / str(batch), {})
            with (
                TensorRtRuntime().load(path, imgsz_px=64, threads=1) as session,
                pytest.raises(ConfigError, match="images"),
            ):
                session(np.zeros((9, 3, 64, 64), np.float32))

    def test_engine_of_another_version(self, installed, tmp_path):
        trt = installed("10.3.0", Runtime__deserialize_cuda_engine=lambda _: None)
        with (
            pytest.raises(ConfigError, match=r"TensorRT 10\.3\.0 cannot load engine"),
            TensorRtRuntime().load(self.engine(tmp_path, {"dla": 1}), imgsz_px=64, threads=1),
        ):
            pass
        assert trt.calls("Runtime.DLA_core") == [[1]]
