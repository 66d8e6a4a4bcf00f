"""Everything that is decided about an engine before TensorRT is asked: plain values in, plain values out.

Three generations are served. Up to TensorRT 10 a network is weakly typed: flags allow lower precisions, a calibrator
finds the ranges of int8, and single layers can be held in a higher precision. TensorRT 11 removed all of that: the
precision has to be in the ONNX file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Mapping, NamedTuple, Sequence

from yolo_prune.device.onnx_facts import Node, OnnxFacts
from yolo_prune.device.runtimes.base import PRECISIONS, Precision
from yolo_prune.device.tensorrt_library import Version
from yolo_prune.errors import ConfigError

STRONGLY_TYPED = 11
"""First major version that takes the precision from the ONNX file alone."""

BITS: Mapping[Precision, int | None] = {"fp32": None, "fp16": 16, "int8": 8}
"""What the host notes of a precision in an artefact's metadata."""

_USE_THE_GPU = "leave dla= out to use the GPU"
_OLDEST = (8, 5)  # the first with tensors called by name; JetPack 5.1 has it, JetPack 5.0 has 8.4
_COMPUTING = {"Add", "Conv", "Cos", "Div", "MatMul", "Mul", "Sigmoid", "Sin", "Softmax", "Sub"}  # others move values
_OF_MODULE = re.compile(r"/model\.(\d+)/")
_DECODING = r"/model\.{head}/(?:dfl/.+|[A-Z]\w*)$"  # nodes of the head's own forward, not of a tower inside it
_LAST_CONV = r"/model\.{head}/(?:one2one_)?(cv\d+\.\d+)/(?:one2one_)?\1\.\d+/Conv$"  # without batch norm


class BatchRange(NamedTuple):
    """Batch sizes of an engine for a dynamic ONNX file: the least, the one that it is tuned for, the most."""

    least: int
    best: int
    most: int


@dataclass(frozen=True)
class EngineOptions:
    """What is asked of an engine.

    Attributes:
        precision: The lowest precision of its layers.
        imgsz_px: Side of the square input; needed where the ONNX file leaves it open.
        batch: Range of batch sizes; needed where the ONNX file leaves it open.
        workspace_mib: Memory for scratch, MiB; None leaves it to TensorRT.
        dla_core: Deep learning accelerator of a Jetson; layers that it cannot run stay on the GPU. None uses the GPU.
        sparse: Use the sparse units where weights are 2:4 sparse (two of four neighbours along the input channels are
            zero).
    """

    precision: Precision = "fp32"
    imgsz_px: int | None = None
    batch: BatchRange | None = None
    workspace_mib: int | None = None
    dla_core: int | None = None
    sparse: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision '{self.precision}'", expected=f"one of {', '.join(PRECISIONS)}")
        if self.batch is not None and not 1 <= self.batch.least <= self.batch.best <= self.batch.most:
            raise ConfigError(f"batch sizes {tuple(self.batch)}", expected="1 <= least <= best <= most")
        for name, value, least in (("workspace", self.workspace_mib, 1), ("dla", self.dla_core, 0)):
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}", expected=f"at least {least}")
        if self.dla_core is not None and self.precision == "fp32":
            raise ConfigError(
                "deep learning accelerator with precision fp32",
                expected="fp16 or int8: it computes in nothing else",
                remedy=_USE_THE_GPU,
            )


class Shapes(NamedTuple):
    """Shapes of the input that an engine is made for: the least, the one that it is tuned for, the most."""

    least: tuple[int, ...]
    best: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """How an engine is built.

    Attributes:
        input_name: The input's name.
        batch: Images in a call that the engine is tuned for.
        shapes: For a dynamic ONNX file; None where its shapes are fixed.
        network_flags: Names of `NetworkDefinitionCreationFlag`s.
        builder_flags: Names of `BuilderFlag`s.
        calibrate: Ranges of int8 come from calibration.
        kept: Precision of single layers, by their node's name.
        workspace_mib: See `EngineOptions`.
        dla_core: See `EngineOptions`.
    """

    input_name: str
    batch: int
    shapes: Shapes | None = None
    network_flags: tuple[str, ...] = ()
    builder_flags: tuple[str, ...] = ()
    calibrate: bool = False
    kept: Mapping[str, Precision] = field(default_factory=dict)
    workspace_mib: int | None = None
    dla_core: int | None = None


