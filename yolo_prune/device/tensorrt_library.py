"""TensorRT's Python package, where there is one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

from yolo_prune.device.cuda import Cuda, load_cuda
from yolo_prune.errors import MissingDependencyError

if TYPE_CHECKING:
    import tensorrt as trt

_LAST_MESSAGES = 10


class Version(NamedTuple):
    """A version of TensorRT."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read `10.3.0`."""
        major, minor = (int(part) for part in text.split(".")[:2])
        return cls(major, minor)

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


def tensorrt_version() -> Version:
    """Return the version of the installed package.

    Raises:
        MissingDependencyError: It is not installed.
    """
    return Version.parse(version_text())


def version_text() -> str:
    """Return the whole version of the installed package.

    Raises:
        MissingDependencyError: It is not installed.
    """
    if not is_installed():
        raise MissingDependencyError(
            "tensorrt",
            extra="tensorrt",
            purpose="build and run engines; on a Jetson it is part of JetPack (apt install python3-libnvinfer), "
            "which a virtual environment sees with --system-site-packages",
        )
    import tensorrt as trt

    return trt.__version__


def is_installed() -> bool:
    """Tell whether the package is there; one of type stubs alone has its name and nothing inside."""
    try:
        return hasattr(importlib.import_module("tensorrt"), "Builder")
    except ImportError:
        return False


def require_tensorrt() -> tuple[Version, Cuda]:
    """Return the version of TensorRT, and CUDA with a GPU.

    Raises:
        MissingDependencyError: TensorRT's package is not installed.
        ConfigError: There is no CUDA, or no GPU.
    """
    version = tensorrt_version()
    cuda = load_cuda()
    cuda.require_gpu()
    return version, cuda


class Messages:
    """What TensorRT says, of which the errors belong into ours.

    Attributes:
        logger: To be given to TensorRT, and to live as long as what it is given to.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        self._errors: list[str] = []
        self.logger = self._make_logger(verbose=verbose)

    @property
    def errors(self) -> str:
        """The last errors, one a line."""
        return "\n    ".join(self._errors[-_LAST_MESSAGES:]) or "TensorRT gave no reason"

    def _make_logger(self, *, verbose: bool) -> trt.ILogger:
        import tensorrt as trt

        errors = self._errors

        class Logger(trt.ILogger):
            """Keeps errors; prints everything else that is wanted."""

            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    errors.append(msg)
                elif verbose:
                    print(f"[TensorRT] {msg}", flush=True)

        return Logger()
