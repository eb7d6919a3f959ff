"""A float graph in the form that the FP16 and INT8 exports read: FP32 weights, normalisation inside convolutions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from groundglass.errors import ModelError
from groundglass_export.graph_types import one_line, opset_of

Array = NDArray[Any]

LEAST_OPSET = 13
"""The first with a DequantizeLinear per channel."""

QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger"})


@dataclass(frozen=True)
class FloatGraph:
    """Nodes in an order in which they can be run, and their constants: ``arrays`` by name, FP32 where they are weights.

    ``frame`` holds the inputs, outputs, opset and ir_version of the model it came from, without nodes. ``shapes`` are
    those of its values, 0 for a free dimension.
    """

    nodes: tuple[onnx.NodeProto, ...]
    arrays: Mapping[str, Array] = field(repr=False)
    frame: onnx.ModelProto = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @cached_property
    def producer(self) -> Mapping[str, onnx.NodeProto]:
        """Value -> the node that makes it."""
        return {name: node for node in self.nodes for name in node.output}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[onnx.NodeProto, ...]]:
        """Value -> the nodes that read it, each once."""
        found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                found[name].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @property
    def convolutions(self) -> tuple[onnx.NodeProto, ...]:
        """In the order in which they are run."""
        return tuple(node for node in self.nodes if node.op_type == "Conv")

    def with_arrays(self, arrays: Mapping[str, Array]) -> FloatGraph:
        """With some constants replaced or added; none may change its shape."""
        return replace(self, arrays={**self.arrays, **arrays})

    def model(self) -> onnx.ModelProto:
        """As ONNX."""
        return in_frame(self.frame, self.nodes, self.arrays)


def in_frame(frame: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], arrays: Mapping[str, Array]) -> onnx.ModelProto:
    """A model of ``nodes`` with the inputs and outputs of ``frame``, and those ``arrays`` that they read."""
    model = onnx.ModelProto()
    model.CopyFrom(frame)
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(array, order="C"), name) for name, array in arrays.items() if name in read
    )
    return model


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as plain values."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def is_depthwise(node: onnx.NodeProto, weight: Array) -> bool:
    """Whether a convolution has one filter for each channel, and nothing across channels."""
    groups = int(attributes(node).get("group", 1))
    return groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1


def folded(model: onnx.ModelProto) -> FloatGraph:
    """Casts of stored weights carried out, Constant nodes turned into arrays, normalisation folded into convolutions.

    Every convolution gets a bias. Raises ModelError for an opset below 13, for a weight that is not finite, for a batch
    normalisation that does not follow a convolution of its own, for a graph without convolutions, and for one that is
    quantized already.
    """
    opset = opset_of(model)
    if opset < LEAST_OPSET:
        raise ModelError(f"the model has opset {opset}; INT8 needs at least {LEAST_OPSET}: export it again")
    nodes, arrays = _with_constants(model.graph)
    _refuse_unsuitable(model.graph.name, nodes, arrays)
    nodes, arrays = _normalisation_folded(nodes, arrays)
    frame = onnx.ModelProto()
    frame.CopyFrom(model)
    for part in (frame.graph.node, frame.graph.initializer, frame.graph.value_info, frame.metadata_props):
        del part[:]
    return FloatGraph(tuple(nodes), arrays, frame, _shapes(in_frame(frame, nodes, arrays)))


def _refuse_unsuitable(name: str, nodes: Sequence[onnx.NodeProto], arrays: Mapping[str, Array]) -> None:
    kinds = {node.op_type for node in nodes}
    if found := sorted(kinds & QUANTIZED):
        raise ModelError(f"the model {name!r} is quantized already: it holds {found[0]}; expected the FP32 model")
    if "Conv" not in kinds:
        raise ModelError(f"the model {name!r} has no convolution: there is nothing to quantize")
    for weights, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ModelError(f"the weights {weights!r} are not finite; train or export the model again")


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    try:
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise ModelError(f"ONNX finds no shapes in the graph {model.graph.name!r}: {one_line(error)}") from error
    return {
        value.name: tuple(int(dim.dim_value) for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
    }


def _with_constants(graph: onnx.GraphProto) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    nodes = []
    for node in graph.node:
        given = attributes(node)
        if node.op_type == "Constant" and "value" in given:
            arrays[node.output[0]] = numpy_helper.to_array(given["value"])
        elif node.op_type == "Cast" and node.input[0] in arrays:
            arrays[node.output[0]] = arrays[node.input[0]].astype(helper.tensor_dtype_to_np_dtype(given["to"]))
        else:
            nodes.append(node)
    return nodes, arrays


def _normalisation_folded(
    nodes: Sequence[onnx.NodeProto], arrays: Mapping[str, Array]
) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """Each convolution with an FP32 weight and bias of its own, into which the normalisation behind it goes."""
    kept, found = [], dict(arrays)
    read = Counter(name for node in nodes for name in dict.fromkeys(node.input))
    makers: dict[str, str] = {}
    renamed: dict[str, str] = {}
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        if node.op_type == "BatchNormalization":
            source = str(node.input[0])
            if makers.get(source) != "Conv" or read[source] != 1:
                raise ModelError(f"the batch normalisation {node.output[0]!r} does not follow a convolution of its own")
            _fold(copy, source, found)
            renamed[node.output[0]] = source
            continue
        if node.op_type == "Conv":
            _own_weights(copy, found)
        makers.update(dict.fromkeys(node.output, node.op_type))
        kept.append(copy)
    return kept, found


def _own_weights(node: onnx.NodeProto, arrays: dict[str, Array]) -> None:
    """Weight and bias in FP32, under names of this convolution alone."""
    output = node.output[0]
    if any(name not in arrays for name in node.input[1:]):
        raise ModelError(f"the weights of the convolution {output!r} are computed in the graph; expected stored ones")
    weight = arrays[node.input[1]].astype(np.float32)
    bias = arrays[node.input[2]].astype(np.float32) if len(node.input) > 2 else np.zeros(len(weight), np.float32)
    node.input[1:] = [f"{output}/weight", f"{output}/bias"]
    arrays.update(zip(node.input[1:], (weight, bias), strict=True))


def _fold(node: onnx.NodeProto, source: str, arrays: dict[str, Array]) -> None:
    """A batch normalisation into the convolution that makes ``source``."""
    scale, shift, mean, variance = (arrays[name].astype(np.float64) for name in node.input[1:5])
    factor = scale / np.sqrt(variance + float(attributes(node).get("epsilon", 1e-5)))
    weight, bias = arrays[f"{source}/weight"], arrays[f"{source}/bias"]
    arrays[f"{source}/weight"] = (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
    arrays[f"{source}/bias"] = ((bias - mean) * factor + shift).astype(np.float32)
