"""TensorRT plans on the GPU of this machine: an engine for the parity gate, and a bare one for measurements.

Buffers are torch's CUDA tensors, so torch must be built for CUDA. A plan is verified where it is served: on that GPU,
with that runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundglass.contract import ANY, IMAGE, LESION_PIXELS, MASK, SLICE_POSITIVE, UNET
from groundglass.errors import ModelError, RepositoryError
from groundglass.manifest import check_digest, file_digest, manifest_path, read_manifest
from groundglass_export.answers import Answers
from groundglass_export.engine import LOGITS, probability_of
from groundglass_export.plan_reports import BuildLog
from groundglass_export.tensorrt_runtime import RUNTIMES, TensorRt, load_tensorrt, new_logger

_TORCH_TYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "FLOAT": torch.float32,
        "HALF": torch.float16,
        "INT32": torch.int32,
        "UINT8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_CONTRACT_TYPES: Final = MappingProxyType({"FP32": "FLOAT", "INT32": "INT32", "UINT8": "UINT8", "BOOL": "BOOL"})


class BoundPlan:
    """A plan with buffers for one batch size. ``inputs`` and ``outputs`` are CUDA tensors, by name."""

    def __init__(self, runtime: TensorRt, engine: Any, batch: int) -> None:
        self._context = _new_context(runtime, engine)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        kinds = {name: engine.get_tensor_mode(name) == runtime.api.TensorIOMode.INPUT for name in names}
        for name in names:
            if kinds[name] and not self._context.set_input_shape(name, (batch, *engine.get_tensor_shape(name)[1:])):
                raise ModelError(f"the plan took no batch of {batch} for {name}")
        buffers = {name: self._buffer(name, _TORCH_TYPES[engine.get_tensor_dtype(name).name]) for name in names}
        self.inputs = {name: buffers[name] for name in names if kinds[name]}
        self.outputs = {name: buffers[name] for name in names if not kinds[name]}

    def enqueue(self, stream: torch.cuda.Stream) -> None:
        """Put one run on ``stream``; raises ModelError when the runtime refuses."""
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ModelError("the plan did not run: the runtime's log says why")

    def _buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        buffer = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device="cuda")
        self._context.set_tensor_address(name, buffer.data_ptr())
        return buffer


class PlanEngine:
    """A ``unet`` plan under the TensorRT runtime that takes it; its logits are observed when it was built with them.

    Raises ModelError without a GPU or a runtime, or for a file that no runtime here takes, and RepositoryError for a
    plan that breaks the tensor contract or is not the file of its manifest.
    """

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        self.name = name or path.name
        self._path = path
        self.precision = _stated_precision(path)
        self._runtime, self._engine, self._kept = _opened(path)
        self.digest = file_digest(path)
        self.batches = _checked_batches(path, self._engine)
        self._bound: dict[int, BoundPlan] = {}

    @property
    def runtime(self) -> str:
        """The runtime and its version, for a report."""
        return self._runtime.title

    def bind(self, batch: int) -> BoundPlan:
        """Buffers for ``batch`` slices, made on first use. Raises ModelError for a batch outside the plan's profile."""
        smallest, largest = self.batches
        if not smallest <= batch <= largest:
            raise ModelError(
                f"{self._path} takes batches of {smallest} to {largest}, and {batch} slices were given: build it with "
                "a larger profile, or send smaller batches"
            )
        if batch not in self._bound:
            self._bound[batch] = BoundPlan(self._runtime, self._engine, batch)
        return self._bound[batch]

    def answers(self, images: NDArray[np.float32]) -> Answers:
        """Run ``images``, float32 (n, 1, 512, 512) in 0..1. Raises ModelError when the plan fails on them."""
        bound = self.bind(len(images))
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                bound.inputs[IMAGE.name].copy_(torch.from_numpy(np.ascontiguousarray(images)))
                bound.enqueue(stream)
            stream.synchronize()
            found = {name: tensor.cpu().numpy() for name, tensor in bound.outputs.items()}
        except RuntimeError as error:  # torch reports CUDA's errors so
            reason = next(iter(str(error).splitlines()), "no reason was given")
            raise ModelError(f"{self._path} failed on a batch of {len(images)}: {reason}") from error
        return Answers(
            mask=np.unpackbits(found[MASK.name], axis=2).view(np.bool_),
            pixels=found[LESION_PIXELS.name][:, 0],
            positive=found[SLICE_POSITIVE.name][:, 0],
            probability=probability_of(found[LOGITS])[:, 0] if LOGITS in found else None,
        )


