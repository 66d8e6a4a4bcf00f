"""From an ONNX file to an engine, on the device that will run it."""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping  # Python 3.8 cannot subscript collections.abc's

from yolo_prune.device.calibration import Calibration, calibrator
from yolo_prune.device.cuda import Stream
from yolo_prune.device.onnx_facts import PROVENANCE, OnnxFacts
from yolo_prune.device.runtimes.base import Precision
from yolo_prune.device.runtimes.engine_file import EngineFile
from yolo_prune.device.tensorrt_library import Messages, Version, is_installed, require_tensorrt
from yolo_prune.device.tensorrt_recipe import BITS, EngineOptions, Recipe, make_recipe
from yolo_prune.device.trtexec import find_trtexec, run_trtexec, trtexec_command, trtexec_version
from yolo_prune.errors import ConfigError, ExportError
from yolo_prune.files import new_file, parent_folders, require_writable, require_writable_folder

if TYPE_CHECKING:
    import tensorrt as trt

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """An engine that is to be built.

    Attributes:
        onnx: The ONNX file.
        out: Where the engine shall stand; nothing may stand there yet.
        options: What is asked of it.
        calibration: Images for int8, and where the ranges are kept.
        timing_cache: Timings of layers, read where it exists and written back: the next build takes a fraction. A file
            that is there has to be named *.cache; one of another GPU or version is neither used nor changed.
        verbose: Print everything that TensorRT says.
        progress: Called with every phase of the build (TensorRT 10 and newer).
    """

    onnx: Path
    out: Path
    options: EngineOptions
    calibration: Calibration | None = None
    timing_cache: Path | None = None
    verbose: bool = False
    progress: Progress | None = None


def build_engine(
    onnx: Path,
    out: Path,
    options: EngineOptions,
    calibration: Calibration | None = None,
    *,
    timing_cache: Path | None = None,
    verbose: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Build an engine, with TensorRT's Python package or else with `trtexec`.

    Args:
        onnx: See `Request`, as the rest.
        out: See `Request`.
        options: See `Request`.
        calibration: See `Request`.
        timing_cache: See `Request`.
        verbose: See `Request`.
        progress: See `Request`.

    Returns:
        `out`.

    Raises:
        ConfigError: The ONNX file, the options or the timing cache cannot be built from, or there is no GPU.
        DataError: There are no images to calibrate with.
        ExportError: TensorRT refused the ONNX file or failed to build it.
        MissingDependencyError: There is neither TensorRT's package nor trtexec.
        OutputError: `out` exists, or it or what is kept for later builds cannot be written.
    """
    request = Request(onnx, out, options, calibration, timing_cache, verbose, progress)
    require_writable(out)
    require_timing_cache(timing_cache)
    if calibration is not None and calibration.cache is not None:
        require_writable_folder(calibration.cache)
    facts = OnnxFacts.read(onnx)
    program = None if is_installed() else find_trtexec()
    plan = _build(request, facts) if program is None else _build_with(program, request, facts)
    EngineFile(plan=plan, metadata=engine_metadata(facts, options)).write(out)
    return out


def require_timing_cache(file: Path | None) -> None:
    """Refuse a file that is none, which the build would replace, and one that cannot be written.

    Raises:
        ConfigError: It exists and is not named *.cache.
        OutputError: Its folder cannot be written.
    """
    if file is None:
        return
    require_writable_folder(file)
    if file.exists() and (file.suffix != ".cache" or not file.is_file()):
        raise ConfigError(
            f"timing_cache={file}, which exists",
            expected="a file named *.cache, or one that is not there yet: a build writes it anew",
            remedy="choose another name",
        )


def engine_metadata(facts: OnnxFacts, options: EngineOptions) -> dict[str, Any]:
    """Return what the host wants to know of an engine: the ONNX file's own notes, and what the build changed.

    What was proved of the ONNX file is not proved of the engine.
    """
    arguments = ast.literal_eval(facts.metadata.get("args", "{}"))
    batch = {"batch": options.batch.most} if options.batch else {}
    dla = {} if options.dla_core is None else {"dla": options.dla_core}  # the host selects the core by it
    told = {**facts.metadata, **_unproved(facts.metadata, options.precision)}
    return {**told, "args": {**arguments, "quantize": BITS[options.precision], **batch}, **batch, **dla}


def _unproved(metadata: Mapping[str, Any], precision: Precision) -> dict[str, str]:
    """Return the entry in which artefacts of ours say where they come from, for one that was compared with nothing."""
    if PROVENANCE not in metadata:
        return {}
    known = json.loads(metadata[PROVENANCE])
    return {PROVENANCE: json.dumps({**known, "precision": precision, "parity": None, "accuracy": None})}


def _build_with(program: Path, request: Request, facts: OnnxFacts) -> bytes:
    """Build with `trtexec`."""
    version = trtexec_version(program)
    cache = request.calibration.existing_cache if request.calibration else None
    recipe = make_recipe(version, facts, request.options, calibration=request.calibration is not None)
    with parent_folders(request.timing_cache or request.out), tempfile.TemporaryDirectory(prefix="engine.") as folder:
        plan = Path(folder) / "plan"
        command = trtexec_command(
            recipe,
            version=version,
            onnx=request.onnx,
            plan=plan,
            timing_cache=request.timing_cache,
            calibration_cache=cache,
            program=program,
            verbose=request.verbose,
        )
        run_trtexec(command, verbose=request.verbose)
        return plan.read_bytes()


def _build(request: Request, facts: OnnxFacts) -> bytes:
    """Build with TensorRT's Python package."""
    version, cuda = require_tensorrt()
    recipe = make_recipe(version, facts, request.options, calibration=request.calibration is not None)
    if recipe.calibrate and request.calibration is not None:
        request.calibration.require_usable(recipe.batch)
    with cuda.stream() as stream:
        return _run_builder(request, recipe, version, stream)


def _run_builder(request: Request, recipe: Recipe, version: Version, stream: Stream) -> bytes:
    """Do what the recipe says; nothing is decided here."""
    import tensorrt as trt

    messages = Messages(verbose=request.verbose)
    builder = trt.Builder(messages.logger)
    if recipe.dla_core is not None:
        _require_core(builder, recipe.dla_core)
    network = builder.create_network(_bits(trt.NetworkDefinitionCreationFlag, recipe.network_flags))
    _parse(network, messages, request.onnx)
    _keep_precisions(network, recipe)
    config = builder.create_builder_config()
    config.flags |= _bits(trt.BuilderFlag, recipe.builder_flags)
    if recipe.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_mib << 20)
    if recipe.dla_core is not None:
        config.default_device_type = trt.DeviceType.DLA  # what it cannot run falls back to the GPU
        config.DLA_core = recipe.dla_core
    profile = _add_profile(builder, config, recipe)
    if recipe.calibrate and request.calibration is not None:
        config.int8_calibrator = calibrator(request.calibration, recipe, stream)
        if profile is not None:
            config.set_calibration_profile(profile)
    if request.progress is not None and version.major >= 10:
        config.progress_monitor = _monitor(request.progress)
    cache, ours = _attach_timing_cache(config, request.timing_cache)
    if not ours and request.progress is not None:
        request.progress(f"'{request.timing_cache}' is of another GPU or TensorRT: neither used nor changed")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failed(request.onnx, messages.errors)
    if request.timing_cache is not None and ours:
        _write(request.timing_cache, bytes(cache.serialize()))
    return bytes(plan)


