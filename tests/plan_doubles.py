"""A GPU and a TensorRT runtime made of host memory, which keep the rules that the real ones document.

They let the plan stand-in be tried where there is no GPU. What breaks a rule fails here as it would there: a run
without addresses or shapes, a shape outside the profile, a capture before the first run of a shape, a graph whose
context was changed, memory used after it was freed. The plan that they run doubles its input and sums it up.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from groundglass_ensemble.wheel import copy_stand_ins

PROFILE = ((1, 4), (4, 4), (8, 4))
"""Smallest, best and largest shape of the input."""

PLAN = b"the one plan that this runtime takes"


@contextmanager
def assembled_modules(folder: Path) -> Iterator[SimpleNamespace]:
    """The modules of the plan stand-in, imported from a folder as the server gets it."""
    copy_stand_ins(folder)
    backend = folder / "tensorrt"
    names = ("plan_checks", "plan_file", "plan_runner", "cuda_memory")
    sys.path.insert(0, str(backend))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(backend))
        for file in backend.glob("*.py"):
            sys.modules.pop(file.stem, None)


class Status(IntEnum):
    """What CUDA calls return first."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorStreamCaptureInvalidated = 901


class HostCuda:
    """The part of ``cuda.bindings.runtime`` that the stand-in uses; ``calls`` counts what was called."""

    cudaStreamNonBlocking = 1
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.memory: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.open_streams = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and callable(getattr(type(self), name, None)):
            self.calls[name] = self.calls.get(name, 0) + 1
        return super().__getattribute__(name)

    def put(self, work: Callable[[], None]) -> None:
        """Enqueue, or record while a capture is under way."""
        (self.queue if self.captured is None else self.captured).append(work)

    def cudaSetDevice(self, device: int) -> tuple[Status]:
        return (Status.cudaSuccess,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Status, Any]:
        return Status.cudaSuccess, SimpleNamespace(name=b"Host GPU\0\0")

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Status, int]:
        return Status.cudaSuccess, {75: 9, 76: 0}[attribute]

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, int]:
        self.open_streams += 1
        return Status.cudaSuccess, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        self.open_streams -= 1
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Status, int]:
        block = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(block)] = block
        return Status.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[Status]:
        del self.memory[address]
        return (Status.cudaSuccess,)

    def cudaMallocHost(self, size: int) -> tuple[Status, int]:
        return self.cudaMalloc(size)

    def cudaFreeHost(self, address: int) -> tuple[Status]:
        return self.cudaFree(address)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Status]:
        if size > len(self.memory[target]) or size > len(self.memory[source]):
            return (Status.cudaErrorInvalidValue,)
        self.put(lambda: ctypes.memmove(target, source, size) and None)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        work, self.queue = self.queue, []
        for step in work:
            step()
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Status]:
        self.captured = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, int | None]:
        steps, self.captured = self.captured, None
        assert steps is not None
        self.graphs[id(steps)] = steps
        return Status.cudaSuccess, id(steps)

    def cudaGetLastError(self) -> tuple[Status]:
        return (Status.cudaSuccess,)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Status, int]:
        self.graphs[-graph] = self.graphs[graph]
        return Status.cudaSuccess, -graph

    def cudaGraphDestroy(self, graph: int) -> tuple[Status]:
        del self.graphs[graph]
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Status]:
        del self.graphs[executable]
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Status]:
        for step in self.graphs[executable]:
            self.put(step)
        return (Status.cudaSuccess,)


class _DataType(Enum):
    FLOAT = 0
    INT32 = 3


class _Logger:
    class Severity(Enum):
        INTERNAL_ERROR = 0
        ERROR = 1