def make_recipe(version: Version, facts: OnnxFacts, options: EngineOptions, *, calibration: bool) -> Recipe:
    """Decide how an engine is built.

    Args:
        version: Of the TensorRT that will build it.
        facts: Of the ONNX file.
        options: What is asked for.
        calibration: There are images, or the ranges that an earlier calibration left.

    Raises:
        ConfigError: It cannot be built this way; the message says what to change.
    """
    _require_known(version)
    _require_precision(version, facts, options, calibration=calibration)
    require_accelerator(version, options)
    _require_for_accelerator(facts, options)
    shapes = _shapes(facts, options)
    typed = version.major >= STRONGLY_TYPED
    kept = {} if typed else _kept(facts, options.precision)
    return Recipe(
        input_name=facts.image_input.name,
        batch=shapes.best[0] if shapes else facts.image_input.shape[0],
        shapes=shapes,
        network_flags=() if version.major >= 10 else ("EXPLICIT_BATCH",),  # later the only kind there is
        builder_flags=(
            *(() if typed else _precision_flags(options.precision)),
            *(("PREFER_PRECISION_CONSTRAINTS",) if kept else ()),
            *(("GPU_FALLBACK",) if options.dla_core is not None else ()),
            *(("SPARSE_WEIGHTS",) if options.sparse else ()),
        ),
        calibrate=options.precision == "int8" and facts.precision != "int8",
        kept=kept,
        workspace_mib=options.workspace_mib,
        dla_core=options.dla_core,
    )


def decoding_nodes(nodes: Sequence[Node]) -> list[str]:
    """Return the names of the nodes that turn the head's raw outputs into pixels and probabilities.

    They stay in float32: a coordinate beyond 512 px has steps of half a pixel in 16 bits, and 256 levels of int8 tell
    neither a box from its neighbour nor a score of 0.25 from one of 0.253. They compute next to nothing.
    """
    return _of_head(nodes, _DECODING)


def last_convolutions(nodes: Sequence[Node]) -> list[str]:
    """Return the names of the head's last convolutions, whose raw outputs int8 would spoil; they are small."""
    return _of_head(nodes, _LAST_CONV)


def _of_head(nodes: Sequence[Node], pattern: str) -> list[str]:
    """Return the nodes of the last module whose names have a pattern."""
    modules = [int(found) for node in nodes for found in _OF_MODULE.findall(node.name)]
    wanted = re.compile(pattern.format(head=max(modules, default=-1)))
    return [node.name for node in nodes if wanted.search(node.name)]


def _kept(facts: OnnxFacts, precision: Precision) -> dict[str, Precision]:
    """Return which layers are held above the precision of the others."""
    if precision == "fp32":
        return {}
    operators = [node.operator for node in facts.nodes]
    scored = facts.nodes[: operators.index("TopK")] if "TopK" in operators else facts.nodes  # indices follow
    computing = {node.name for node in scored if node.operator in _COMPUTING}
    kept: dict[str, Precision] = {}
    kept.update(dict.fromkeys((name for name in decoding_nodes(facts.nodes) if name in computing), "fp32"))
    if precision == "int8":
        kept.update(dict.fromkeys(last_convolutions(facts.nodes), "fp16"))
    return kept


def _precision_flags(precision: Precision) -> tuple[str, ...]:
    """Return the flags of a weakly typed network; what has no range for int8 takes 16 bits."""
    return {"fp32": (), "fp16": ("FP16",), "int8": ("INT8", "FP16")}[precision]


