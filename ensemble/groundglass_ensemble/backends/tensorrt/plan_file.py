"""Opens a plan with whichever TensorRT runtime is installed, and hides what differs between them.

TensorRT: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/ (10.1 and later, 11)
TensorRT-RTX: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time the files of a backend's folder lie beside one another, in no package
    from groundglass_ensemble.backends.tensorrt.plan_checks import PlanTensor
else:
    from plan_checks import PlanTensor

_MODULES = (("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt_rtx"), ("tensorrt_rtx", "tensorrt_rtx_bindings"))
"""Runtimes by their name in a manifest, and modules that hold them: RTX's own package, or its bindings alone."""


class PlanFailed(Exception):
    """The runtime refused, with its own words where it had some."""


def installed_runtimes() -> Iterator[tuple[str, Any]]:
    """The runtimes that can be imported: name and module, NVIDIA's data centre runtime first."""
    found = set()
    for name, module in _MODULES:
        if name in found:
            continue
        try:
            yield name, importlib.import_module(module)
        except (ImportError, OSError):  # not installed, or its shared library isn't
            continue
        found.add(name)


def open_plan(runtime: Any, content: bytes, version_compatible: bool = False) -> OpenPlan:
    """Deserialize on the current GPU; raises PlanFailed with the runtime's reason.

    A version-compatible plan brings code that runs on the host: allow it for plans that are trusted only.
    """
    logger = _new_logger(runtime)
    opener = runtime.Runtime(logger)
    if version_compatible:
        opener.engine_host_code_allowed = True
    engine = opener.deserialize_cuda_engine(content)
    if engine is None:
        raise PlanFailed(logger.reason("it gave no reason"))
    return OpenPlan(runtime, engine, (logger, opener))


class OpenPlan:
    """A deserialized plan."""

    def __init__(self, runtime: Any, engine: Any, kept: tuple[Any, ...]) -> None:
        self._runtime = runtime
        self._engine = engine
        self._kept = kept  # TensorRT's objects need their logger and runtime to outlive them
        self.tensors = tuple(self._tensor(engine.get_tensor_name(index)) for index in range(engine.num_io_tensors))
        # TensorRT-RTX compiles kernels for a shape while it is used, and captures at the right moment by itself.
        self._captures_itself = hasattr(runtime, "CudaGraphStrategy")
        self.capturable = not self._captures_itself
        self.scratch_bytes = 0 if self._captures_itself else int(engine.device_memory_size_v2)

    def new_context(self, stream: Any, scratch: tuple[int, int] | None) -> Any:
        """A context on the first profile; ``scratch`` is the address and size of memory of ``scratch_bytes``."""
        if self._captures_itself:
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = self._runtime.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            strategy = self._runtime.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise PlanFailed(self._reason("it made no execution context"))
        if scratch is not None:
            context.set_device_memory(*scratch)
        # Only an engine's first context has a profile from the start.
        if context.active_optimization_profile != 0:
            self._require(context.set_optimization_profile_async(0, int(stream)), "it took no optimization profile")
        return context

    def set_address(self, context: Any, name: str, address: int) -> None:
        """Say where a tensor lies on the GPU."""
        self._require(context.set_tensor_address(name, address), f"it took no address for '{name}'")

    def set_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        """Say how large an input is."""
        self._require(context.set_input_shape(name, shape), f"it took no shape {list(shape)} for '{name}'")

    def known_shape(self, context: Any, name: str) -> tuple[int, ...]:
        """The shape of a tensor once the inputs' shapes are set; raises PlanFailed when the values decide it."""
        shape = tuple(context.get_tensor_shape(name))
        self._require(min(shape, default=0) >= 0, f"the size of '{name}' depends on values, which is not supported")
        return shape

    def enqueue(self, context: Any, stream: Any) -> None:
        """Put one run on the stream."""
        self._require(context.execute_async_v3(int(stream)), "it did not run")

    def close(self) -> None:
        """Let go of the engine; its contexts must be gone."""
        self._engine = None
        self._kept = ()

    def _tensor(self, name: str) -> PlanTensor:
        engine, runtime = self._engine, self._runtime
        is_input = engine.get_tensor_mode(name) == runtime.TensorIOMode.INPUT
        shape = tuple(engine.get_tensor_shape(name))
        profile = [tuple(dims) for dims in engine.get_tensor_profile_shape(name, 0)] if is_input else []
        smallest, largest = (profile[0], profile[2]) if profile else (shape, shape)
        plain = (
            engine.get_tensor_location(name) == runtime.TensorLocation.DEVICE
            and engine.get_tensor_format(name) == runtime.TensorFormat.LINEAR
            and not engine.is_shape_inference_io(name)
        )
        kind = "input" if is_input else "output"
        return PlanTensor(name, kind, engine.get_tensor_dtype(name).name, shape, smallest, largest, plain)

    def _reason(self, otherwise: str) -> str:
        return str(self._kept[0].reason(otherwise))

    def _require(self, done: bool, otherwise: str) -> None:
        if not done:
            raise PlanFailed(self._reason(otherwise))


def _new_logger(runtime: Any) -> Any:
    """TensorRT tells why something failed in its log alone: this one keeps the errors."""

    class Complaints(runtime.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            runtime.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (runtime.ILogger.Severity.INTERNAL_ERROR, runtime.ILogger.Severity.ERROR):
                self._errors.append(message)

        def reason(self, otherwise: str) -> str:
            """The first error since the last call, which is the one that the others follow from."""
            first = self._errors[0] if self._errors else otherwise
            self._errors.clear()
            return first

    return Complaints()
