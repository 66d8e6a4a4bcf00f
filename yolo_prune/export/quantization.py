"""8-bit artefacts, made from float32 ones with calibration images: one set of images and one rule for every format.

The host's own INT8 exports read a data yaml and write label caches beside the user's images, and its ONNX has one scale
for all filters of a layer. Measured with yolov8n (COCO) at 320 px on 252 images of COCO val, calibrated on 64 of train,
in mAP50-95, where float32 has 0.3203: the host's ONNX 0.3044; a scale a filter 0.3135; and the last convolutions in
float32 0.3148; and activations clipped at percentile 99.99 0.3188, at the mean of each image's extremes 0.3197, which
is what `quantize_onnx` does: it takes a fifth of the time and holds no activations in memory.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yolo_prune.device.runtimes import Array
from yolo_prune.errors import DataError, ExportError, MissingDependencyError
from yolo_prune.export.feeds import Feeds
from yolo_prune.export.metadata import write_metadata
from yolo_prune.export.quantization_ncnn import quantize_ncnn, require_tools
from yolo_prune.files import cannot_write
from yolo_prune.hosts.refusals import host_errors_as

_WEIGHTED = ("Conv", "Gemm", "MatMul")


def require_quantizer(format: str) -> None:  # noqa: A002  (the host's word)
    """Refuse 8 bit for a format whose tools are not there.

    Raises:
        ConfigError: NCNN's tools are not on the PATH.
        MissingDependencyError: A package is not installed.
    """
    package = {"onnx": "onnxruntime", "openvino": "nncf"}.get(format)
    if package and importlib.util.find_spec(package) is None:
        extra = {"onnxruntime": "export", "nncf": "int8"}[package]
        raise MissingDependencyError(package, extra=extra, purpose=f"quantize {format.upper()} to 8 bit")
    if format == "ncnn":
        require_tools()


def quantize(artefact: Path, inputs: Sequence[Array], out: Path, *, format: str) -> Path:  # noqa: A002
    """Write an 8-bit copy of a float32 artefact.

    Args:
        artefact: What the host exported.
        inputs: Calibration images in [0, 1], (B, 3, H, W) each as the network takes them.
        out: A new path.
        format: "onnx", "openvino" or "ncnn".

    Returns:
        `out`; its metadata says 8 bit, as the host's exporter notes it.

    Raises:
        DataError: There are no calibration images.
        ExportError: The quantizer failed.
        OutputError: `out` cannot be written.
    """
    if not inputs:
        raise DataError("no calibration images", expected="images of the train split", remedy="see `data=`")
    work = {"onnx": quantize_onnx, "openvino": quantize_openvino, "ncnn": quantize_ncnn}[format]
    with host_errors_as(ExportError, f"cannot quantize '{artefact.name}'", expected="an artefact of 8 bit"):
        try:
            work(artefact, inputs, out)
            write_metadata(out, arguments={"quantize": 8})
        except OSError as error:
            raise cannot_write(out, error) from error
    return out


def quantize_onnx(artefact: Path, inputs: Sequence[Array], out: Path) -> None:
    """Quantize an ONNX file with explicit Q/DQ nodes: one scale a filter, activations between their mean extremes.

    Boxes in pixels and scores in [0, 1] must not share a scale, so that what decodes them stays float, and so do the
    convolutions that it reads: their outputs are the distances and scores themselves.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    graph = onnx.load(artefact).graph
    last = last_convolutions(graph)
    excluded = [node.name for node in graph.node if node.op_type not in _WEIGHTED or node.name in last]
    quantize_static(
        artefact,
        out,
        Feeds(graph.input[0].name, inputs),
        nodes_to_exclude=excluded,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"CalibMovingAverage": True},  # of all images alike: none of them weighs more
    )


def last_convolutions(graph: Any) -> set[str]:
    """Return the names of the convolutions between which and an output of an ONNX graph none with weights lies.

    The one of DFL, an expectation over bins with constant weights and one filter, counts and is looked behind.
    """
    makers = {name: node for node in graph.node for name in node.output}
    filters = {weight.name: weight.dims[0] for weight in graph.initializer if weight.dims}
    waiting, seen, last = [output.name for output in graph.output], set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in makers:
            continue
        seen.add(name)
        node = makers[name]
        if node.op_type == "Conv":
            last.add(node.name)
        if node.op_type != "Conv" or filters.get(node.input[1]) == 1:
            waiting += node.input
    return last


def quantize_openvino(artefact: Path, inputs: Sequence[Array], out: Path) -> None:
    """Quantize an OpenVINO folder with NNCF; what decodes the head's outputs stays float, as with the host."""
    import nncf
    import openvino

    graph = next(artefact.glob("*.xml"))
    model = openvino.Core().read_model(graph)
    nodes = model.get_ordered_ops()
    sigmoids = [node.get_friendly_name() for node in nodes if node.get_type_name() == "Sigmoid"]
    head = sigmoids[-1].split("/", 1)[0]
    ignored = [name for name in map(_friendly, nodes) if name.startswith((f"{head}/", f"{head}.dfl"))]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(list(inputs)),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(inputs),
        ignored_scope=nncf.IgnoredScope(names=sorted({*ignored, *sigmoids})),
    )
    out.mkdir()
    openvino.save_model(quantized, out / graph.name, compress_to_fp16=False)
    shutil.copyfile(artefact / "metadata.yaml", out / "metadata.yaml")


def _friendly(node: Any) -> str:
    return str(node.get_friendly_name())