class HostTensorRT:
    """The part of ``tensorrt`` that the stand-in uses, for one plan: IN (n, 4) -> DOUBLE (n, 4), SUM (n, 1)."""

    __version__ = "11.4.1.9"
    ILogger = _Logger
    TensorIOMode = Enum("TensorIOMode", ["INPUT", "OUTPUT"])
    TensorLocation = Enum("TensorLocation", ["DEVICE", "HOST"])
    TensorFormat = Enum("TensorFormat", ["LINEAR", "CHW32"])
    ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"])

    def __init__(self, cuda: HostCuda, *, capturable: bool = True) -> None:
        self.cuda = cuda
        self.capturable = capturable
        self.contexts: list[HostContext] = []

    def Runtime(self, logger: Any) -> Any:
        """What deserializes."""

        def deserialize_cuda_engine(content: bytes) -> HostEngine | None:
            if content == PLAN:
                return HostEngine(self)
            logger.log(_Logger.Severity.ERROR, "Serialization assertion failed: no plan\nsecond line")
            return None

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)


class HostEngine:
    """The deserialized plan."""

    num_io_tensors = 3
    device_memory_size_v2 = 64

    def __init__(self, runtime: HostTensorRT) -> None:
        self.runtime = runtime

    def get_tensor_name(self, index: int) -> str:
        return ("IN", "DOUBLE", "SUM")[index]

    def get_tensor_mode(self, name: str) -> Any:
        return HostTensorRT.TensorIOMode.INPUT if name == "IN" else HostTensorRT.TensorIOMode.OUTPUT  # type: ignore[attr-defined]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 1) if name == "SUM" else (-1, 4)

    def get_tensor_dtype(self, name: str) -> Any:
        return _DataType.INT32 if name == "SUM" else _DataType.FLOAT

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return list(PROFILE)

    def get_tensor_location(self, name: str) -> Any:
        return HostTensorRT.TensorLocation.DEVICE  # type: ignore[attr-defined]

    def get_tensor_format(self, name: str) -> Any:
        return HostTensorRT.TensorFormat.LINEAR  # type: ignore[attr-defined]

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def create_execution_context(self, strategy: Any) -> HostContext:
        context = HostContext(self.runtime, first=not self.runtime.contexts)
        self.runtime.contexts.append(context)
        return context


class HostContext:
    """One context; ``version`` grows with every change, so that a graph can tell that its context was changed."""

    def __init__(self, runtime: HostTensorRT, *, first: bool) -> None:
        self.runtime = runtime
        self.active_optimization_profile = 0 if first else -1
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] | None = None
        self.scratch: tuple[int, int] | None = None
        self.version = 0
        self.ran_version = -1
        self.shape_calls = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.active_optimization_profile = profile
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.version += 1
        self.addresses[name] = address
        return address in self.runtime.cuda.memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.version += 1
        self.shape_calls += 1
        self.shape = shape
        fits = all(low <= size <= high for low, size, high in zip(PROFILE[0], shape, PROFILE[2], strict=True))
        return self.active_optimization_profile == 0 and name == "IN" and fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.shape is not None
        return (self.shape[0], 1) if name == "SUM" else self.shape

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.runtime.cuda
        capturing = cuda.captured is not None
        if self.shape is None or set(self.addresses) != {"IN", "DOUBLE", "SUM"} or self.scratch is None:
            return False
        if capturing and (self.ran_version != self.version or not self.runtime.capturable):
            return False
        self.ran_version = version = self.version
        rows = self.shape[0]

        def work() -> None:
            assert not capturing or version == self.version, "the graph's context was changed"
            read = self._array("IN", (rows, 4), np.float32)
            self._array("DOUBLE", (rows, 4), np.float32)[...] = read * 2
            self._array("SUM", (rows, 1), np.int32)[...] = read.sum(axis=1, keepdims=True)

        cuda.put(work)
        return True

    def _array(self, name: str, shape: tuple[int, int], dtype: Any) -> Any:
        block = self.runtime.cuda.memory[self.addresses[name]]
        return np.frombuffer(block, dtype=dtype, count=shape[0] * shape[1]).reshape(shape)