def _bits(flags: Any, names: Iterable[str]) -> int:
    """Return flags, given by name, as TensorRT takes them."""
    return sum(1 << int(flags.__members__[name]) for name in names)


def _parse(network: trt.INetworkDefinition, messages: Messages, onnx: Path) -> None:
    """Read the ONNX file into the network.

    Raises:
        ExportError: The parser refused it; the message holds everything that it said.
    """
    import tensorrt as trt

    parser = trt.OnnxParser(network, messages.logger)
    if parser.parse_from_file(str(onnx)):
        return
    reasons = [str(parser.get_error(index)) for index in range(parser.num_errors)]
    raise ExportError(
        f"TensorRT cannot read '{onnx}':\n    " + "\n    ".join(reasons or [messages.errors]),
        expected="an ONNX file of operators that it knows",
        remedy="export the checkpoint again with yolo-prune; if it fails again, update TensorRT",
    )


def _keep_precisions(network: trt.INetworkDefinition, recipe: Recipe) -> None:
    """Hold the layers of the recipe in their precision; what computes with integers is left alone."""
    import tensorrt as trt

    types = {"fp32": trt.float32, "fp16": trt.float16}
    for layer in _layers(network):
        precision: Precision | None = recipe.kept.get(layer.name)
        if precision is None or layer.get_output(0).dtype != trt.float32:
            continue
        layer.precision = types[precision]
        for index in range(layer.num_outputs):
            layer.set_output_type(index, types[precision])


def _layers(network: trt.INetworkDefinition) -> Iterator[trt.ILayer]:
    return (network.get_layer(index) for index in range(network.num_layers))


def _require_core(builder: trt.Builder, core: int) -> None:
    """Refuse a deep learning accelerator that is not there.

    Raises:
        ConfigError: The device has no such core.
    """
    if core >= builder.num_DLA_cores:
        raise ConfigError(
            f"deep learning accelerator {core} of a device with {builder.num_DLA_cores}",
            expected="a core that the device has, counted from 0",
            remedy="leave dla= out to use the GPU",
        )


def _add_profile(builder: trt.Builder, config: trt.IBuilderConfig, recipe: Recipe) -> trt.IOptimizationProfile | None:
    """Tell the shapes of a dynamic input."""
    import tensorrt as trt

    if recipe.shapes is None:
        return None
    profile = builder.create_optimization_profile()
    least, best, most = (trt.Dims(list(shape)) for shape in recipe.shapes)
    profile.set_shape(recipe.input_name, min=least, opt=best, max=most)
    config.add_optimization_profile(profile)
    return profile


def _attach_timing_cache(config: trt.IBuilderConfig, file: Path | None) -> tuple[trt.ITimingCache, bool]:
    """Give the builder the timings of earlier builds; return them, and whether they may be written back."""
    known = file.read_bytes() if file is not None and file.is_file() else b""
    cache: trt.ITimingCache | None = config.create_timing_cache(known)  # None of bytes that are no timings
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return cache, True
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache, not known


def _monitor(progress: Progress) -> trt.IProgressMonitor:
    """Return what TensorRT reports its phases to."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        """Passes on the phases below no other."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            if not parent_phase:
                progress(f"{phase_name} ({num_steps} steps)")

        def step_complete(self, phase_name: str, step: int) -> bool:
            del phase_name, step
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            del phase_name

    return Monitor()


def _write(path: Path, data: bytes) -> None:
    """Write a cache of our own."""
    with new_file(path, replace=True) as temporary:
        temporary.write_bytes(data)


def _failed(onnx: Path, reasons: str) -> ExportError:
    return ExportError(
        f"TensorRT cannot build an engine of '{onnx}':\n    {reasons}",
        expected="an engine",
        remedy="free memory on the GPU, or allow TensorRT more with workspace=; verbose=true prints all that it says",
    )
