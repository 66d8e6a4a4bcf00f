"""ONNX files as TensorRT wants them, in the precision that it shall compute in."""

from __future__ import annotations

import ast
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from yolo_prune.device.onnx_facts import OnnxFacts
from yolo_prune.device.runtimes import Array
from yolo_prune.device.runtimes.base import Precision
from yolo_prune.device.tensorrt_recipe import BITS, decoding_nodes, last_convolutions
from yolo_prune.errors import DataError
from yolo_prune.export.feeds import Feeds, in_batches
from yolo_prune.export.half_precision import to_half
from yolo_prune.files import new_file
from yolo_prune.hosts.ultralytics.export import export_model

OPSET = 17
"""The newest that TensorRT 8.6 knows; nothing in these networks needs a later one."""

# Share of the activations that int8 has to reach. Measured with yolov8n trained on COCO, 320 px, 24 images to calibrate
# and 24 others: the score of anchors above 0.25 is off by 0.046 in the mean; by 0.113 with 99.9, by 0.052 with 99.999,
# by 0.085 with the largest activation or with ONNX Runtime's entropy.
_PERCENTILE = 99.99


def export_typed_onnx(
    checkpoint: Path,
    *,
    imgsz_px: int,
    out: Path,
    precision: Precision = "fp32",
    images: Sequence[Array] = (),
    batch: int = 1,
    dynamic: bool = False,
    end_to_end: bool = False,
) -> Path:
    """Export a checkpoint to ONNX for TensorRT, the precision written into the graph.

    TensorRT 11 takes such a file alone; earlier versions take it too. The decoding of the head stays in float32.

    Args:
        checkpoint: A `.pt` file of the host, dense or slim.
        imgsz_px: Side of the square input.
        out: Where the file shall stand; nothing may stand there yet.
        precision: fp16: weights and activations in 16 bits, inputs and outputs in 32. int8: see `quantize`.
        images: For int8: inputs (1, 3, imgsz_px, imgsz_px), letterboxed as they will be.
        batch: Images in a call; the most of them if `dynamic`.
        dynamic: Leave batch size and image side open; an engine fixes or bounds them.
        end_to_end: See `export_model`.

    Returns:
        `out`.

    Raises:
        DataError: int8 and no images.
        YoloPruneError: As `export_model` raises.
    """
    if precision == "int8":
        require_images(images)
    with new_file(out) as temporary:
        temporary.unlink()
        export_model(
            checkpoint,
            format="onnx",
            imgsz_px=imgsz_px,
            out=temporary,
            end_to_end=end_to_end,
            opset=OPSET,
            batch=batch,
            dynamic=dynamic,
        )
        set_precision(temporary, precision, images=images, batch=batch)
    return out


def set_precision(onnx: Path, precision: Precision, *, images: Sequence[Array] = (), batch: int = 1) -> None:
    """Rewrite an ONNX file in fp32 for another precision, in place; the host's metadata say so afterwards.

    Args:
        onnx: The file.
        precision: See `export_typed_onnx`.
        images: For int8: inputs (1, 3, H, W) of the network.
        batch: Images in a call, where the file fixes it.

    Raises:
        ExportError: A weight lies outside of what 16 bits can hold.
    """
    import onnx as package

    if precision == "fp32":
        return
    if precision == "fp16":
        model = to_half(package.load(onnx), keep=decoding_nodes(OnnxFacts.read(onnx).nodes))
    else:
        model = quantize(onnx, images, batch=batch)
    for entry in model.metadata_props:
        if entry.key == "args":
            entry.value = str({**ast.literal_eval(entry.value), "quantize": BITS[precision]})
    package.save(model, onnx)


def require_images(images: Sequence[object]) -> None:
    """Refuse to quantize without images.

    Raises:
        DataError: There are none.
    """
    if not images:
        raise DataError(
            "no images to calibrate int8 with",
            expected="some hundreds of the model's own kind",
            remedy="give a data yaml (data=...) whose train split has readable images",
        )


def quantize(onnx: Path, images: Sequence[Array], *, batch: int = 1) -> Any:
    """Quantize the convolutions of an ONNX file for TensorRT.

    Symmetric int8, weights by output channel, both by pairs of QuantizeLinear and DequantizeLinear (TensorRT fuses them
    into the convolutions; before version 10 it wants them on weights as well); biases stay in floating point. The
    last convolutions of the head and its decoding are left as they are. Scales are float32: those of a slim network's
    smallest channels underflow in 16 bits.

    Args:
        onnx: A file in fp32.
        images: Inputs (1, 3, H, W) of the network.
        batch: Images in a call, where the file fixes it.

    Returns:
        The quantized `onnx.ModelProto`.
    """
    import onnx as package
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    facts = OnnxFacts.read(onnx)
    target = onnx.with_suffix(".quantized.onnx")
    try:
        with _quiet():
            quantize_static(
                onnx,
                target,
                Feeds(facts.image_input.name, in_batches(images, batch)),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_exclude=[*decoding_nodes(facts.nodes), *last_convolutions(facts.nodes)],
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.Percentile,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "AddQDQPairToWeight": True,
                    "QuantizeBias": False,
                    "CalibPercentile": _PERCENTILE,
                },
            )
        quantized = package.load(target)
    finally:
        target.unlink(missing_ok=True)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(package.load(onnx, load_external_data=False).metadata_props)
    return quantized


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the calibration prints, and its advice to simplify the graph first: the host has done it."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
