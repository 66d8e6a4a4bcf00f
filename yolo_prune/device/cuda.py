"""Memory of a GPU and a queue of work on it: the few functions of CUDA's runtime library that an engine needs.

Through ctypes, because the bindings that exist are too much or too new for a device: torch and pycuda have to be built
for a Jetson, and `cuda-python` has no wheel for JetPack 5 (Python 3.8 on aarch64). The library itself is there wherever
TensorRT is.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_prune.errors import ConfigError, YoloPruneError

_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_SIGNATURES = {
    "cudaGetDeviceCount": (ctypes.POINTER(ctypes.c_int),),
    "cudaMalloc": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t),
    "cudaFree": (ctypes.c_void_p,),
    "cudaMemcpyAsync": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p),
    "cudaStreamCreate": (ctypes.POINTER(ctypes.c_void_p),),
    "cudaStreamSynchronize": (ctypes.c_void_p,),
    "cudaStreamDestroy": (ctypes.c_void_p,),
}
_BUILD_THERE = "build and run engines on the device: carry it a bundle (yolo-prune bundle model=... target=jetson)"


class CudaError(YoloPruneError):
    """A call of CUDA failed."""

    exit_code = 1


@dataclass(frozen=True)
class Cuda:
    """CUDA's runtime library.

    Attributes:
        library: The opened library.
    """

    library: Any

    def require_gpu(self) -> None:
        """Refuse to go on without a GPU.

        Raises:
            ConfigError: There is none, or no driver for it.
        """
        count = ctypes.c_int()
        try:
            self._call("cudaGetDeviceCount", ctypes.byref(count))
            reason = "none found"
        except CudaError as error:
            reason = error.found
        if count.value < 1:
            raise ConfigError(f"no GPU for TensorRT: {reason}", expected="an NVIDIA GPU", remedy=_BUILD_THERE)

    @contextlib.contextmanager
    def stream(self) -> Iterator[Stream]:
        """Yield a queue of work; its buffers live as long."""
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(handle))
        stream = Stream(cuda=self, handle=handle.value or 0)
        try:
            yield stream
        finally:
            stream.free()
            self._call("cudaStreamDestroy", handle)

    def allocate(self, byte_count: int) -> int:
        """Return the address of new memory on the GPU."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), byte_count)
        return address.value or 0

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cudaFree", address)

    def copy(self, target: int, source: int, byte_count: int, kind: int, stream: int) -> None:
        """Queue a copy."""
        self._call("cudaMemcpyAsync", target, source, byte_count, kind, stream)

    def wait(self, stream: int) -> None:
        """Wait until all that is queued is done."""
        self._call("cudaStreamSynchronize", stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            text = self.library.cudaGetErrorString(code).decode()
            raise CudaError(
                f"{name} failed with error {code}: {text}",
                expected="a working CUDA driver and free memory on the GPU",
                remedy="close other programs that use the GPU, or update its driver",
            )


@dataclass
class Stream:
    """A queue of work on the GPU, and the buffers that it fills.

    Attributes:
        cuda: The library.
        handle: What CUDA and TensorRT call it by.
        buffers: Address and size in bytes by name.
    """

    cuda: Cuda
    handle: int
    buffers: dict[str, tuple[int, int]] = field(default_factory=dict)

    def buffer(self, name: str, byte_count: int) -> int:
        """Return the address of the buffer of that name, at least `byte_count` large; it may move when it grows."""
        address, size = self.buffers.get(name, (0, 0))
        if size < byte_count:
            if size:
                del self.buffers[name]
                self.cuda.free(address)
            address = self.cuda.allocate(byte_count)
            self.buffers[name] = address, byte_count
        return address

    def upload(self, name: str, values: NDArray[Any]) -> int:
        """Queue a copy of a contiguous array, which must stay until `wait`; return its address on the GPU."""
        address = self.buffer(name, values.nbytes)
        self.cuda.copy(address, values.ctypes.data, values.nbytes, _TO_DEVICE, self.handle)
        return address

    def download(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Queue a copy of a buffer into a new array, which is filled after `wait`."""
        values = np.empty(shape, dtype)
        self.cuda.copy(values.ctypes.data, self.buffers[name][0], values.nbytes, _TO_HOST, self.handle)
        return values

    def wait(self) -> None:
        """Wait until all that is queued is done."""
        self.cuda.wait(self.handle)

    def free(self) -> None:
        """Give all buffers back."""
        while self.buffers:
            _, (address, _) = self.buffers.popitem()
            self.cuda.free(address)


def load_cuda(candidates: Sequence[str] | None = None) -> Cuda:
    """Open CUDA's runtime library.

    Args:
        candidates: File names to try in order; None knows the usual places.

    Raises:
        ConfigError: None of them can be opened.
    """
    return _open(tuple(_usual_places() if candidates is None else candidates))


@lru_cache(maxsize=None)
def _open(candidates: tuple[str, ...]) -> Cuda:
    for name in candidates:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        for function, arguments in _SIGNATURES.items():
            getattr(library, function).argtypes = arguments
        library.cudaGetErrorString.restype = ctypes.c_char_p
        return Cuda(library=library)
    raise ConfigError(
        "CUDA's runtime library (libcudart) is not installed",
        expected="CUDA, as JetPack installs it, or the wheels that package 'tensorrt' brings",
        remedy=_BUILD_THERE,
    )


def _usual_places() -> list[str]:
    """Return names for the system's loader, then the files of CUDA's own folder and of Python's wheels."""
    known = ctypes.util.find_library("cudart")
    versions = [f"libcudart.so{end}" for end in ("", ".13", ".12", ".11.0")]
    windows = [f"cudart64_{version}.dll" for version in ("13", "12", "110")]
    wheels = [
        str(file)
        for folder in sys.path
        for pattern in ("nvidia/*/lib/libcudart.so.*", "nvidia/*/bin/**/cudart64_*.dll")
        for file in sorted(Path(folder or ".").glob(pattern))
    ]
    return [*([known] if known else []), *versions, *windows, "/usr/local/cuda/lib64/libcudart.so", *wheels]
