"""ONNX -> TensorRT plan: strongly typed, for a range of batch sizes, with the precision of each layer read back.

A plan opens under the runtime and version that built it, and on the GPU it was built for: build it in the container
that serves it. TensorRT needs that GPU to build; TensorRT-RTX needs none. Strongly typed means that the graph's types
are the plan's, so an FP16 plan is built from an FP16 graph.

``preprocess`` can be built too, but in production it stays with ONNX Runtime: its HU arrive as INT16, which TensorRT
does not have, and a plan of it takes INT32.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto

from groundglass.errors import ModelError, SettingError
from groundglass.publish import published
from groundglass_export.engine import load_model
from groundglass_export.gpu import host_gpu
from groundglass_export.graph_types import value_types
from groundglass_export.plan_inspection import PrecisionReport, layers, layers_from_log, precision_report
from groundglass_export.plan_reports import BuildLog, Phases
from groundglass_export.tensorrt_runtime import (
    TensorRt,
    load_tensorrt,
    new_logger,
    new_monitor,
    parser_complaint,
    set_compatibility,
    set_targets,
    strongly_typed_network,
)
from groundglass_export.timing_cache import TimingCache

NOT_REPRODUCIBLE: Final = (
    "no: TensorRT numbers the values inside a plan anew at each build; two plans of one graph differ in these names"
)
RTX_PORTABLE: Final = ("8.0",)
"""Where RTX's default plan begins: it runs on compute capability 8.0 and later (its page on CPU-only engines)."""

_SIDE: Final = (64, 512, 1024)
_TAKEN: Final = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "INT8", "UINT8", "INT32", "INT64", "BOOL"})
_FLOATING: Final = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """How a plan is built.

    ``batch``: the smallest, the usual and the largest batch. ``side``: the same for rows and columns where an input
    leaves them free. ``compute_capabilities``: GPUs to build for, as in ``8.9`` (RTX only; none: one portable plan).
    ``version_compatible`` and ``hardware_compatible``: TensorRT only, at some cost in speed. ``workspace_bytes`` and
    ``optimization_level`` (0 to 5): the builder's own defaults when None. ``timing_cache``: a file that makes the next
    build faster, read if it exists, rewritten afterwards; RTX times nothing and leaves it alone. ``observe``: inner
    values to show as outputs too, such as ``LOGITS`` for the parity gate.
    """

    runtime: str = "auto"
    batch: tuple[int, int, int] = (1, 16, 64)
    side: tuple[int, int, int] = _SIDE
    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    observe: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """An input or output; ``datatype`` as TensorRT spells it, -1 in ``shape`` where a size is free."""

    name: str
    is_input: bool
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A built plan, in memory. ``widened_inputs`` are INT16 in the graph and INT32 in the plan."""

    data: bytes = field(repr=False)
    runtime: str
    version: str
    target: Mapping[str, Any]
    profile: Mapping[str, int]
    precision: PrecisionReport
    tensors: tuple[PlanTensor, ...]
    widened_inputs: tuple[str, ...] = ()
    reproducible: str = NOT_REPRODUCIBLE


def build_plan(
    model: Path | onnx.ModelProto,
    settings: PlanSettings | None = None,
    progress: Callable[[str, float], None] = lambda phase, share: None,
) -> Plan:
    """Build a plan of an ONNX graph. ``progress`` is called with the phase and the share done, 0..1.

    Raises SettingError for a profile out of order or an option that the runtime lacks, and ModelError for a graph that
    it does not take (node and operator are named), for a build that fails, and where no TensorRT is installed. What
    ``progress`` raises, Ctrl-C included, stops the build.
    """
    settings = settings or PlanSettings()
    _refuse_disorder(settings)
    runtime = load_tensorrt(settings.runtime)
    graph, widened = _at_boundary(load_model(model) if isinstance(model, Path) else model, settings.observe)
    log = BuildLog()
    data, tensors = _build(graph, runtime, settings, (log, Phases(progress)))
    return Plan(
        data=data,
        runtime=runtime.name,
        version=runtime.version,
        target=_target(runtime, settings),
        profile=dict(zip(("min", "opt", "max"), settings.batch, strict=True)),
        precision=_precision(graph, data, runtime, (log, settings.version_compatible)),
        tensors=tensors,
        widened_inputs=widened,
    )


def write_plan(plan: Plan, path: Path) -> Path:
    """Put a plan in its place, whole or not at all. Raises ModelError when it can't be written."""
    try:
        with published(path) as beside:
            beside.write_bytes(plan.data)
    except OSError as error:
        raise ModelError(f"{path} was not written: {error}") from error
    return path


def _refuse_disorder(settings: PlanSettings) -> None:
    for name, sizes in (("batch", settings.batch), ("side", settings.side)):
        if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise SettingError(f"{name} profile {':'.join(map(str, sizes))}: expected 1 <= min <= opt <= max")


