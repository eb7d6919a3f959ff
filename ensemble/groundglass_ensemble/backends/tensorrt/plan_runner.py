"""Runs an open plan on batches of requests, with memory that is taken once and CUDA graphs where shapes repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # at run time the files of a backend's folder lie beside one another, in no package
    from groundglass_ensemble.backends.shared.stand_in_batch import Feed, split_rows
    from groundglass_ensemble.backends.tensorrt.cuda_memory import Cuda, CudaFailed
    from groundglass_ensemble.backends.tensorrt.plan_checks import PlanTensor
    from groundglass_ensemble.backends.tensorrt.plan_file import OpenPlan, PlanFailed
else:
    from cuda_memory import CudaFailed
    from plan_file import PlanFailed
    from stand_in_batch import split_rows

MAX_GRAPHS = 16
"""CUDA graphs that are kept: enough for the batch sizes that a busy server settles on."""

_SHAPES_COUNTED = 256
"""Shapes whose repetitions are remembered, so that callers who never repeat one can't fill the memory."""

NUMPY_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}

Shapes = tuple[tuple[int, ...], ...]
"""The shape of every input, in the plan's order."""


@dataclass
class _Buffer:
    """The memory of one tensor: ``host`` is pinned, uint8 (bytes,), and as large as the profile allows."""

    tensor: PlanTensor
    host: NDArray[np.uint8]
    device: int

    def filled(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The bytes that a tensor of this shape takes."""
        return self.host[: prod(shape) * np.dtype(NUMPY_TYPES[self.tensor.datatype]).itemsize]

    def array(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """The host's memory as a tensor of this shape."""
        return self.filled(shape).view(NUMPY_TYPES[self.tensor.datatype]).reshape(shape)


@dataclass
class _Recording:
    """A CUDA graph, and the context that it was captured from, which must not be touched while the graph is used."""

    graph: Any
    context: Any
    outputs: Shapes


class PlanRunner:
    """One instance of a plan. Not for several threads at once."""

    def __init__(self, plan: OpenPlan, cuda: Cuda, max_graphs: int = MAX_GRAPHS) -> None:
        self._plan = plan
        self._cuda = cuda
        self._max_graphs = max_graphs if plan.capturable else 0
        self._scratch = (cuda.device_memory(plan.scratch_bytes), plan.scratch_bytes) if plan.scratch_bytes else None
        self._context = plan.new_context(cuda.stream, self._scratch)
        self._inputs = [self._buffer(tensor, tensor.largest) for tensor in plan.tensors if tensor.kind == "input"]
        self._shapes = tuple(buffer.tensor.largest for buffer in self._inputs)
        self._set_shapes(self._context, self._shapes)
        outputs = [tensor for tensor in plan.tensors if tensor.kind == "output"]
        self._outputs = [self._buffer(tensor, plan.known_shape(self._context, tensor.name)) for tensor in outputs]
        self._set_addresses(self._context)
        self._recordings: dict[Shapes, _Recording | None] = {}
        self._counts: dict[Shapes, int] = {}

    def run(self, names: list[str], feeds: list[Feed]) -> list[list[NDArray[Any]]]:
        """The outputs called ``names`` of every request; raises ValueError for inputs that the plan can't take."""
        self._cuda.select()
        shapes = self._gather(feeds)
        output_shapes = dict(zip((buffer.tensor.name for buffer in self._outputs), self._compute(shapes), strict=True))
        buffers = {buffer.tensor.name: buffer for buffer in self._outputs}
        # Copies: the pinned memory belongs to the next batch, which may run before these responses are sent.
        arrays = [buffers[name].array(output_shapes[name]).copy() for name in names]
        return split_rows(names, arrays, feeds)

    def close(self) -> None:
        """Let go of contexts, plan and memory, in this order."""
        self._cuda.wait()
        self._recordings.clear()
        self._context = None
        self._plan.close()
        self._cuda.close()

    def _buffer(self, tensor: PlanTensor, largest: tuple[int, ...]) -> _Buffer:
        size = max(1, prod(largest)) * np.dtype(NUMPY_TYPES[tensor.datatype]).itemsize
        return _Buffer(tensor, self._cuda.pinned_memory(size), self._cuda.device_memory(size))

    def _gather(self, feeds: list[Feed]) -> Shapes:
        """Write every request's rows behind one another into the pinned inputs. Returns the shapes of the batch."""
        return tuple(_gather(buffer, [_value(feed, buffer.tensor) for feed in feeds]) for buffer in self._inputs)

    def _compute(self, shapes: Shapes) -> Shapes:
        """From pinned inputs to pinned outputs. Returns the outputs' shapes."""
        if shapes not in self._recordings and self._repeats(shapes):
            recording = self._recordings[shapes] = self._record(shapes)
            if recording is not None:
                return recording.outputs  # it ran once to be recorded
        recording = self._recordings.get(shapes)
        if recording is not None:
            self._cuda.replay(recording.graph)
            self._cuda.wait()
            return recording.outputs
        if shapes != self._shapes:
            self._set_shapes(self._context, shapes)
            self._shapes = shapes
        outputs = self._output_shapes(self._context)
        self._enqueue(self._context, shapes, outputs)
        self._cuda.wait()
        return outputs

    def _repeats(self, shapes: Shapes) -> bool:
        """Whether these shapes were run before and a graph for them may still be kept."""
        if len(self._recordings) >= self._max_graphs:
            return False
        if len(self._counts) >= _SHAPES_COUNTED:
            self._counts.clear()
        self._counts[shapes] = self._counts.get(shapes, 0) + 1
        return self._counts[shapes] > 1

    def _record(self, shapes: Shapes) -> _Recording | None:
        """A graph of copies and plan for these shapes; None for a plan that can't be captured.

        Each graph has a context of its own: TensorRT's guide ("CUDA Graphs") leaves undefined what a graph does once
        the context that it was captured from is changed, as setting another shape would. All contexts share one block
        of scratch memory, since they never run at the same time.
        """
        try:
            context = self._plan.new_context(self._cuda.stream, self._scratch)
            self._set_addresses(context)
            self._set_shapes(context, shapes)
            outputs = self._output_shapes(context)
            # The run after a change of shape does work that can't be captured.
            self._enqueue(context, shapes, outputs)
            self._cuda.wait()
            graph = self._cuda.record(lambda: self._enqueue(context, shapes, outputs))
        except (CudaFailed, PlanFailed):  # it is served without a graph, which works as well, only slower
            return None
        return _Recording(graph, context, outputs)

    def _enqueue(self, context: Any, shapes: Shapes, outputs: Shapes) -> None:
        for buffer, shape in zip(self._inputs, shapes, strict=True):
            self._cuda.upload(buffer.device, buffer.filled(shape))
        self._plan.enqueue(context, self._cuda.stream)
        for buffer, shape in zip(self._outputs, outputs, strict=True):
            self._cuda.download(buffer.filled(shape), buffer.device)

    def _set_addresses(self, context: Any) -> None:
        for buffer in (*self._inputs, *self._outputs):
            self._plan.set_address(context, buffer.tensor.name, buffer.device)

    def _set_shapes(self, context: Any, shapes: Shapes) -> None:
        for buffer, shape in zip(self._inputs, shapes, strict=True):
            self._plan.set_shape(context, buffer.tensor.name, shape)

    def _output_shapes(self, context: Any) -> Shapes:
        return tuple(self._plan.known_shape(context, buffer.tensor.name) for buffer in self._outputs)


def _value(feed: Feed, tensor: PlanTensor) -> NDArray[Any]:
    if tensor.name not in feed:
        raise ValueError(f"input '{tensor.name}' is missing, and a plan has no optional inputs")
    return feed[tensor.name]


def _gather(buffer: _Buffer, arrays: Sequence[NDArray[Any]]) -> tuple[int, ...]:
    shape = arrays[0].shape if len(arrays) == 1 else (sum(len(array) for array in arrays), *arrays[0].shape[1:])
    tensor = buffer.tensor
    bounds = zip(tensor.smallest, shape, tensor.largest, strict=False)
    if len(shape) != len(tensor.largest) or not all(low <= size <= high for low, size, high in bounds):
        raise ValueError(
            f"input '{tensor.name}' is {list(shape)}, and the plan's optimization profile goes from "
            f"{list(tensor.smallest)} to {list(tensor.largest)}"
        )
    pinned = buffer.array(shape)
    if len(arrays) == 1:
        pinned[...] = arrays[0]
    else:
        np.concatenate(arrays, out=pinned)
    return shape
