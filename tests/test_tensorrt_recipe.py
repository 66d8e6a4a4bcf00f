"""What is decided about an engine, for TensorRT 8.6, 10 and 11; and the same decisions as words for trtexec."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from exported_onnx import exported, typed

from yolo_prune.device.onnx_facts import Node, OnnxFacts, Tensor
from yolo_prune.device.tensorrt_library import Version
from yolo_prune.device.tensorrt_recipe import (
    BatchRange,
    EngineOptions,
    Shapes,
    decoding_nodes,
    last_convolutions,
    make_recipe,
)
from yolo_prune.device.trtexec import decode_version, trtexec_command
from yolo_prune.errors import ConfigError

V8, V10, V11 = Version(8, 6), Version(10, 3), Version(11, 1)
NODES = (
    Node("/model.0/conv/Conv", "Conv"),
    Node("/model.22/cv2.0/cv2.0.2/Conv", "Conv"),
    Node("/model.22/Reshape", "Reshape"),
    Node("/model.22/dfl/Softmax", "Softmax"),
    Node("/model.22/Sigmoid", "Sigmoid"),
)
FACTS = OnnxFacts(17, (Tensor("images", 1, (1, 3, 64, 64)),), NODES, "fp32", {})
OPEN = replace(FACTS, inputs=(Tensor("images", 1, (-1, 3, -1, -1)),))
HALF, QUANTISED = replace(FACTS, precision="fp16"), replace(FACTS, precision="int8")
DECODING = {"/model.22/dfl/Softmax": "fp32", "/model.22/Sigmoid": "fp32"}
LAST = {"/model.22/cv2.0/cv2.0.2/Conv": "fp16"}
PREFER = "PREFER_PRECISION_CONSTRAINTS"


class TestPrecision:
    @pytest.mark.parametrize(
        ("version", "facts", "precision", "flags", "calibrate", "kept"),
        [
            (V8, FACTS, "fp32", (), False, {}),
            (V8, FACTS, "fp16", ("FP16", PREFER), False, DECODING),
            (V8, FACTS, "int8", ("INT8", "FP16", PREFER), True, {**DECODING, **LAST}),
            (V8, QUANTISED, "int8", ("INT8", "FP16", PREFER), False, {**DECODING, **LAST}),
            (V10, FACTS, "int8", ("INT8", "FP16", PREFER), True, {**DECODING, **LAST}),
            (V10, HALF, "fp16", ("FP16", PREFER), False, DECODING),
            (V11, FACTS, "fp32", (), False, {}),
            (V11, HALF, "fp16", (), False, {}),
            (V11, QUANTISED, "int8", (), False, {}),
        ],
    )
    def test_of_each_generation(self, version, facts, precision, flags, calibrate, kept):
        recipe = make_recipe(version, facts, EngineOptions(precision=precision), calibration=True)
        assert recipe.builder_flags == flags
        assert recipe.calibrate == calibrate
        assert recipe.kept == kept
        assert recipe.network_flags == (("EXPLICIT_BATCH",) if version == V8 else ())

    @pytest.mark.parametrize(
        ("version", "facts", "precision", "message"),
        [
            (V11, FACTS, "fp16", "weights of 16 bits"),
            (V11, FACTS, "int8", "QuantizeLinear"),
            (V11, HALF, "fp32", "written for fp16"),
            (V10, HALF, "int8", "written for fp16"),
            (V8, QUANTISED, "fp16", "written for int8"),
            (Version(8, 4), FACTS, "fp32", "JetPack 5.1"),
        ],
    )
    def test_that_a_file_cannot_have(self, version, facts, precision, message):
        with pytest.raises(ConfigError, match=message):
            make_recipe(version, facts, EngineOptions(precision=precision), calibration=True)

    def test_int8_needs_ranges(self):
        with pytest.raises(ConfigError, match="without calibration"):
            make_recipe(V10, FACTS, EngineOptions(precision="int8"), calibration=False)

    @pytest.mark.parametrize("name", ["yolov8n", "yolov8n-pose"])
    def test_kept_layers_of_a_real_network(self, name):
        """Towers compute in the lower precision, and what only moves values follows its neighbours."""
        facts = OnnxFacts.read(exported(name))
        kept = make_recipe(V10, facts, EngineOptions(precision="int8"), calibration=True).kept
        assert {key for key, value in kept.items() if value == "fp16"} == set(last_convolutions(facts.nodes))
        assert "/model.22/dfl/conv/Conv" in kept
        assert not any("/cv2.0/cv2.0.0/" in key or "Reshape" in key or "/model.21/" in key for key in kept)

    def test_indices_of_an_end_to_end_head_are_left_alone(self):
        facts = OnnxFacts.read(exported("yolo26n", end_to_end=True))
        kept = make_recipe(V10, facts, EngineOptions(precision="fp16"), calibration=False).kept
        operators = dict(facts.nodes)
        decoding = decoding_nodes(facts.nodes)
        assert {"Mod", "TopK", "GatherElements"} <= {operators[name] for name in decoding}
        assert {operators[name] for name in kept} <= {"Add", "Div", "Mul", "Sigmoid", "Sub"}
        assert all(decoding.index(name) < decoding.index("/model.23/TopK") for name in kept)
        assert len(last_convolutions(facts.nodes)) == 6


class TestShapes:
    OPTIONS = EngineOptions(imgsz_px=64, batch=BatchRange(1, 4, 8))

    def test_fixed(self):
        recipe = make_recipe(V10, FACTS, EngineOptions(imgsz_px=64), calibration=False)
        assert (recipe.shapes, recipe.batch) == (None, 1)

    def test_open(self):
        recipe = make_recipe(V10, OPEN, self.OPTIONS, calibration=False)
        assert recipe.shapes == Shapes((1, 3, 64, 64), (4, 3, 64, 64), (8, 3, 64, 64))
        assert recipe.batch == 4

    def test_open_batch_alone(self):
        facts = replace(FACTS, inputs=(Tensor("images", 1, (-1, 3, 64, 32)),))
        recipe = make_recipe(V10, facts, EngineOptions(batch=BatchRange(1, 2, 2)), calibration=False)
        assert recipe.shapes == Shapes((1, 3, 64, 32), (2, 3, 64, 32), (2, 3, 64, 32))

    @pytest.mark.parametrize(
        ("facts", "options"),
        [
            (OPEN, EngineOptions()),
            (OPEN, EngineOptions(imgsz_px=64)),
            (OPEN, EngineOptions(batch=BatchRange(1, 1, 1))),
            (FACTS, EngineOptions(imgsz_px=96)),
            (FACTS, EngineOptions(batch=BatchRange(1, 1, 2))),
        ],
    )
    def test_that_do_not_fit(self, facts, options):
        with pytest.raises(ConfigError):
            make_recipe(V10, facts, options, calibration=False)


class TestDeviceOptions:
    def test_accelerator(self):
        recipe = make_recipe(V8, FACTS, EngineOptions(precision="int8", dla_core=1), calibration=True)
        assert "GPU_FALLBACK" in recipe.builder_flags
        assert recipe.dla_core == 1

    @pytest.mark.parametrize(
        ("version", "facts", "precision", "message"),
        [
            (V11, HALF, "fp16", "TensorRT 11.1"),
            (V8, FACTS, "fp32", "precision fp32"),
            (V10, QUANTISED, "int8", "quantized"),
        ],
    )
    def test_accelerator_refused(self, version, facts, precision, message):
        with pytest.raises(ConfigError, match=message):
            make_recipe(version, facts, EngineOptions(precision=precision, dla_core=0), calibration=True)

    @pytest.mark.parametrize("version", [V8, V10, V11])
    def test_sparse_units(self, version):
        recipe = make_recipe(version, FACTS, EngineOptions(sparse=True), calibration=False)
        assert recipe.builder_flags == ("SPARSE_WEIGHTS",)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"precision": "bf16"},
            {"workspace_mib": 0},
            {"dla_core": -1},
            {"batch": BatchRange(0, 1, 1)},
            {"batch": BatchRange(1, 4, 2)},
        ],
    )
    def test_nonsense_is_refused(self, wrong):
        with pytest.raises(ConfigError):
            EngineOptions(**wrong)


class TestTrtexec:
    def command(self, version, facts, options, **more):
        recipe = make_recipe(version, facts, options, calibration=True)
        onnx, plan = Path("å b.onnx"), Path("å b.plan")
        program, onnx_word, plan_word, *words = trtexec_command(recipe, version=version, onnx=onnx, plan=plan, **more)
        assert (program, onnx_word, plan_word) == ("trtexec", "--onnx=å b.onnx", "--saveEngine=å b.plan")
        return words

    def test_plain(self):
        assert self.command(V8, FACTS, EngineOptions()) == ["--skipInference"]
        assert self.command(Version(8, 5), FACTS, EngineOptions()) == ["--buildOnly"]

    def test_everything(self):
        options = EngineOptions(
            precision="fp16", imgsz_px=64, batch=BatchRange(1, 2, 4), workspace_mib=512, dla_core=0, sparse=True
        )
        assert self.command(V10, OPEN, options, timing_cache=Path("t.cache"), verbose=True) == [
            "--skipInference",
            "--fp16",
            "--allowGPUFallback",
            "--sparsity=enable",
            "--minShapes=images:1x3x64x64",
            "--optShapes=images:2x3x64x64",
            "--maxShapes=images:4x3x64x64",
            "--precisionConstraints=prefer",
            "--layerPrecisions=/model.22/dfl/Softmax:fp32,/model.22/Sigmoid:fp32",
            "--layerOutputTypes=/model.22/dfl/Softmax:fp32,/model.22/Sigmoid:fp32",
            "--memPoolSize=workspace:512",
            "--useDLACore=0",
            "--timingCacheFile=t.cache",
            "--verbose",
        ]

    def test_precision_flags_end_with_version_10(self):
        assert self.command(V11, typed_facts("fp16"), EngineOptions(precision="fp16")) == ["--skipInference"]
        assert self.command(V11, typed_facts("int8"), EngineOptions(precision="int8")) == ["--skipInference"]

    def test_int8(self):
        words = self.command(V10, FACTS, EngineOptions(precision="int8"), calibration_cache=Path("ranges"))
        assert {"--int8", "--fp16", "--calib=ranges"} <= set(words)
        with pytest.raises(ConfigError, match="no calibration cache"):
            self.command(V10, FACTS, EngineOptions(precision="int8"))
        assert "--int8" in self.command(V10, QUANTISED, EngineOptions(precision="int8"))

    @pytest.mark.parametrize(
        ("number", "version"),
        [(8502, (8, 5)), (8601, (8, 6)), (100300, (10, 3)), (101303, (10, 13)), (110100, (11, 1))],
    )
    def test_version(self, number, version):
        assert decode_version(number) == version


def typed_facts(precision: str) -> OnnxFacts:
    return OnnxFacts.read(typed("yolov8n", precision))
