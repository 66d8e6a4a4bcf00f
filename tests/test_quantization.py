"""8-bit artefacts: what is rounded, what stays float, and that they still find what PyTorch finds."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from yolo_prune.cli import main
from yolo_prune.device.detections import letterbox
from yolo_prune.device.images import synthetic_images
from yolo_prune.device.runtimes import runtime_for
from yolo_prune.errors import ConfigError, DataError, ExportError, MissingDependencyError
from yolo_prune.export.provenance import read_provenance
from yolo_prune.export.quantization import last_convolutions, quantize, require_quantizer
from yolo_prune.export.quantization_ncnn import TOOLS, Layer, quantize_ncnn, require_tools
from yolo_prune.export.quantization_ncnn import last_convolutions as last_ncnn_convolutions
from yolo_prune.hosts.ultralytics.export import export_model

IMGSZ_PX = 64
HAVE_NCNN_TOOLS = all(map(shutil.which, TOOLS))


@pytest.fixture(scope="module")
def inputs():
    return [letterbox(image, IMGSZ_PX)[0] for image in synthetic_images(4, IMGSZ_PX)]


@pytest.fixture(scope="module")
def onnx_file(dense_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return export_model(dense_checkpoint, format="onnx", imgsz_px=IMGSZ_PX, out=folder / "whole.onnx")


def run(artefact, image):
    with runtime_for(artefact, full_precision=True).load(artefact, imgsz_px=IMGSZ_PX, threads=1) as session:
        return session(image)[0], session.precision


class TestOnnx:
    @pytest.fixture(scope="class")
    def small(self, onnx_file, inputs, tmp_path_factory):
        return quantize(onnx_file, inputs, tmp_path_factory.mktemp("small") / "å 8.onnx", format="onnx")

    def test_convolutions_are_of_8_bits_but_the_last_ones(self, onnx_file, small):
        graph = onnx.load(small).graph
        makers = {name: node for node in graph.node for name in node.output}
        rounded = {
            node.name: all(name in makers and makers[name].op_type == "DequantizeLinear" for name in node.input[:2])
            for node in graph.node
            if node.op_type == "Conv"
        }
        last = last_convolutions(onnx.load(onnx_file).graph)
        assert last == {name for name, is_rounded in rounded.items() if not is_rounded}
        assert len(last) == 7  # three levels of boxes and of classes, and DFL
        assert len(rounded) > 50

    def test_every_filter_has_a_scale_of_its_own(self, small):
        graph = onnx.load(small).graph
        weights = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        kernels = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights]
        kernels = [node for node in kernels if weights[node.input[0]].ndim == 4]
        assert all(weights[node.input[0]].dtype == np.int8 for node in kernels)
        assert all(weights[node.input[1]].shape == weights[node.input[0]].shape[:1] for node in kernels)

    def test_it_runs_says_what_it_is_and_is_smaller(self, onnx_file, small, inputs):
        (whole, precision), (rounded, rounded_precision) = run(onnx_file, inputs[0]), run(small, inputs[0])
        assert (precision, rounded_precision) == ("fp32", "int8")
        assert whole.shape == rounded.shape
        assert np.isfinite(rounded).all()
        assert np.abs(whole - rounded).max() > 0
        assert np.corrcoef(whole[0, :4].ravel(), rounded[0, :4].ravel())[0, 1] > 0.9
        assert small.stat().st_size < 0.4 * onnx_file.stat().st_size

    def test_needs_images(self, onnx_file, tmp_path):
        with pytest.raises(DataError, match="no calibration images"):
            quantize(onnx_file, [], tmp_path / "small.onnx", format="onnx")

    def test_a_failure_of_the_quantizer(self, inputs, tmp_path):
        (tmp_path / "broken.onnx").write_bytes(b"nonsense")
        with pytest.raises(ExportError, match=r"cannot quantize 'broken\.onnx'"):
            quantize(tmp_path / "broken.onnx", inputs, tmp_path / "small.onnx", format="onnx")

    def test_the_last_convolutions_by_hand(self):
        """a feeds b, which a sigmoid follows, and c, which a softmax and DFL follow: a is not among the last."""

        def conv(name, reads, kernel):
            return helper.make_node("Conv", [reads, kernel], [f"{name}_out"], name)

        nodes = [conv("a", "x", "two"), conv("b", "a_out", "two"), helper.make_node("Sigmoid", ["b_out"], ["y"], "s")]
        nodes += [
            conv("c", "a_out", "two"),
            helper.make_node("Softmax", ["c_out"], ["p"], "p"),
            conv("dfl", "p", "one"),
        ]
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y", "dfl_out")]
        shapes = {"two": [2, 1, 1, 1], "one": [1, 2, 1, 1], "scalar": []}
        constants = [
            helper.make_tensor(name, TensorProto.FLOAT, s, [1.0] * int(np.prod(s))) for name, s in shapes.items()
        ]
        graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
        assert last_convolutions(graph) == {"b", "c", "dfl"}


class TestNcnn:
    def test_the_last_convolutions_by_hand(self):
        layers = [
            Layer("Input", "in", [], ["x"], []),
            Layer("Convolution", "a", ["x"], ["a_out"], ["0=16"]),
            Layer("Split", "split", ["a_out"], ["l", "r"], []),
            Layer("Convolution", "b", ["l"], ["b_out"], ["0=80"]),
            Layer("Convolution", "c", ["r"], ["c_out"], ["0=64"]),
            Layer("Softmax", "p", ["c_out"], ["p_out"], []),
            Layer("Convolution", "dfl", ["p_out"], ["d_out"], ["0=1"]),
            Layer("Concat", "out", ["b_out", "d_out"], ["out0"], []),
        ]
        assert last_ncnn_convolutions(layers) == {"b", "c", "dfl"}

    def test_without_the_tools(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        for check in (require_tools, lambda: require_quantizer("ncnn")):
            with pytest.raises(ConfigError, match=r"ncnn2table and ncnn2int8 not on the PATH[\s\S]*half=true"):
                check()

    def test_a_tool_that_fails(self, inputs, monkeypatch, tmp_path):
        for tool in TOOLS:
            (tmp_path / tool).write_text("#!/bin/sh\necho 'layer Thing not exists' >&2\nexit 3\n")
            (tmp_path / tool).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        whole = tmp_path / "whole"
        whole.mkdir()
        for name in ("model.ncnn.param", "model.ncnn.bin"):
            (whole / name).write_text("7767517\n0 0\n")
        with pytest.raises(ExportError, match="ncnn2table ended with 3: layer Thing not exists"):
            quantize_ncnn(whole, inputs, tmp_path / "small")

    @pytest.mark.skipif(not HAVE_NCNN_TOOLS, reason="needs NCNN's ncnn2table and ncnn2int8 on the PATH")
    def test_it_runs_says_what_it_is_and_is_smaller(self, dense_checkpoint, inputs, tmp_path):
        whole = export_model(dense_checkpoint, format="ncnn", imgsz_px=IMGSZ_PX, out=tmp_path / "whole_ncnn_model")
        small = quantize(whole, inputs, tmp_path / "å small_ncnn_model", format="ncnn")
        (expected, _), (found, precision) = run(whole, inputs[0]), run(small, inputs[0])
        assert precision == "int8"
        assert np.corrcoef(expected[0, :4].ravel(), found[0, :4].ravel())[0, 1] > 0.9
        sizes = [(folder / "model.ncnn.bin").stat().st_size for folder in (small, whole)]
        assert sizes[0] < 0.4 * sizes[1]


class TestOpenVino:
    def test_it_runs_says_what_it_is_and_decodes_in_float(self, dense_checkpoint, inputs, tmp_path):
        import openvino

        whole = export_model(dense_checkpoint, format="openvino", imgsz_px=IMGSZ_PX, out=tmp_path / "w_openvino_model")
        small = quantize(whole, inputs, tmp_path / "å s_openvino_model", format="openvino")
        (expected, _), (found, precision) = run(whole, inputs[0]), run(small, inputs[0])
        assert precision == "int8"
        assert np.corrcoef(expected[0, :4].ravel(), found[0, :4].ravel())[0, 1] > 0.9
        nodes = openvino.Core().read_model(next(small.glob("*.xml"))).get_ordered_ops()
        rounded = [node.get_friendly_name() for node in nodes if node.get_type_name() == "FakeQuantize"]
        assert len(rounded) > 50
        assert not [name for name in rounded if name.startswith(("__module.model.22/", "__module.model.22.dfl"))]


@pytest.mark.parametrize(
    ("format_name", "package", "extra"), [("onnx", "onnxruntime", "export"), ("openvino", "nncf", "int8")]
)
def test_a_missing_package_is_named_with_the_install_line(format_name, package, extra, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(MissingDependencyError, match=rf"'{package}'[\s\S]*yolo-prune\[{extra}\]"):
        require_quantizer(format_name)


@pytest.mark.exhaustive
@pytest.mark.data
def test_trained_weights_find_the_same_boxes(real_data, tmp_path):
    """All formats that can be had here, on real images, with few calibration images."""
    formats = ["onnx", "openvino", *(["ncnn"] if HAVE_NCNN_TOOLS else [])]
    data = real_data / "coco_subset" / "data.yaml"
    words = [f"model={real_data / 'weights' / 'yolov8n_coco.pt'}", f"data={data}", f"out={tmp_path}", "imgsz=320"]
    words += [f"format={','.join(formats)}", "int8=true", "calibration=16", "images=8", "map=false"]
    assert main(["export", *words]) == 0
    artefacts = sorted(tmp_path.iterdir())
    assert len(artefacts) == len(formats)
    for artefact in artefacts:
        told = read_provenance(artefact)
        assert (told.precision, told.calibration_images, told.verified) == ("int8", 16, True)
        assert told.parity["boxes"]["expected"] > 10