def _require_known(version: Version) -> None:
    if version < _OLDEST:
        raise ConfigError(
            f"TensorRT {version}",
            expected="TensorRT 8.5 or newer: JetPack 5.1 or 6, or a current package",
            remedy="update JetPack, or run the ONNX file with ONNX Runtime",
        )


def _require_precision(version: Version, facts: OnnxFacts, options: EngineOptions, *, calibration: bool) -> None:
    """Refuse a precision that this file cannot be built at."""
    asked, written = options.precision, facts.precision
    if written not in ("fp32", asked):
        raise ConfigError(
            f"{asked} asked of an ONNX file that is written for {written}",
            expected=f"precision {written}, or an ONNX file in fp32",
            remedy=f"ask for {written}, or export the checkpoint again",
        )
    if version.major >= STRONGLY_TYPED and written != asked:
        needed = {"fp16": "with weights of 16 bits", "int8": "with QuantizeLinear and DequantizeLinear"}[asked]
        raise ConfigError(
            f"{asked} asked of an ONNX file in fp32: TensorRT {version} takes the precision from the file",
            expected=f"an ONNX file {needed}",
            remedy="yolo-prune export format=engine writes one itself, from the checkpoint; or use TensorRT 10",
        )
    if asked == "int8" and written == "fp32" and not calibration:
        raise ConfigError(
            "int8 without calibration",
            expected="images, the cache of an earlier calibration, or an ONNX file that is quantized",
            remedy="give images of the kind that the model will see (data=...)",
        )


def require_accelerator(version: Version, options: EngineOptions) -> None:
    """Refuse a deep learning accelerator that this TensorRT does not build for.

    Raises:
        ConfigError: Its networks are strongly typed.
    """
    if options.dla_core is not None and version.major >= STRONGLY_TYPED:
        raise ConfigError(
            f"deep learning accelerator with TensorRT {version}",
            expected="TensorRT 8 or 10, whose networks are weakly typed",
            remedy=_USE_THE_GPU,
        )


def _require_for_accelerator(facts: OnnxFacts, options: EngineOptions) -> None:
    """Refuse a file that the deep learning accelerator cannot run."""
    if options.dla_core is not None and facts.precision == "int8":
        raise ConfigError(
            "deep learning accelerator with a quantized ONNX file",
            expected="an ONNX file in fp32 and calibration",
            remedy=_USE_THE_GPU,
        )


def _shapes(facts: OnnxFacts, options: EngineOptions) -> Shapes | None:
    """Return the shapes of a dynamic input.

    Raises:
        ConfigError: What the file leaves open is not given, or what it fixes is given otherwise.
    """
    batch, channels, height, width = facts.image_input.shape
    if options.imgsz_px is not None and not {height, width} <= {-1, options.imgsz_px}:
        raise ConfigError(
            f"imgsz={options.imgsz_px} asked of an ONNX file for {height} x {width} px",
            expected="the size that it was exported for",
            remedy="leave imgsz out, or export again at the wanted one",
        )
    if batch != -1 and options.batch is not None:
        raise ConfigError(
            f"batch sizes {tuple(options.batch)} asked of an ONNX file for batches of {batch}",
            expected="no range of batch sizes, or a dynamic ONNX file",
            remedy="export with dynamic=true",
        )
    if -1 not in facts.image_input.shape:
        return None
    if (batch == -1 and options.batch is None) or (-1 in (height, width) and options.imgsz_px is None):
        raise ConfigError(
            f"ONNX file with input {facts.image_input.shape}, -1 left open",
            expected="a range of batch sizes, and the image side, to tune the engine for",
            remedy="give batch and imgsz, or export without dynamic=true",
        )
    sides = (options.imgsz_px or height, options.imgsz_px or width)
    least, best, most = ((size, channels, *sides) for size in options.batch or BatchRange(batch, batch, batch))
    return Shapes(least, best, most)
