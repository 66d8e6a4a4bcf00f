"""Where TensorRT, CUDA or a GPU is missing everything says so before any work; and `trtexec` in TensorRT's stead."""

from __future__ import annotations

import stat
import sys

import numpy as np
import pytest
from exported_onnx import IMGSZ_PX, checkpoint, exported

from yolo_prune.cli import main
from yolo_prune.device import trtexec
from yolo_prune.device.calibration import Calibration
from yolo_prune.device.cuda import CudaError, load_cuda
from yolo_prune.device.runtimes import TensorRtRuntime
from yolo_prune.device.runtimes.engine_file import EngineFile
from yolo_prune.device.tensorrt_build import build_engine
from yolo_prune.device.tensorrt_library import Version, is_installed
from yolo_prune.device.tensorrt_recipe import EngineOptions
from yolo_prune.errors import ConfigError, DataError, ExportError, MissingDependencyError, OutputError
from yolo_prune.export.runtimes import runtime_for
from yolo_prune.export.tensorrt import export_engine, onnx_precision

without_tensorrt = pytest.mark.skipif(is_installed(), reason="TensorRT is installed here")


def cuda_without_gpu():
    """CUDA's real library, as torch brings it."""
    try:
        cuda = load_cuda()
    except ConfigError:
        pytest.skip("CUDA's library is not here")
    try:
        cuda.require_gpu()
    except ConfigError:
        return cuda
    pytest.skip("there is a GPU")


class TestCuda:
    def test_no_library(self):
        with pytest.raises(ConfigError, match="libcudart") as error:
            load_cuda(["libnothing.so.1", "libnothing.so"])
        assert "yolo-prune bundle" in str(error.value)

    def test_no_gpu(self):
        with pytest.raises(ConfigError, match="cudaGetDeviceCount failed with error") as error:
            cuda_without_gpu().require_gpu()
        assert "yolo-prune bundle" in str(error.value)

    def test_failed_calls_say_what_cuda_says(self):
        with pytest.raises(CudaError, match=r"cudaMalloc failed with error \d+: \w+"):
            cuda_without_gpu().allocate(16)


@without_tensorrt
class TestNotInstalled:
    """The package of its types has its name too, and counts for nothing."""

    @pytest.fixture(autouse=True)
    def no_trtexec(self, monkeypatch):
        monkeypatch.setattr("yolo_prune.device.tensorrt_build.find_trtexec", lambda: None)

    def test_build(self, tmp_path):
        with pytest.raises(MissingDependencyError, match=r"yolo-prune\[tensorrt\]") as error:
            build_engine(exported("yolov8n"), tmp_path / "a.engine", EngineOptions())
        assert "JetPack" in str(error.value)
        assert not list(tmp_path.iterdir())

    def test_export(self, tmp_path):
        with pytest.raises(ConfigError, match="package 'tensorrt' is not installed") as error:
            export_engine(checkpoint("yolov8n"), imgsz_px=IMGSZ_PX, out=tmp_path / "a.engine")
        assert "yolo-prune[tensorrt]" in str(error.value)
        assert not list(tmp_path.iterdir())

    def test_run(self, tmp_path):
        path = tmp_path / "a.engine"
        EngineFile(plan=b"ptrt", metadata={"imgsz": [64, 64]}).write(path)
        assert isinstance(runtime_for(path), TensorRtRuntime)
        with pytest.raises(MissingDependencyError), runtime_for(path).load(path, imgsz_px=64, threads=1):
            pass
        with (
            pytest.raises(ConfigError, match="asked to run at 96"),
            runtime_for(path).load(path, imgsz_px=96, threads=1),
        ):
            pass

    def test_no_such_module(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(MissingDependencyError):
            TensorRtRuntime().version()


class TestRequests:
    def test_nothing_is_overwritten(self, tmp_path):
        out = tmp_path / "a.engine"
        out.write_text("mine")
        for attempt in (
            lambda: build_engine(exported("yolov8n"), out, EngineOptions()),
            lambda: export_engine(checkpoint("yolov8n"), imgsz_px=IMGSZ_PX, out=out),
        ):
            with pytest.raises(OutputError):
                attempt()
        assert out.read_text() == "mine"

    def test_int8_needs_images(self, tmp_path):
        with pytest.raises(DataError, match="no images"):
            export_engine(
                checkpoint("yolov8n"),
                imgsz_px=IMGSZ_PX,
                out=tmp_path / "a.engine",
                options=EngineOptions(precision="int8"),
            )

    @pytest.mark.parametrize("words", [[], ["half=true"], ["dla=0", "half=true"]])
    def test_the_verb_says_where_an_engine_is_built(self, words, tmp_path, capsys):
        out = tmp_path / "exports"
        command = ["export", f"model={checkpoint('yolov8n')}", f"out={out}", "format=onnx,engine", f"imgsz={IMGSZ_PX}"]
        assert main([*command, *words]) == 2
        assert "yolo-prune bundle target=jetson" in capsys.readouterr().err
        assert not out.exists()

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["dynamic=true"], "dynamic=true with batch=1"),
            (["dla=0"], "accelerator with precision fp32"),
            (["workspace=0"], "workspace=0"),
            (["timing_cache={picture}"], "holiday.jpg"),
            (["timing_cache={picture}/t.cache"], "cannot write"),
        ],
    )
    def test_what_cannot_be_is_told_before_any_work(self, words, said, tmp_path, capsys):
        picture = tmp_path / "holiday.jpg"
        picture.write_bytes(b"a picture")
        command = ["export", f"model={checkpoint('yolov8n')}", f"out={tmp_path / 'exports'}", "format=engine"]
        assert main([*command, f"imgsz={IMGSZ_PX}", *(word.format(picture=picture) for word in words)]) == 2
        assert said in capsys.readouterr().err
        assert picture.read_bytes() == b"a picture"

    def test_settings_of_an_engine_are_for_engines(self, tmp_path, capsys):
        command = ["export", f"model={checkpoint('yolov8n')}", f"out={tmp_path / 'a'}", "format=onnx", "sparse=true"]
        assert main(command) == 2
        assert "format=engine" in capsys.readouterr().err

    def test_precision_is_in_the_file_from_version_11_on(self):
        options = EngineOptions(precision="fp16")
        assert [onnx_precision(Version(*version), options) for version in ((8, 6), (10, 3), (11, 1))] == [
            "fp32",
            "fp32",
            "fp16",
        ]


