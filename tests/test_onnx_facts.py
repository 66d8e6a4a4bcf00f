"""Reading an ONNX file without the package `onnx`: it finds what the package finds."""

from __future__ import annotations

import onnx
import pytest
from exported_onnx import IMGSZ_PX, exported, typed
from onnx import TensorProto, helper

from yolo_prune.device.onnx_facts import OnnxFacts
from yolo_prune.errors import ConfigError


def small(path, *, inputs=None, **changes):
    """Write a network of one node."""
    inputs = inputs or [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="act")], "g", inputs, [])
    onnx.save(helper.make_model(graph, **changes), path)
    return path


@pytest.mark.parametrize("variant", [{}, {"dynamic": True}])
def test_finds_what_the_package_finds(variant):
    path = exported("yolov8n", **variant)
    model, facts = onnx.load(path), OnnxFacts.read(path)
    assert facts.opset == model.opset_import[0].version
    assert [tuple(node) for node in facts.nodes] == [(node.name, node.op_type) for node in model.graph.node]
    assert dict(facts.metadata) == {entry.key: entry.value for entry in model.metadata_props}
    side = -1 if variant else IMGSZ_PX
    assert facts.image_input == ("images", TensorProto.FLOAT, (-1 if variant else 1, 3, side, side))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_precision_is_read_from_the_graph(precision):
    assert OnnxFacts.read(typed("yolov8n", precision)).precision == precision


def test_operators_of_other_domains_do_not_count(tmp_path):
    imports = [helper.make_opsetid("com.microsoft", 99), helper.make_opsetid("", 17)]
    assert OnnxFacts.read(small(tmp_path / "a.onnx", opset_imports=imports)).opset == 17


def test_a_number_needs_several_bytes(tmp_path):
    wide = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 300, 70_000])]
    assert OnnxFacts.read(small(tmp_path / "a.onnx", inputs=wide)).image_input.shape == (1, 3, 300, 70_000)


class TestRefused:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("args", "{'half'"),
            ("args", "'text'"),
            ("imgsz", "[64]"),
            ("names", "7"),
            ("batch", "x"),
            ("yolo_prune", "{"),
        ],
    )
    def test_damaged_notes(self, tmp_path, key, value):
        model = onnx.load(small(tmp_path / "a.onnx"))
        helper.set_model_props(model, {key: value})
        onnx.save(model, tmp_path / "a.onnx")
        with pytest.raises(ConfigError, match="its metadata are damaged"):
            OnnxFacts.read(tmp_path / "a.onnx")

    @pytest.mark.parametrize(
        "inputs",
        [
            [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 3, 8, 8])],
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 8, 8])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy"],
        ],
    )
    def test_other_inputs(self, tmp_path, inputs):
        with pytest.raises(ConfigError, match="has inputs"):
            OnnxFacts.read(small(tmp_path / "a.onnx", inputs=inputs))

    @pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\x08", b"\x3a\xff\xff"])
    def test_not_an_onnx_file(self, tmp_path, content):
        path = tmp_path / "a.onnx"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"a\.onnx"):
            OnnxFacts.read(path)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
    def test_cut_off(self, tmp_path, share):
        data = exported("yolov8n").read_bytes()
        path = tmp_path / "a.onnx"
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ConfigError, match=r"a\.onnx"):
            OnnxFacts.read(path)

    def test_absent(self, tmp_path):
        with pytest.raises(ConfigError, match="absent"):
            OnnxFacts.read(tmp_path / "absent.onnx")
