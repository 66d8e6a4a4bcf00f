"""Variants of a runtime: how they are written, and that each which cannot run here is refused, never replaced."""

from __future__ import annotations

import sys
from pathlib import Path

import ncnn
import numpy as np
import onnxruntime
import pytest
import torch
from tiny_onnx import SIDE_PX, tiny_onnx

from yolo_prune.device.runtimes import OnnxRuntime, split_variant
from yolo_prune.device.runtimes.ncnn_runtime import NcnnRuntime
from yolo_prune.device.runtimes.onnx_providers import PROVIDERS
from yolo_prune.device.runtimes.openvino_runtime import OpenVinoRuntime
from yolo_prune.errors import ConfigError, MissingDependencyError
from yolo_prune.export.pytorch_runtime import PyTorchRuntime
from yolo_prune.export.runtimes import runtime_for

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is refused")


class TestWords:
    def test_split(self, tmp_path):
        assert split_variant("a/slim.onnx") == (Path("a/slim.onnx"), ())
        assert split_variant("you@home.onnx") == (Path("you@home.onnx"), ())  # which is not there
        assert split_variant("a@b/slim.onnx") == (Path("a@b/slim.onnx"), ())
        assert split_variant("slim_openvino_model@gpu.1") == (Path("slim_openvino_model"), ("gpu.1",))
        assert split_variant("a/slim.pt@cuda+half") == (Path("a/slim.pt"), ("cuda", "half"))
        (tmp_path / "me@home.onnx").touch()
        assert split_variant(str(tmp_path / "me@home.onnx")) == (tmp_path / "me@home.onnx", ())
        assert split_variant(f"{tmp_path / 'me@home.onnx'}@cuda") == (tmp_path / "me@home.onnx", ("cuda",))

    def test_backends_are_told_apart(self):
        assert [runtime.name for runtime in (OnnxRuntime(), NcnnRuntime(), OpenVinoRuntime(), PyTorchRuntime())] == [
            "onnxruntime", "ncnn", "openvino", "pytorch",
        ]  # fmt: skip
        assert OnnxRuntime.of(["tensorrt_rtx"]).name == "onnxruntime@tensorrt_rtx"
        assert OnnxRuntime.of(["cpu"]) == OnnxRuntime()
        assert NcnnRuntime.of(["vulkan"]).name == "ncnn@vulkan"
        assert PyTorchRuntime.of(["compile", "half", "cuda"]).name == "pytorch@cuda+half+compile"

    @pytest.mark.parametrize("words", [["gpu"], ["cpu", "cuda"], ["cuda", "cuda"], [""]])
    def test_unknown_ones(self, tmp_path, words):
        with pytest.raises(ConfigError, match="onnxruntime") as caught:
            runtime_for(tiny_onnx(tmp_path / "a.onnx"), variant=words)
        assert "one of: cpu, cuda, tensorrt, tensorrt_rtx" in str(caught.value)

    def test_unknown_ones_of_pytorch(self):
        with pytest.raises(ConfigError, match="fp16"):
            PyTorchRuntime.of(["fp16"])
        with pytest.raises(ConfigError, match=r"half\+half"):
            PyTorchRuntime.of(["half", "half"])

    def test_openvino_names_its_devices(self):
        with pytest.raises(ConfigError, match="variant 'tpu' of openvino") as caught:
            OpenVinoRuntime.of(["tpu"])
        assert "cpu" in str(caught.value)
        assert OpenVinoRuntime.of(["cpu"]) == OpenVinoRuntime()