def _opened(path: Path) -> tuple[TensorRt, Any, Any]:
    """The runtime, the engine, and what must outlive it."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected a TensorRT plan")
    manifest = read_manifest(path) if manifest_path(path).exists() else None
    if manifest is not None:
        check_digest(path, manifest)
    if not torch.cuda.is_available():
        raise ModelError(
            f"a plan can be verified only where it runs: torch {torch.__version__} finds no GPU here, which {path} "
            "needs; verify it on the machine that serves it, with a torch built for CUDA"
        )
    refusals = []
    for runtime in _runtimes(str(manifest.target.get("runtime", "auto")) if manifest is not None else "auto"):
        log = BuildLog()
        logger = new_logger(runtime, log)
        opener = runtime.api.Runtime(logger)
        engine = opener.deserialize_cuda_engine(path.read_bytes())
        if engine is not None:
            return runtime, engine, (logger, opener)
        refusals.append(f"{runtime.title} ({log.complaint()})")
    major, minor = torch.cuda.get_device_capability()
    raise ModelError(
        f"{path} was refused by {' and by '.join(refusals)} on {torch.cuda.get_device_name()} (compute capability "
        f"{major}.{minor}): build it here, with the runtime that serves it"
    )


def _runtimes(named: str) -> list[TensorRt]:
    """The runtime that a manifest names, or else all that are installed. Raises ModelError when there is none."""
    found = []
    for name in RUNTIMES[1:] if named == "auto" else (named,):
        with suppress(ModelError):
            found.append(load_tensorrt(name))
    return found or [load_tensorrt(named)]  # raises, and says what to install


def _new_context(runtime: TensorRt, engine: Any) -> Any:
    """TensorRT-RTX compiles kernels for a shape while it runs, and captures CUDA graphs by itself when asked to."""
    if runtime.is_rtx:
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = runtime.api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = engine.create_execution_context(config)
    else:
        context = engine.create_execution_context()
    if context is None:
        raise ModelError("the runtime made no execution context: the GPU's memory may be full")
    if context.active_optimization_profile != 0:  # only an engine's first context has one from the start
        context.set_optimization_profile_async(0, torch.cuda.current_stream().cuda_stream)
        torch.cuda.current_stream().synchronize()
    return context


def _stated_precision(path: Path) -> str:
    """``fp32`` when the manifest says so, else ``fp16``: a file can choose stricter limits for itself, never wider."""
    stated = read_manifest(path).precision if manifest_path(path).exists() else None
    return "fp32" if stated == "fp32" else "fp16"


def _checked_batches(path: Path, engine: Any) -> tuple[int, int]:
    """The batches that the plan takes, once its tensors are found to be the contract's."""
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    for tensor in (*UNET.inputs, *UNET.outputs):
        if tensor.name not in names:
            raise RepositoryError(
                f"{path} has no tensor {tensor.name}, which the contract asks for; it has {sorted(names)}"
            )
        found = (engine.get_tensor_dtype(tensor.name).name, tuple(engine.get_tensor_shape(tensor.name)))
        asked = (_CONTRACT_TYPES[tensor.datatype], (ANY, *tensor.dims))
        if found != asked:
            raise RepositoryError(f"{path} has {tensor.name} as {found}; the contract asks for {asked}")
    smallest, _, largest = engine.get_tensor_profile_shape(IMAGE.name, 0)
    return int(smallest[0]), int(largest[0])