def _at_boundary(model: onnx.ModelProto, observe: tuple[str, ...]) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A copy whose INT16 inputs are INT32 and whose observed values are outputs; and the names of such inputs."""
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    widened = []
    for value in graph.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.INT16:
            value.type.tensor_type.elem_type = TensorProto.INT32
            widened.append(value.name)
    if widened:
        del graph.graph.value_info[:]  # types that were inferred from the old inputs
    types = value_types(graph)
    for name in observe:
        if name not in types:
            raise ModelError(f"no value of {graph.graph.name!r} is called {name!r}; observe takes names of values")
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, types[name], None))
    for value in (*graph.graph.input, *graph.graph.output):
        word = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        if word not in _TAKEN:
            raise ModelError(f"{value.name} of {graph.graph.name!r} is {word}, a type that TensorRT does not have")
    return graph, tuple(widened)


def _build(
    graph: onnx.ModelProto, runtime: TensorRt, settings: PlanSettings, reports: tuple[BuildLog, Phases]
) -> tuple[bytes, tuple[PlanTensor, ...]]:
    log, phases = reports
    logger, monitor = new_logger(runtime, log), new_monitor(runtime, phases)  # both must outlive the build
    builder = _builder(runtime, logger, log)
    network = strongly_typed_network(runtime, builder)
    parser = runtime.api.OnnxParser(network, logger)
    if not parser.parse(graph.SerializeToString()):
        raise ModelError(parser_complaint(runtime, parser, graph.graph.name))
    config = builder.create_builder_config()
    _configure(runtime, config, settings)
    if monitor is not None:
        config.progress_monitor = monitor
    _add_profile(builder, network, config, settings)
    cache = TimingCache(runtime, config, settings.timing_cache)
    built = builder.build_serialized_network(network, config)
    phases.raise_stopped()
    if built is None:
        raise ModelError(f"{runtime.title} did not build {graph.graph.name!r}: {log.complaint()}")
    cache.store()
    return bytes(built), _tensors(network)


def _builder(runtime: TensorRt, logger: Any, log: BuildLog) -> Any:
    try:
        return runtime.api.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the bindings' way to say that C++ gave nothing: no GPU, mostly
        raise ModelError(
            f"{runtime.title} can't build here; it needs a GPU and its driver: {log.complaint()}"
        ) from error


def _configure(runtime: TensorRt, config: Any, settings: PlanSettings) -> None:
    # Types of layers are part of the plan only so; it is the inspector's source.
    config.profiling_verbosity = runtime.api.ProfilingVerbosity.DETAILED
    set_targets(runtime, config, settings.compute_capabilities)
    set_compatibility(runtime, config, version=settings.version_compatible, hardware=settings.hardware_compatible)
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(runtime.api.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level


def _add_profile(builder: Any, network: Any, config: Any, settings: PlanSettings) -> None:
    """One profile over all inputs: a free first axis is the batch, other free axes are rows and columns."""
    profile = builder.create_optimization_profile()
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for tensor in inputs:
        free = [settings.batch if axis == 0 else settings.side for axis in range(len(tensor.shape))]
        shapes = [
            tuple(sizes[place] if size < 0 else size for sizes, size in zip(free, tensor.shape, strict=True))
            for place in range(3)
        ]
        profile.set_shape(tensor.name, *shapes)
    if any(size < 0 for tensor in inputs for size in tensor.shape):
        config.add_optimization_profile(profile)


def _tensors(network: Any) -> tuple[PlanTensor, ...]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return tuple(
        PlanTensor(tensor.name, place < len(inputs), tensor.dtype.name, tuple(tensor.shape))
        for place, tensor in enumerate((*inputs, *outputs))
    )


def _precision(graph: onnx.ModelProto, data: bytes, runtime: TensorRt, built: tuple[BuildLog, bool]) -> PrecisionReport:
    """By the inspector where the plan can be opened, else by the list of layers in the build's log."""
    log, version_compatible = built
    try:
        found, source = layers(data, runtime, version_compatible=version_compatible), "inspector"
    except ModelError:
        found, source = layers_from_log(log.layers), "build log"
    convolutions = [node.name for node in graph.graph.node if node.op_type in ("Conv", "ConvTranspose")]
    weights = sum(math.prod(item.dims) for item in graph.graph.initializer if item.data_type in _FLOATING)
    return precision_report(found, source, convolutions=convolutions, sizes=(len(data), weights))


def _target(runtime: TensorRt, settings: PlanSettings) -> dict[str, Any]:
    """What a manifest says of the machine that a plan is for; TensorRT's is the GPU that it was built on."""
    gpu = host_gpu()
    if runtime.is_rtx:
        capabilities = settings.compute_capabilities or RTX_PORTABLE
        portable = not settings.compute_capabilities
    else:
        capabilities = (gpu.compute_capability,) if gpu else ()
        portable = settings.hardware_compatible
    return {
        "runtime": runtime.name,
        "version": runtime.version,
        "compute_capabilities": list(capabilities),
        "hardware_compatibility": "ampere_plus" if portable else "none",
        "version_compatible": settings.version_compatible,
        "driver": gpu.driver if gpu else "",
        "platform": f"{sys.platform}-{platform.machine()}",
    }