class TestRefusals:
    @pytest.mark.parametrize("word", ["cuda", "tensorrt"])
    def test_provider_that_this_onnxruntime_lacks(self, tmp_path, word, capfd):
        if PROVIDERS[word].name in onnxruntime.get_available_providers():
            pytest.skip("it has it")
        with (
            pytest.raises(ConfigError, match=f"provider '{word}' cannot be used here.*CPUExecutionProvider") as caught,
            OnnxRuntime(word).load(tiny_onnx(tmp_path / "a.onnx"), imgsz_px=SIDE_PX, threads=1),
        ):
            pass
        assert "pip install onnxruntime-gpu" in str(caught.value)
        assert "Falling back" not in capfd.readouterr().out

    def test_plugin_that_is_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
        with (
            pytest.raises(MissingDependencyError, match=r"yolo-prune\[tensorrt_rtx\]"),
            OnnxRuntime("tensorrt_rtx").load(tiny_onnx(tmp_path / "a.onnx"), imgsz_px=SIDE_PX, threads=1),
        ):
            pass

    @needs_no_gpu
    def test_plugin_without_a_driver(self, tmp_path):
        pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx")
        for _ in range(2):  # a failed registration is not remembered as a good one
            with (
                pytest.raises(ConfigError, match=r"provider 'tensorrt_rtx' cannot be used here: libcuda") as caught,
                OnnxRuntime("tensorrt_rtx").load(tiny_onnx(tmp_path / "a.onnx"), imgsz_px=SIDE_PX, threads=1),
            ):
                pass
            assert "NVIDIA GPU and its driver" in caught.value.remedy

    @pytest.mark.skipif(ncnn.get_gpu_count() > 0, reason="there is a GPU")
    def test_vulkan_without_a_gpu(self, tmp_path):
        with pytest.raises(ConfigError, match="NCNN finds no GPU"), NcnnRuntime(vulkan=True).load(
            tmp_path, imgsz_px=SIDE_PX, threads=1
        ):  # fmt: skip
            pass

    @needs_no_gpu
    def test_pytorch_without_a_gpu(self, dense_checkpoint):
        with (
            pytest.raises(ConfigError, match="finds no CUDA device"),
            PyTorchRuntime.of(["cuda", "half"]).load(dense_checkpoint, imgsz_px=64, threads=1),
        ):
            pass


class TestPyTorch:
    @pytest.fixture(scope="class")
    def image(self):
        return np.random.default_rng(0).random((2, 3, 64, 64), dtype=np.float32)

    @pytest.fixture(scope="class")
    def plain(self, dense_checkpoint, image):
        with PyTorchRuntime().load(dense_checkpoint, imgsz_px=64, threads=1) as session:
            assert (session.precision, session.batch, session.classes) == ("fp32", None, 4)
            return session(image)[0]

    @pytest.mark.parametrize(("word", "tolerance"), [("channels_last", 1e-5), ("half", 2e-2)])
    def test_the_same_is_found(self, dense_checkpoint, image, plain, word, tolerance):
        with PyTorchRuntime.of([word]).load(dense_checkpoint, imgsz_px=64, threads=1) as session:
            assert session.precision == ("fp16" if word == "half" else "fp32")
            (found,) = session(image)
        assert (found.shape, found.dtype) == (plain.shape, np.float32)
        assert np.abs(found - plain).max() <= tolerance * np.abs(plain).max()


class TestOnnxInputs:
    def test_half_precision_inputs_are_converted(self, tmp_path):
        image = np.random.default_rng(0).random((1, 3, SIDE_PX, SIDE_PX), dtype=np.float32)
        outputs = []
        for half in (False, True):
            path = tiny_onnx(tmp_path / f"{half}.onnx", half=half)
            with OnnxRuntime().load(path, imgsz_px=SIDE_PX, threads=1) as session:
                outputs.append(session(image)[0])
        assert [output.dtype for output in outputs] == [np.float32, np.float32]
        np.testing.assert_allclose(*outputs, atol=5e-3)

    @pytest.mark.parametrize(("axis", "batch"), [(1, 1), (4, 4), ("batch", None)])
    def test_the_batch_is_the_graphs(self, tmp_path, axis, batch):
        path = tiny_onnx(tmp_path / "a.onnx", batch=axis)
        with OnnxRuntime().load(path, imgsz_px=SIDE_PX, threads=1) as session:
            assert (session.batch, session.classes) == (batch, 2)
