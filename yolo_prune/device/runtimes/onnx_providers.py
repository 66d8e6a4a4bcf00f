"""ONNX Runtime's execution providers: opened as asked for, or refused; never another one in silence."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_prune.device.runtimes.base import import_runtime, unreadable
from yolo_prune.errors import ConfigError


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: ONNX Runtime's name of it.
        install: What brings it.
        helpers: Providers that take the operators which it lacks; the CPU always does.
        plugin: Module that brings it as a library of its own, which has to be registered.
    """

    name: str
    install: str
    helpers: tuple[str, ...] = ()
    plugin: str | None = None


_ELSEWHERE = "run it where an NVIDIA GPU and its driver (libcuda.so.1) are, or choose another provider"
_GPU_BUILD = "pip uninstall onnxruntime, then pip install onnxruntime-gpu: they share one folder"

PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", install="pip install onnxruntime"),
    "cuda": Provider("CUDAExecutionProvider", install=_GPU_BUILD),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        install=f"{_GPU_BUILD}; and pip install tensorrt, in the version that it was built for",
        helpers=("CUDAExecutionProvider",),
    ),
    "tensorrt_rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        install="pip install onnxruntime-ep-nv-tensorrt-rtx-cu13",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
    ),
}
"""By the word that chooses it."""


def open_session(package: Any, path: Path, options: Any, word: str) -> Any:
    """Open an inference session whose first provider is the wanted one.

    Args:
        package: The module `onnxruntime`.
        path: The ONNX file.
        options: Its session options.
        word: Key of `PROVIDERS`.

    Raises:
        ConfigError: The file cannot be read, or the provider is not there or did not start.
        MissingDependencyError: The provider's plugin is not installed.
    """
    provider = PROVIDERS[word]
    by_name: list[str] | None = [provider.name, *provider.helpers]
    if provider.plugin:
        options.add_provider_for_devices(_plugin_devices(package, provider, word)[:1], {})
        by_name = None  # names would take precedence over the devices
    elif provider.name not in package.get_available_providers():
        raise _absent(word, f"this ONNX Runtime has {', '.join(package.get_available_providers())}")
    elif word != "cpu" and hasattr(package, "preload_dlls"):
        package.preload_dlls()  # CUDA's libraries where pip put them, as importing torch would
    try:
        # Without `enable_fallback=0` it would print its complaint and open the file on the CPU.
        session = package.InferenceSession(str(path), options, providers=by_name, enable_fallback=0)
    except Exception as error:  # its exception types have no common root
        raise (unreadable(path, error) if word == "cpu" else _absent(word, str(error))) from error
    if session.get_providers()[0] != provider.name:  # what happens where a library of the provider is missing
        raise _absent(word, f"ONNX Runtime opened '{path.name}' with {', '.join(session.get_providers())} instead")
    return session


def _plugin_devices(package: Any, provider: Provider, word: str) -> list[Any]:
    """Return the devices of a provider that comes as a plugin."""
    plugin = import_runtime(str(provider.plugin), purpose=f"run ONNX files with {word}", extra="tensorrt_rtx")
    if not hasattr(package, "register_execution_provider_library"):
        raise _absent(
            word,
            f"ONNX Runtime {package.__version__} takes no plugins",
            remedy="pip install 'onnxruntime>=1.24'",
        )
    try:
        _register(provider.name, plugin.get_library_path())
    except Exception as error:  # its exception types have no common root
        raise _absent(word, str(error).rpartition("with error: ")[2], remedy=_ELSEWHERE) from error
    devices = [device for device in package.get_ep_devices() if device.ep_name == provider.name]
    if not devices:
        raise _absent(word, "its library found no GPU that it can use", remedy=_ELSEWHERE)
    return devices


@functools.lru_cache(maxsize=None)
def _register(name: str, library: str) -> None:
    """Register a library once for the process: ONNX Runtime refuses it a second time."""
    import_runtime("onnxruntime", purpose="run ONNX files").register_execution_provider_library(name, library)


def _absent(word: str, found: str, *, remedy: str = "") -> ConfigError:
    """Return the error for a provider that cannot be used here."""
    return ConfigError(
        f"provider '{word}' cannot be used here: {found}",
        expected="the provider, and the driver and libraries that it needs",
        remedy=remedy or PROVIDERS[word].install,
    )
