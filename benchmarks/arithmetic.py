"""How much arithmetic a network is, counted from its graph, and how much a device can do in a second."""

from __future__ import annotations

import re
from math import prod

import onnx

from groundglass.errors import ModelError

MACS_PER_TERA = 1e12

PEAK_FP16_TFLOPS: dict[tuple[str, ...], float] = {
    ("H200",): 989.0,
    ("H100", "PCIe"): 756.0,
    ("H100",): 989.0,
    ("A100",): 312.0,
    ("L40S",): 362.0,
    ("L4",): 121.0,
    ("A10",): 125.0,
    ("T4",): 65.0,
}
"""Dense FP16 tensor operations in TFLOP/s, by words of the device's name, the more special entry first. From NVIDIA's
data sheets of these products; sheets that state sparse figures (H200, H100, L40S, L4) were halved."""


def macs_per_slice(model: onnx.ModelProto) -> int:
    """Multiply-adds of all convolutions and matrix products for a batch of one.

    Everything else (activations, pooling, resizing, counting) is left out, as is usual. Raises ModelError when the
    shapes can't be told from the graph.
    """
    shapes = _shapes(_with_batch_of_one(model))
    return sum(_macs(node, shapes) for node in model.graph.node)


def limit_slices_per_s(macs: int, peak_tflops: float) -> float:
    """Slices a second of a device that did nothing but multiply and add, two operations each."""
    return peak_tflops * MACS_PER_TERA / (2 * macs)


def known_peak(device: str) -> float | None:
    """The table's entry for a device, None for one that is not in it."""
    words = set(re.split(r"[^A-Za-z0-9]+", device))
    return next((peak for entry, peak in PEAK_FP16_TFLOPS.items() if words.issuperset(entry)), None)


def _with_batch_of_one(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants = {tensor.name for tensor in copy.graph.initializer}
    for value in copy.graph.input:
        if value.name not in constants:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")  # they may name the batch that is now fixed
    del copy.graph.value_info[:]
    return copy


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
        return 0
    names = (node.input[0], node.input[1], node.output[0])
    if any(name not in shapes for name in names):
        raise ModelError(f"{node.op_type} {node.name!r}: its shapes can't be told from the graph")
    read, weights, made = (shapes[name] for name in names)
    if node.op_type == "Conv":
        return prod(made) * prod(weights[1:])  # weights: (out, in / groups, rows, cols)
    if node.op_type == "ConvTranspose":
        return prod(read) * prod(weights[1:])  # weights: (in, out / groups, rows, cols)
    transposed = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
    return prod(made) * read[0 if transposed else -1]
