"""The few CUDA calls that running a plan takes, through ``cuda.bindings.runtime``; every failure raises CudaFailed.

https://nvidia.github.io/cuda-python/cuda-bindings/latest/module/runtime.html
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class CudaFailed(Exception):
    """A CUDA call returned an error."""


class Cuda:
    """One GPU and one stream on it; ``close`` gives back everything that was taken."""

    def __init__(self, runtime: Any, device: int) -> None:
        self._runtime = runtime
        self.device = device
        self._releases: list[Callable[[], None]] = []
        self.select()
        # Not the default stream: TensorRT would synchronize the whole device around it, and it can't be captured.
        self.stream = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self._on_close("cudaStreamDestroy", self.stream)

    def select(self) -> None:
        """Make this GPU the calling thread's own: the choice is one of threads."""
        self._call("cudaSetDevice", self.device)

    def name(self) -> str:
        """What the GPU is called."""
        name = self._call("cudaGetDeviceProperties", self.device).name
        return name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)

    def capability(self) -> tuple[int, int]:
        """The GPU's compute capability."""
        kinds = self._runtime.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMajor, self.device)
        minor = self._call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMinor, self.device)
        return int(major), int(minor)

    def device_memory(self, size: int) -> int:
        """The address of ``size`` bytes on the GPU, aligned to 256 bytes (CUDA programming guide)."""
        address = int(self._call("cudaMalloc", size))
        self._on_close("cudaFree", address)
        return address

    def pinned_memory(self, size: int) -> NDArray[np.uint8]:
        """``size`` bytes of the host that the GPU copies from and to by itself; not to be used after ``close``."""
        address = int(self._call("cudaMallocHost", size))
        self._on_close("cudaFreeHost", address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def upload(self, device: int, host: NDArray[np.uint8]) -> None:
        """Enqueue a copy of ``host`` to the GPU."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host.ctypes.data, host.nbytes, kind, self.stream)

    def download(self, host: NDArray[np.uint8], device: int) -> None:
        """Enqueue a copy from the GPU to ``host``."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host.ctypes.data, device, host.nbytes, kind, self.stream)

    def wait(self) -> None:
        """Return once everything enqueued is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def record(self, enqueue: Callable[[], None]) -> Any:
        """The work that ``enqueue`` puts on the stream as a CUDA graph; nothing of it runs yet."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        finally:  # also ends a capture that failed, or the stream would take no work any more
            status, graph = self._runtime.cudaStreamEndCapture(self.stream)
            self._runtime.cudaGetLastError()
        self._check("cudaStreamEndCapture", status)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        self._on_close("cudaGraphExecDestroy", executable)
        return executable

    def replay(self, executable: Any) -> None:
        """Enqueue a recorded graph."""
        self._call("cudaGraphLaunch", executable, self.stream)

    def close(self) -> None:
        """Wait, then give back memory, graphs and stream; errors are left alone, since nothing can be done by then."""
        self._runtime.cudaStreamSynchronize(self.stream)
        while self._releases:
            self._releases.pop()()

    def _on_close(self, function: str, handle: Any) -> None:
        self._releases.append(lambda: getattr(self._runtime, function)(handle))

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *values = getattr(self._runtime, function)(*arguments)
        self._check(function, status)
        return values[0] if values else None

    def _check(self, function: str, status: Any) -> None:
        if int(status) != 0:
            raise CudaFailed(f"{function} failed: {getattr(status, 'name', status)}")


def why_no_gpu(runtime: Any) -> str:
    """What keeps this process from using a GPU: no driver or an old one, none visible. Empty when nothing does."""
    status, count = runtime.cudaGetDeviceCount()
    if int(status) != 0:
        return str(getattr(status, "name", status))
    return "" if count else "none is visible"
