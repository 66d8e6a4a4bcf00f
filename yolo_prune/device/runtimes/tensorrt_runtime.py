"""TensorRT on an NVIDIA GPU: engines that were built on the same device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Sequence

import numpy as np

from yolo_prune.device.cuda import CudaError, Stream
from yolo_prune.device.runtimes.base import Array, ArtefactFacts, Precision
from yolo_prune.device.runtimes.engine_file import EngineFile
from yolo_prune.device.runtimes.variants import require_words
from yolo_prune.device.tensorrt_library import Messages, require_tensorrt, version_text
from yolo_prune.errors import ConfigError

if TYPE_CHECKING:
    import tensorrt as trt


class EngineTensor(NamedTuple):
    """An input or output of an engine; a dimension of -1 is chosen at run time."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class TensorRtSession:
    """An engine with a context to run it in.

    Attributes:
        context: Holds what one run needs.
        stream: Where it runs, with its buffers on the GPU.
        image: The input.
        outputs: In the order of their names, as the host reads them: output0, output1.
        batch: Images that a call takes; None where it takes any number of its range.
        classes: Number of classes; None where the engine does not say.
        end_to_end: See `Session`.
        precision: The lowest of its layers.
    """

    context: trt.IExecutionContext
    stream: Stream
    image: EngineTensor
    outputs: tuple[EngineTensor, ...]
    batch: int | None
    classes: int | None
    end_to_end: bool
    precision: Precision

    def __call__(self, images: Array) -> list[Array]:
        """See `Session`; the copies to the GPU and back are part of the run."""
        self._set_shape(images)
        values = np.ascontiguousarray(images, self.image.dtype)
        self.context.set_tensor_address(self.image.name, self.stream.upload(self.image.name, values))
        shapes = [_sizes(self.context.get_tensor_shape(output.name)) for output in self.outputs]
        for output, shape in zip(self.outputs, shapes):
            size = int(np.prod(shape)) * output.dtype.itemsize
            self.context.set_tensor_address(output.name, self.stream.buffer(output.name, size))
        if not self.context.execute_async_v3(self.stream.handle):
            raise CudaError("TensorRT could not run the engine", expected="an engine that was built on this device")
        found = [self.stream.download(out.name, shape, out.dtype) for out, shape in zip(self.outputs, shapes)]
        self.stream.wait()
        return [values.astype(np.float32, copy=False) for values in found]

    def _set_shape(self, images: Array) -> None:
        """Choose the shape of a dynamic engine, or refuse one that it is not made for."""
        fits = all(size in (-1, got) for size, got in zip(self.image.shape, images.shape))
        if -1 in self.image.shape and fits:
            fits = self.context.set_input_shape(self.image.name, images.shape)
        if not fits:
            raise ConfigError(
                f"images {images.shape} for an engine with input {self.image.shape}",
                expected="images within the range that the engine was built for",
                remedy="build the engine again for this batch size and imgsz",
            )


@dataclass(frozen=True)
class TensorRtRuntime:
    """Runs `.engine` files, with the host's metadata before the plan or without."""

    name: str = "tensorrt"

    @staticmethod
    def accepts(artefact: Path) -> bool:
        """See `ArtefactRuntime`."""
        return artefact.suffix == ".engine" and artefact.is_file()

    @classmethod
    def of(cls, variant: Sequence[str], *, full_precision: bool = False) -> TensorRtRuntime:
        """See `ArtefactRuntime`; it runs in one way only, in the precision that the engine was built for."""
        del full_precision
        require_words(variant, (), backend="tensorrt")
        return cls()

    def version(self) -> str:
        """Return TensorRT's version."""
        return version_text()

    @contextlib.contextmanager
    def load(self, path: Path, *, imgsz_px: int, threads: int) -> Iterator[TensorRtSession]:
        """See `Runtime`; `threads` does not matter to a GPU."""
        del threads
        file = EngineFile.read(path)
        facts = ArtefactFacts.parse(file.metadata, path)
        facts.require_imgsz(path, imgsz_px)
        _, cuda = require_tensorrt()
        messages = Messages()
        with cuda.stream() as stream:
            engine = _deserialise(path, file, messages)
            image, outputs = _tensors(engine)
            context = engine.create_execution_context()
            if context is None:
                raise _refused(path, messages.errors)
            yield TensorRtSession(
                context=context,
                stream=stream,
                image=image,
                outputs=outputs,
                batch=image.shape[0] if image.shape[0] > 0 else None,
                classes=facts.classes,
                end_to_end=facts.end_to_end,
                precision=facts.precision,
            )


def _deserialise(path: Path, file: EngineFile, messages: Messages) -> trt.ICudaEngine:
    """Load the plan.

    Raises:
        ConfigError: It belongs to another version of TensorRT or to another GPU, or is damaged.
    """
    import tensorrt as trt

    runtime = trt.Runtime(messages.logger)
    core = file.metadata.get("dla")
    if core is not None:
        runtime.DLA_core = int(core)
    engine = runtime.deserialize_cuda_engine(file.plan)
    if engine is None:
        raise _refused(path, messages.errors)
    return engine


def _refused(path: Path, reasons: str) -> ConfigError:
    return ConfigError(
        f"TensorRT {version_text()} cannot load engine '{path}':\n    {reasons}",
        expected="an engine that this version of TensorRT built on this GPU: engines are valid nowhere else",
        remedy="build it again here from its ONNX file",
    )


def _tensors(engine: trt.ICudaEngine) -> tuple[EngineTensor, tuple[EngineTensor, ...]]:
    """Return the input and the outputs."""
    import tensorrt as trt

    names = sorted(engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
    tensors = {
        name: EngineTensor(
            name=name,
            shape=_sizes(engine.get_tensor_shape(name)),
            dtype=np.dtype(trt.nptype(engine.get_tensor_dtype(name))),
        )
        for name in names
    }
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    if len(inputs) != 1 or len(tensors[inputs[0]].shape) != 4:
        raise ConfigError(
            f"engine with inputs {[(name, tensors[name].shape) for name in inputs]}",
            expected="one input, images (B, 3, H, W)",
        )
    return tensors.pop(inputs[0]), tuple(tensors.values())


def _sizes(dimensions: trt.Dims) -> tuple[int, ...]:
    """Return TensorRT's dimensions as numbers."""
    return tuple(dimensions[index] for index in range(len(dimensions)))