@without_tensorrt
class TestTrtexec:
    """A program in its stead that takes its words and leaves a plan."""

    @pytest.fixture
    def program(self, tmp_path, monkeypatch):
        path = tmp_path / "bin" / "trtexec"
        path.parent.mkdir()
        path.write_text(
            f"#!{sys.executable}\n"
            "import pathlib, sys\n"
            "print('&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec')\n"
            "words = dict(word.partition('=')[::2] for word in sys.argv[1:])\n"
            "if '--fp16' in words:\n"
            "    print('[I] parsing')\n"
            "    print('[E] Error[2]: out of memory')\n"
            "    sys.exit(1)\n"
            "if '--saveEngine' in words:\n"
            "    text = '\\n'.join(word for word in sys.argv[1:] if not word.startswith('--saveEngine'))\n"
            "    pathlib.Path(words['--saveEngine']).write_text('ptrt' + text)\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(path.parent))
        return path

    @pytest.mark.usefixtures("program")
    def test_builds(self, tmp_path):
        cache = tmp_path / "new" / "timing.cache"
        out = build_engine(
            exported("yolov8n"), tmp_path / "å b.engine", EngineOptions(workspace_mib=9), timing_cache=cache
        )
        assert cache.parent.is_dir()  # trtexec makes none
        file = EngineFile.read(out)
        assert file.metadata["task"] == "detect"
        words = file.plan.decode().removeprefix("ptrt").splitlines()
        assert words == [
            f"--onnx={exported('yolov8n')}",
            "--skipInference",
            "--memPoolSize=workspace:9",
            f"--timingCacheFile={cache}",
        ]

    @pytest.mark.usefixtures("program")
    def test_int8_needs_an_earlier_calibration(self, tmp_path):
        images = [np.zeros((1, 3, IMGSZ_PX, IMGSZ_PX), np.float32)]
        calibration = Calibration(images, cache=tmp_path / "ranges")
        options = EngineOptions(precision="int8")
        cache = tmp_path / "new" / "timing.cache"
        with pytest.raises(ConfigError, match="trtexec, which cannot calibrate"):
            build_engine(exported("yolov8n"), tmp_path / "a.engine", options, calibration, timing_cache=cache)
        assert {path.name for path in tmp_path.iterdir()} == {"bin"}

    @pytest.mark.usefixtures("program")
    def test_failure_tells_its_errors(self, tmp_path, capsys):
        cache = tmp_path / "new" / "timing.cache"
        with pytest.raises(ExportError, match="out of memory") as error:
            build_engine(
                exported("yolov8n"), tmp_path / "a.engine", EngineOptions(precision="fp16"), timing_cache=cache
            )
        assert "parsing" not in str(error.value)
        assert "--saveEngine" not in str(error.value)  # its folder is gone when the user runs the command
        assert not capsys.readouterr().out
        assert {path.name for path in tmp_path.iterdir()} == {"bin"}

    @pytest.mark.usefixtures("program")
    def test_everything_is_printed_if_asked_for(self, tmp_path, capsys):
        with pytest.raises(ExportError):
            build_engine(exported("yolov8n"), tmp_path / "a.engine", EngineOptions(precision="fp16"), verbose=True)
        assert "[I] parsing" in capsys.readouterr().out

    def test_program_that_is_no_trtexec(self, program):
        program.write_text(f"#!{sys.executable}\nprint('hello')\n")
        with pytest.raises(ConfigError, match="does not say its version"):
            trtexec.trtexec_version(program)
