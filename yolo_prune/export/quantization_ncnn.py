"""8-bit NCNN networks: NCNN's own tools write them, from scales that are measured here.

NCNN quantizes the layers that a table names: for each a scale a filter, and one for its input. Those of the filters are
by `ncnn2table`; for inputs, its divergence (`method=kl`) cuts off what the next layer needs. Measured as in
`quantization`, but on 64 images, where float32 has 0.3824: everything by divergence 0.2176; the last convolutions in
float32 0.3582; and inputs by `method=aciq` 0.3430, by the mean of each image's extremes, as here, 0.3812.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from yolo_prune.device.runtimes import Array
from yolo_prune.device.runtimes.base import import_runtime
from yolo_prune.errors import ConfigError, ExportError

TOOLS = ("ncnn2table", "ncnn2int8")
PARAM, WEIGHTS = "model.ncnn.param", "model.ncnn.bin"

_LARGEST = 127  # of 8 bits with a sign
_OF_FILTERS = "_param_0"  # what NCNN adds to a layer's name in a table


class Layer(NamedTuple):
    """A line of a `.param` file: a layer, the blobs that it reads and writes, and its settings by number."""

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    settings: list[str]


def require_tools() -> None:
    """Refuse where NCNN's tools are missing.

    Raises:
        ConfigError: One of them is not on the PATH.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"int8=true for NCNN, and {' and '.join(missing)} not on the PATH",
            expected="NCNN's own tools for 8 bit, which its Python package lacks",
            remedy="build them from NCNN's repository (cmake -DNCNN_BUILD_TOOLS=ON), or export half=true",
        )


def quantize_ncnn(artefact: Path, inputs: Sequence[Array], out: Path) -> None:
    """Quantize an NCNN folder; the last convolutions and what decodes their outputs stay float.

    Args:
        artefact: What the host exported.
        inputs: Calibration images, (1, 3, H, W) each.
        out: A new folder.

    Raises:
        ConfigError: A tool is not on the PATH.
        ExportError: A tool failed.
    """
    require_tools()
    out.mkdir()
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        for file in (PARAM, WEIGHTS):
            shutil.copyfile(artefact / file, folder / file)
        filters = _scales_of_filters(folder, inputs[0])
        layers = read_layers(folder / PARAM)
        last = last_convolutions(layers)
        readers = {layer.name: layer.inputs[0] for layer in layers if layer.name in filters and layer.name not in last}
        scales = _scales_of_inputs(folder, inputs, readers)
        table = [filters[layer] for layer in readers] + [f"{layer} {scale:.6f}" for layer, scale in scales.items()]
        (folder / "table").write_text("\n".join(table) + "\n", encoding="utf-8")
        _run_tool(folder, "ncnn2int8", PARAM, WEIGHTS, "int8.param", "int8.bin", "table")
        shutil.move(folder / "int8.param", out / PARAM)
        shutil.move(folder / "int8.bin", out / WEIGHTS)
    shutil.copyfile(artefact / "metadata.yaml", out / "metadata.yaml")


def read_layers(param: Path) -> list[Layer]:
    """Read the layers of a `.param` file in text form."""
    layers = []
    for line in param.read_text(encoding="utf-8").splitlines()[2:]:  # behind a magic number and counts
        kind, name, count, made, *rest = line.split()
        reads, writes = int(count), int(count) + int(made)
        layers.append(Layer(kind, name, rest[:reads], rest[reads:writes], rest[writes:]))
    return layers


def last_convolutions(layers: Collection[Layer]) -> set[str]:
    """Return the names of the convolutions that no other one follows but that of DFL, which has one filter."""
    makers = {blob: layer for layer in layers for blob in layer.outputs}
    read = {blob for layer in layers for blob in layer.inputs}
    waiting, seen, last = [blob for blob in makers if blob not in read], set[str](), set[str]()
    while waiting:
        blob = waiting.pop()
        if blob in seen:
            continue
        seen.add(blob)
        layer = makers[blob]
        convolution = layer.kind.startswith("Convolution")
        if convolution:
            last.add(layer.name)
        if not convolution or "0=1" in layer.settings:
            waiting += layer.inputs
    return last


def _scales_of_filters(folder: Path, image: Array) -> dict[str, str]:
    """Return the line of the filters' scales by layer: 127 / the largest weight, whatever the image.

    The tool's `method=aciq` would clip weights as well, which costs 0.03 of mAP50-95.
    """
    np.save(folder / "image.npy", image[0])
    (folder / "images.txt").write_text("image.npy\n", encoding="utf-8")
    _, channels, height, width = image.shape
    shape = f"shape=[{width},{height},{channels}]"
    _run_tool(folder, "ncnn2table", PARAM, WEIGHTS, "images.txt", "first", shape, "method=kl", "type=1")
    lines = (folder / "first").read_text(encoding="utf-8").splitlines()
    named = {line.split(maxsplit=1)[0]: line for line in lines if line.strip()}
    return {name[: -len(_OF_FILTERS)]: line for name, line in named.items() if name.endswith(_OF_FILTERS)}


def _scales_of_inputs(folder: Path, inputs: Sequence[Array], readers: Mapping[str, str]) -> dict[str, float]:
    """Return the scale of every layer's input blob, from the mean over the images of its largest magnitude."""
    package = import_runtime("ncnn", purpose="calibrate NCNN models")
    net = package.Net()
    net.opt.lightmode = False  # or blobs vanish once they were read
    net.opt.use_vulkan_compute = False
    net.load_param(str(folder / PARAM))
    net.load_model(str(folder / WEIGHTS))
    peaks: dict[str, float] = dict.fromkeys(readers, 0.0)
    for image in inputs:
        with net.create_extractor() as extractor:
            extractor.input(net.input_names()[0], package.Mat(image[0]))
            for layer, blob in readers.items():
                peaks[layer] += float(np.abs(np.array(extractor.extract(blob)[1], copy=False)).max()) / len(inputs)
    return {layer: _LARGEST / peak if peak else 1.0 for layer, peak in peaks.items()}


def _run_tool(folder: Path, tool: str, *words: str) -> None:
    """Run one of NCNN's tools in a folder.

    Raises:
        ExportError: It failed, or died.
    """
    done = subprocess.run([tool, *words], cwd=folder, capture_output=True, text=True, check=False, errors="replace")
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise ExportError(
            f"{tool} ended with {done.returncode}: {last}",
            expected="a network that NCNN's tools can quantize",
            remedy="export half=true, or build the tools of the same release as the package `ncnn`",
        )
