"""The contract with TensorRT's parser: every rule refuses a graph that breaks it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from exported_onnx import exported, typed
from onnx import TensorProto, helper, numpy_helper

from yolo_prune.device.tensorrt_library import Version
from yolo_prune.device.tensorrt_recipe import BatchRange, EngineOptions
from yolo_prune.errors import ConfigError
from yolo_prune.export.onnx_contract import breaches, require_contract, sparse_convolutions

V8, V10, V11 = Version(8, 6), Version(10, 3), Version(11, 1)
PLAIN = EngineOptions()


def doctored(kind: str = "fp32", name: str = "yolov8n", **variant):
    return onnx.load(typed(name, kind, **variant))


def first(model, operator, *, fed_by: str | None = None):
    """Return the first node of an operator, or the first whose input 0 comes from an operator."""
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    return next(
        node for node in model.graph.node if node.op_type == operator and fed_by in (None, makers.get(node.input[0]))
    )


def constant(model, name):
    return next(item for item in model.graph.initializer if item.name == name)


def replace_constant(model, name, values):
    constant(model, name).CopyFrom(numpy_helper.from_array(np.asarray(values), name))


def set_attribute(node, name, value):
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def only_breach(model, version=V10, options=PLAIN) -> str:
    found = breaches(model, version, options)
    assert len(found) == 1, found
    return found[0]


class TestGraph:
    @pytest.mark.parametrize(("version", "opset", "known"), [(V8, 18, 17), (V10, 21, 20), (V11, 26, 25), (V8, 8, 17)])
    def test_opset(self, version, opset, known):
        model = doctored()
        model.opset_import[0].version = opset
        assert only_breach(model, version) == f"opset {opset}, where 9 to {known} are known"

    def test_unknown_operator(self):
        model = doctored()
        first(model, "Sigmoid").op_type = "Mish"
        assert "operator Mish" in only_breach(model)

    def test_operator_of_another_domain(self):
        model = doctored()
        first(model, "Sigmoid").domain = "com.microsoft"
        assert "domain com.microsoft" in only_breach(model)

    @pytest.mark.parametrize("dtype", [np.float64, np.uint8, np.uint16])
    def test_type_of_a_constant(self, dtype):
        model = doctored()
        name = first(model, "Conv").input[2]
        replace_constant(model, name, numpy_helper.to_array(constant(model, name)).astype(dtype))
        assert only_breach(model).startswith(
            f"'{name}' is of type {TensorProto.DataType.Name(constant(model, name).data_type)}"
        )

    def test_integer_weights(self):
        model = doctored()
        name = first(model, "Conv").input[1]
        replace_constant(model, name, numpy_helper.to_array(constant(model, name)).astype(np.int64))
        assert only_breach(model) == f"weight '{name}' is of type int64"

    def test_cast_to_64_bits(self):
        model = doctored(dynamic=True)
        set_attribute(first(model, "Cast"), "to", TensorProto.DOUBLE)
        options = EngineOptions(imgsz_px=64, batch=BatchRange(1, 1, 1))
        assert "casts to DOUBLE" in only_breach(model, V10, options)

    @pytest.mark.parametrize("end", ["input", "output"])
    def test_ends_in_16_bits(self, end):
        model = doctored()
        getattr(model.graph, end)[0].type.tensor_type.elem_type = TensorProto.FLOAT16
        assert "is of type FLOAT16, not FLOAT" in only_breach(model)

    def test_two_inputs(self):
        model = doctored()
        model.graph.input.add().CopyFrom(model.graph.input[0])
        assert "not one of images" in only_breach(model)

    def test_channels(self):
        model = doctored()
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
        assert "not one of images" in only_breach(model)

    def test_open_shapes_that_no_profile_covers(self):
        model = doctored(dynamic=True)
        assert breaches(model, V10, EngineOptions(imgsz_px=64, batch=BatchRange(1, 2, 2))) == []
        assert "batch size is open" in only_breach(model, V10, EngineOptions(imgsz_px=64))
        assert "image side is open" in only_breach(model, V10, EngineOptions(batch=BatchRange(1, 2, 2)))


class TestOperators:
    @pytest.mark.parametrize(
        ("name", "value"),
        [("mode", "cubic"), ("coordinate_transformation_mode", "tf_crop_and_resize"), ("nearest_mode", "odd")],
    )
    def test_resize(self, name, value):
        model = doctored()
        set_attribute(first(model, "Resize"), name, value)
        assert f"{name} '{value}'" in only_breach(model)

    def test_indices_of_pooling(self):
        model = doctored()
        first(model, "MaxPool").output.append("indices")
        assert "returns indices" in only_breach(model)

    def test_pooling_in_three_dimensions(self):
        model = doctored()
        set_attribute(first(model, "MaxPool"), "kernel_shape", [5, 5, 5])
        assert "not two-dimensional" in only_breach(model)

    def test_end_to_end_head_passes(self):
        for version in (V8, V10, V11):
            assert breaches(doctored(name="yolo26n", end_to_end=True), version, PLAIN) == []

    def test_selection_of_too_many(self):
        model = doctored(name="yolo26n", end_to_end=True)
        replace_constant(model, first(model, "TopK").input[1], np.array([4000]))
        assert "selects 4000" in breaches(model, V10, PLAIN)[0]

    def test_selection_of_a_number_that_is_computed(self):
        model = doctored(name="yolo26n", end_to_end=True)
        first(model, "TopK").input[1] = "elsewhere"
        assert "its k is not a constant" in only_breach(model, V8)
        assert breaches(model, V10, PLAIN) == []


class TestQuantization:
    def quantizer(self, model):
        return first(model, "QuantizeLinear")

    def test_zero_point_that_is_not_zero(self):
        model = doctored("int8")
        replace_constant(model, self.quantizer(model).input[2], np.int8(3))
        assert all("symmetric" in breach for breach in breaches(model, V10, PLAIN))
        assert breaches(model, V10, PLAIN)

    def test_unsigned(self):
        model = doctored("int8")
        replace_constant(model, self.quantizer(model).input[2], np.uint8(0))
        found = breaches(model, V10, PLAIN)
        assert any("UINT8" in breach for breach in found)
        assert any("symmetric" in breach for breach in found)

    def test_no_zero_point(self):
        model = doctored("int8")
        del self.quantizer(model).input[2]
        assert "has no zero point" in only_breach(model)

    @pytest.mark.parametrize("scale", [0.0, -0.1, np.nan, np.inf])
    def test_scale_that_is_not_positive(self, scale):
        model = doctored("int8")
        replace_constant(model, self.quantizer(model).input[1], np.float32(scale))
        found = breaches(model, V10, PLAIN)
        assert found
        assert all("is not positive" in breach for breach in found)

    def test_scale_that_is_computed(self):
        model = doctored("int8")
        self.quantizer(model).input[1] = "elsewhere"
        assert "scale of node" in only_breach(model)

    def test_scale_in_16_bits(self):
        model = doctored("int8")
        replace_constant(model, self.quantizer(model).input[1], np.float16(0.01))
        assert all("float16" in breach for breach in breaches(model, V8, PLAIN))
        assert breaches(model, V8, PLAIN)
        assert breaches(model, V10, PLAIN) == []

    def test_scales_along_the_input_channels(self):
        model = doctored("int8")
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] == "model.1.conv.weight_QuantizeLinear_Output":
                set_attribute(node, "axis", 1)
        assert "along axis 1" in only_breach(model)

    def test_quantized_bias(self):
        model = doctored("int8")
        first(model, "Conv").input[2] = self.quantizer(model).output[0]
        assert "bias of node" in only_breach(model)

    def test_weights_stored_in_int8(self):
        """Since TensorRT 10."""
        model = doctored("int8")
        reader = next(node for node in model.graph.node if node.input[0] == "model.1.conv.weight_QuantizeLinear_Output")
        weight = numpy_helper.to_array(constant(model, "model.1.conv.weight"))
        model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.int8), "stored"))
        reader.input[0] = "stored"
        assert "int8 weights" in only_breach(model, V8)
        assert breaches(model, V10, PLAIN) == []


class TestSparsity:
    SPARSE = EngineOptions(sparse=True)

    def pruned(self, model, name):
        values = numpy_helper.to_array(constant(model, name)).copy()
        values[:, 0::4] = values[:, 1::4] = 0
        replace_constant(model, name, values)

    def test_dense_weights_are_refused(self):
        assert "none of " in only_breach(doctored(), V10, self.SPARSE)

    def test_one_convolution_is_enough(self):
        model = doctored()
        self.pruned(model, "model.2.cv1.conv.weight")
        found, eligible = sparse_convolutions(model)
        assert found == ["model.2.cv1.conv.weight"]
        assert "model.0.conv.weight" not in eligible  # three input channels
        assert len(eligible) > 50
        assert breaches(model, V10, self.SPARSE) == []

    def test_pattern_runs_along_the_input_channels(self):
        model = doctored()
        name = "model.2.cv1.conv.weight"
        values = numpy_helper.to_array(constant(model, name)).copy()
        values[0::4] = values[1::4] = 0
        replace_constant(model, name, values)
        assert sparse_convolutions(model)[0] == []

    def test_through_quantization(self):
        model = doctored("int8")
        self.pruned(model, "model.2.cv1.conv.weight")
        assert sparse_convolutions(model)[0] == ["model.2.cv1.conv.weight"]


def test_every_breach_is_told_at_once(tmp_path):
    model = onnx.load(exported("yolov8n"))
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type = "Mish"
    model.opset_import[0].version = 18
    onnx.save(model, tmp_path / "å b.onnx")
    with pytest.raises(ConfigError, match="opset 18") as error:
        require_contract(tmp_path / "å b.onnx", V8, PLAIN)
    assert "å b.onnx" in str(error.value)
    assert "operator Mish" in str(error.value)
    assert " more" in str(error.value)
