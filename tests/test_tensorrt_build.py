"""Building engines as far as it goes without a GPU: the right calls with the right arguments, and no others."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from exported_onnx import IMGSZ_PX, checkpoint, exported, typed
from recorded_tensorrt import StandIn, install

from yolo_prune.device.calibration import Calibration
from yolo_prune.device.onnx_facts import OnnxFacts
from yolo_prune.device.runtimes.engine_file import EngineFile
from yolo_prune.device.tensorrt_build import build_engine
from yolo_prune.device.tensorrt_recipe import BatchRange, EngineOptions
from yolo_prune.errors import ConfigError, DataError, ExportError, OutputError
from yolo_prune.export.tensorrt import export_engine

IMAGE = np.full((1, 3, IMGSZ_PX, IMGSZ_PX), 0.5, np.float32)


@pytest.fixture
def installed(monkeypatch):
    """Install the stand-in for a version."""
    return partial(install, monkeypatch)


class TestStandIn:
    """It refuses what TensorRT would refuse; without that the rest of this file proves little."""

    def test_wrong_name_and_wrong_arguments(self):
        config = StandIn("10.13.0", {}).make("IBuilderConfig")
        config.set_memory_pool_limit(0, pool_size=1)
        with pytest.raises(AttributeError, match="set_workspace"):
            config.set_workspace(1)
        with pytest.raises(AttributeError, match="max_workspace"):
            config.max_workspace = 1
        with pytest.raises(TypeError, match="set_memory_pool_limit"):
            config.set_memory_pool_limit(1)

    def test_what_version_11_has_no_more(self):
        trt = StandIn("11.1.0", {})
        assert "FP16" not in trt.BuilderFlag.__members__
        with pytest.raises(AttributeError, match="int8_calibrator"):
            trt.make("IBuilderConfig").int8_calibrator = None
        with pytest.raises(AttributeError, match="precision"):
            trt.make("ILayer").precision = trt.float32


def flags(trt, *names):
    return sum(1 << trt.BuilderFlag.__members__[name] for name in names)


class TestExport:
    @pytest.mark.parametrize(("version", "written"), [("10.3.0", "fp32"), ("11.1.0", "fp16")])
    def test_precision_goes_where_the_version_wants_it(self, installed, tmp_path, version, written):
        parsed = []

        def parse(path):
            parsed.append(OnnxFacts.read(Path(path)))
            return True

        trt = installed(version, OnnxParser__parse_from_file=parse)
        options = EngineOptions(precision="fp16")
        out = export_engine(checkpoint("yolov8n"), imgsz_px=IMGSZ_PX, out=tmp_path / "a.engine", options=options)
        assert [facts.precision for facts in parsed] == [written]
        assert (trt.calls("IBuilderConfig.flags") == [[0]]) == (written == "fp16")
        assert EngineFile.read(out).metadata["args"]["quantize"] == 16
        assert list(tmp_path.iterdir()) == [out]

    @pytest.mark.parametrize(
        ("version", "options", "batch", "error"),
        [
            ("11.1.0", EngineOptions(precision="fp16", dla_core=0), 1, ConfigError),
            ("10.3.0", EngineOptions(precision="int8"), 2, DataError),
        ],
    )
    def test_what_the_version_cannot_do_is_told_before_the_onnx_file_is_made(
        self, installed, tmp_path, monkeypatch, version, options, batch, error
    ):
        monkeypatch.setattr("yolo_prune.export.tensorrt.export_typed_onnx", None)
        installed(version)
        with pytest.raises(error, match=r"TensorRT 11\.1|1 images"):
            export_engine(
                checkpoint("yolov8n"),
                imgsz_px=IMGSZ_PX,
                out=tmp_path / "a.engine",
                options=options,
                batch=batch,
                images=[IMAGE],
            )

    def test_one_image_fills_the_batches_of_a_strongly_typed_network(self, installed, tmp_path):
        installed("11.1.0")
        options = EngineOptions(precision="int8")
        out = tmp_path / "a.engine"
        export_engine(
            checkpoint("yolov8n"), imgsz_px=IMGSZ_PX, out=out, options=options, batch=2, dynamic=True, images=[IMAGE]
        )
        assert EngineFile.read(out).metadata["batch"] == 2

    def test_a_folder_that_cannot_be_written_is_told_before_the_onnx_file_is_made(
        self, installed, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("yolo_prune.export.tensorrt.export_typed_onnx", None)
        installed("10.3.0")
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(OutputError, match="cannot write"):
            export_engine(checkpoint("yolov8n"), imgsz_px=IMGSZ_PX, out=tmp_path / "file" / "a.engine")

    def test_sparse_units_need_sparse_weights(self, installed, tmp_path):
        installed("10.3.0")
        options = EngineOptions(sparse=True)
        with pytest.raises(ConfigError, match="2:4 sparse"):
            export_engine(checkpoint("yolov8n"), imgsz_px=IMGSZ_PX, out=tmp_path / "a.engine", options=options)
        assert not list(tmp_path.iterdir())


class TestBuild:
    def test_plain(self, installed, tmp_path):
        trt = installed("11.1.0")
        out = build_engine(exported("yolov8n"), tmp_path / "å b.engine", EngineOptions())
        file = EngineFile.read(out)
        assert file.plan == b"ptrt plan"
        assert file.metadata["task"] == "detect"
        assert trt.calls("OnnxParser.parse_from_file") == [[str(exported("yolov8n"))]]
        assert trt.calls("IBuilderConfig.flags") == [[0]]
        assert trt.calls("Builder.create_network") == [[0]]
        assert list(tmp_path.iterdir()) == [out]

    @pytest.mark.parametrize(("version", "network"), [("8.6.1", 1), ("10.3.0", 0)])
    def test_fp16_of_a_weakly_typed_network(self, installed, tmp_path, version, network):
        trt = installed(version)
        build_engine(exported("yolov8n"), tmp_path / "a.engine", EngineOptions(precision="fp16"))
        assert trt.calls("Builder.create_network") == [[network]]
        assert trt.calls("IBuilderConfig.flags") == [[flags(trt, "FP16", "PREFER_PRECISION_CONSTRAINTS")]]
        assert trt.calls("ILayer.precision") == [[trt.float32]] * 2  # of four layers, the two that decode
        assert trt.calls("ILayer.set_output_type") == [[0, trt.float32]] * 2

    @pytest.mark.parametrize("precision", ["fp16", "int8"])
    def test_strongly_typed(self, installed, tmp_path, precision):
        trt = installed("11.1.0")
        build_engine(typed("yolov8n", precision), tmp_path / "a.engine", EngineOptions(precision=precision))
        assert trt.calls("IBuilderConfig.flags") == [[0]]
        assert not [call for call in trt.log if call[0].startswith("ILayer.")]

    @pytest.mark.parametrize(("version", "calibration_profiles"), [("8.6.1", 1), ("10.3.0", 1)])
    def test_calibration(self, installed, tmp_path, version, calibration_profiles):
        seen = []

        def build(*_):
            ((_, calibrator),) = [call for call in trt.log if call[0] == "IBuilderConfig.int8_calibrator"]
            assert (calibrator.get_batch_size(), calibrator.read_calibration_cache()) == (2, None)
            while addresses := calibrator.get_batch(["images"]):
                batch = (ctypes.c_float * (2 * IMAGE.size)).from_address(addresses[0])
                seen.append(np.ctypeslib.as_array(batch).mean())
            calibrator.write_calibration_cache(b"ranges")
            assert calibrator.read_calibration_cache() == b"ranges"
            return b"ptrt plan"

        trt = installed(version, Builder__build_serialized_network=build)
        calibration = Calibration([IMAGE * scale for scale in (0, 2, 1, 1, 1)], cache=tmp_path / "ranges")
        options = EngineOptions(precision="int8", imgsz_px=IMGSZ_PX, batch=BatchRange(1, 2, 4))
        build_engine(exported("yolov8n", dynamic=True), tmp_path / "a.engine", options, calibration)
        assert seen == [0.5, 0.5]
        assert (tmp_path / "ranges").read_bytes() == b"ranges"
        assert len(trt.calls("IBuilderConfig.set_calibration_profile")) == calibration_profiles
        assert trt.calls("IOptimizationProfile.set_shape") == [
            ["images", *((batch, 3, IMGSZ_PX, IMGSZ_PX) for batch in (1, 2, 4))]
        ]

    def test_quantized_file_is_not_calibrated(self, installed, tmp_path):
        trt = installed("10.3.0")
        build_engine(typed("yolov8n", "int8"), tmp_path / "a.engine", EngineOptions(precision="int8"))
        assert not trt.calls("IBuilderConfig.int8_calibrator")

    def test_too_few_images(self, installed, tmp_path):
        installed("10.3.0")
        with pytest.raises(DataError, match="0 images"):
            build_engine(
                exported("yolov8n"), tmp_path / "a.engine", EngineOptions(precision="int8"), Calibration(images=[])
            )

    def test_device_options(self, installed, tmp_path):
        trt = installed("10.3.0", Builder__num_DLA_cores=2)
        options = EngineOptions(precision="fp16", workspace_mib=64, dla_core=1, sparse=True)
        out = build_engine(exported("yolov8n"), tmp_path / "a.engine", options)
        assert trt.calls("IBuilderConfig.set_memory_pool_limit") == [[trt.MemoryPoolType.WORKSPACE, 64 << 20]]
        assert trt.calls("IBuilderConfig.DLA_core") == [[1]]
        assert trt.calls("IBuilderConfig.default_device_type") == [[trt.DeviceType.DLA]]
        wanted = flags(trt, "FP16", "PREFER_PRECISION_CONSTRAINTS", "GPU_FALLBACK", "SPARSE_WEIGHTS")
        assert trt.calls("IBuilderConfig.flags") == [[wanted]]
        assert EngineFile.read(out).metadata["dla"] == 1

    def test_accelerator_that_is_not_there(self, installed, tmp_path):
        trt = installed("10.3.0", Builder__num_DLA_cores=0)
        with pytest.raises(ConfigError, match="device with 0"):
            build_engine(exported("yolov8n"), tmp_path / "a.engine", EngineOptions(precision="fp16", dla_core=0))
        assert not trt.calls("OnnxParser.parse_from_file")

    def test_timing_cache_is_read_and_written_back(self, installed, tmp_path):
        cache = tmp_path / "timing.cache"
        cache.write_bytes(b"earlier")
        trt = installed("10.3.0")
        build_engine(exported("yolov8n"), tmp_path / "a.engine", EngineOptions(), timing_cache=cache)
        assert trt.calls("IBuilderConfig.create_timing_cache") == [[b"earlier"]]
        assert cache.read_bytes() == b"timings"

    @pytest.mark.parametrize("stated", ["create_timing_cache", "set_timing_cache"])
    def test_timing_cache_of_another_gpu_is_left_alone_and_told(self, installed, tmp_path, stated):
        """TensorRT makes none of its bytes, or does not take what it made."""
        cache, told = tmp_path / "timing.cache", []
        cache.write_bytes(b"earlier")
        trt = installed("10.3.0")
        answers = {
            "create_timing_cache": lambda known: None if known else trt.make("ITimingCache"),
            "set_timing_cache": lambda *_: len(trt.calls("IBuilderConfig.create_timing_cache")) == 2,
        }
        trt.stated["IBuilderConfig", stated] = answers[stated]
        build_engine(
            exported("yolov8n"), tmp_path / "a.engine", EngineOptions(), timing_cache=cache, progress=told.append
        )
        assert trt.calls("IBuilderConfig.create_timing_cache") == [[b"earlier"], [b""]]
        assert cache.read_bytes() == b"earlier"
        assert "neither used nor changed" in told[0]

    def test_a_file_that_is_no_timing_cache_is_not_replaced(self, installed, tmp_path):
        installed("10.3.0")
        (tmp_path / "holiday.jpg").write_bytes(b"a picture")
        with pytest.raises(ConfigError, match=r"holiday\.jpg"):
            build_engine(
                exported("yolov8n"), tmp_path / "a.engine", EngineOptions(), timing_cache=tmp_path / "holiday.jpg"
            )
        assert (tmp_path / "holiday.jpg").read_bytes() == b"a picture"

    def test_a_folder_that_cannot_be_written_is_told_before_the_build(self, installed, tmp_path):
        trt = installed("10.3.0")
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(OutputError, match="cannot write"):
            build_engine(exported("yolov8n"), tmp_path / "file" / "a.engine", EngineOptions())
        assert not trt.log

    @pytest.mark.parametrize("kept", ["timing", "ranges"])
    def test_what_a_build_keeps_has_to_be_writable_before_it(self, installed, tmp_path, kept):
        trt = installed("10.3.0")
        (tmp_path / "file").write_bytes(b"")
        place = tmp_path / "file" / f"{kept}.cache"
        options = EngineOptions(precision="int8")
        calibration = Calibration([IMAGE], cache=place if kept == "ranges" else None)
        timings = place if kept == "timing" else None
        with pytest.raises(OutputError, match=rf"{kept}\.cache"):
            build_engine(exported("yolov8n"), tmp_path / "a.engine", options, calibration, timing_cache=timings)
        assert not trt.log

    def test_progress(self, installed, tmp_path):
        phases = []
        trt = installed("10.3.0")
        build_engine(exported("yolov8n"), tmp_path / "a.engine", EngineOptions(), progress=phases.append)
        ((monitor,),) = trt.calls("IBuilderConfig.progress_monitor")
        monitor.phase_start("Building", "", 5)
        monitor.phase_start("Tactics", "Building", 2)
        assert monitor.step_complete("Building", 0) is True
        assert phases == ["Building (5 steps)"]

    def test_parser_errors_are_all_told(self, installed, tmp_path):
        installed(
            "10.3.0",
            OnnxParser__parse_from_file=lambda _: False,
            OnnxParser__num_errors=2,
            OnnxParser__get_error=lambda index: f"error {index}: unsupported",
        )
        with pytest.raises(ExportError, match=r"error 0: unsupported\n +error 1: unsupported"):
            build_engine(exported("yolov8n"), tmp_path / "a.engine", EngineOptions())
        assert not list(tmp_path.iterdir())

    def test_failed_build_tells_the_last_errors(self, installed, tmp_path):
        trt = installed("10.3.0")
        loggers = []
        create = trt.Builder
        trt.Builder = lambda logger: loggers.append(logger) or create(logger)

        def fail(*_):
            loggers[0].log(2, "only a warning")
            loggers[0].log(1, "out of memory")

        trt.stated["Builder", "build_serialized_network"] = fail
        with pytest.raises(ExportError, match="out of memory") as error:
            build_engine(exported("yolov8n"), tmp_path / "a.engine", EngineOptions())
        assert "warning" not in str(error.value)
