"""NCNN on the CPU or, with Vulkan, on a GPU, through its Python bindings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Sequence

import numpy as np

from yolo_prune.device.runtimes.base import Array, ArtefactFacts, Precision, import_runtime, unreadable
from yolo_prune.device.runtimes.variants import require_words, variant_name
from yolo_prune.errors import ConfigError


@dataclass(frozen=True)
class NcnnSession:
    """A loaded net and the names of its blobs."""

    package: Any
    net: Any
    input_name: str
    output_names: tuple[str, ...]
    classes: int | None
    end_to_end: bool
    precision: Precision
    batch: ClassVar[int] = 1

    def __call__(self, images: Array) -> list[Array]:
        """See `Session`; NCNN itself has no batch axis, so images go one by one."""
        return [np.stack(outputs) for outputs in zip(*map(self._run, images))]

    def _run(self, image: Array) -> list[Array]:
        """Run one image (3, H, W)."""
        with self.net.create_extractor() as extractor:
            extractor.input(self.input_name, self.package.Mat(image))
            return [np.array(extractor.extract(name)[1]) for name in self.output_names]


@dataclass(frozen=True)
class NcnnRuntime:
    """Runs folders with a `.param` and a `.bin` file.

    Attributes:
        full_precision: Compute in float32 even where NCNN would by default compute in half precision (ARM). Default
            options are what a deployed model runs with, so latency is measured with them; whether the artefact says the
            same as PyTorch must not depend on the CPU that happens to ask.
        vulkan: Run on the GPU that Vulkan finds first.
    """

    full_precision: bool = False
    vulkan: bool = False

    @staticmethod
    def accepts(artefact: Path) -> bool:
        """See `ArtefactRuntime`."""
        return artefact.is_dir() and any(artefact.glob("*.param"))

    @classmethod
    def of(cls, variant: Sequence[str], *, full_precision: bool = False) -> NcnnRuntime:
        """See `ArtefactRuntime`."""
        require_words(variant, ["vulkan"], backend="ncnn")
        return cls(full_precision=full_precision, vulkan="vulkan" in variant)

    @property
    def name(self) -> str:
        """The backend's name; see `Runtime`."""
        return variant_name("ncnn", ("vulkan",) if self.vulkan else ())

    def version(self) -> str:
        """Return ncnn's version."""
        return str(_package().__version__)

    @contextlib.contextmanager
    def load(self, path: Path, *, imgsz_px: int, threads: int) -> Iterator[NcnnSession]:
        """See `Runtime`."""
        package = _package()
        if self.vulkan:
            _require_vulkan(package)
        facts = ArtefactFacts.of_folder(path)
        facts.require_imgsz(path, imgsz_px)
        net = package.Net()
        self._configure(net.opt, threads)
        _read(net, path)
        yield NcnnSession(
            package=package,
            net=net,
            input_name=net.input_names()[0],
            output_names=tuple(sorted(net.output_names())),  # out0, out1, ...: pnnx may list them in another order
            classes=facts.classes,
            end_to_end=facts.end_to_end,
            precision=facts.precision,
        )

    def _configure(self, options: Any, threads: int) -> None:
        """Set the net's options, which count only before it is loaded."""
        options.use_vulkan_compute = self.vulkan
        options.num_threads = threads
        if self.full_precision:
            options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False


def _package() -> Any:
    """Import ncnn."""
    return import_runtime("ncnn", purpose="run NCNN models")


def _require_vulkan(package: Any) -> None:
    """Raise `ConfigError` where NCNN sees no GPU: it would run on the CPU without a word."""
    if package.get_gpu_count() == 0:
        raise ConfigError(
            "NCNN finds no GPU",
            expected="a GPU with a Vulkan driver (libvulkan.so.1 and the vendor's own)",
            remedy="apt install libvulkan1 mesa-vulkan-drivers, or leave @vulkan out",
        )


def _read(net: Any, folder: Path) -> None:
    """Load graph and weights; NCNN reports failures as return codes."""
    param = next(folder.glob("*.param"), None)
    if param is None:
        raise unreadable(folder, "no .param file")
    weights = param.with_suffix(".bin")
    for load, file in ((net.load_param, param), (net.load_model, weights)):
        code = load(str(file))
        if code != 0:
            raise unreadable(folder, f"NCNN returned {code} for {file.name}")
