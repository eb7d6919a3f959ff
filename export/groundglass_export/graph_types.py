"""Which number types an ONNX graph computes in, read from the graph itself."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto

from groundglass.errors import ModelError

_FLOATING = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE},
)
# A cast is a border between types: it computes in neither.
_BORDERS = frozenset({"Cast", "CastLike", "QuantizeLinear", "DequantizeLinear"})


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Every value of the graph -> its ``TensorProto.DataType``: inputs, initializers, and what the nodes make.

    Raises ModelError when ONNX can't infer a type.
    """
    try:
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError) as error:
        raise ModelError(f"ONNX finds no types in the graph {model.graph.name!r}: {one_line(error)}") from error
    found = {item.name: int(item.data_type) for item in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        found[value.name] = int(value.type.tensor_type.elem_type)
    return found


def computing_type(node: onnx.NodeProto, types: Mapping[str, int]) -> int | None:
    """The floating type that a node computes in; None for one that computes in integers, shapes or not at all.

    That is the type of its first result, or of its first operand where the result is no float (a comparison).
    """
    if node.op_type in _BORDERS:
        return None
    for name in (node.output[0], *node.input[:1]):
        if types.get(name) in _FLOATING:
            return types[name]
    return None


def conv_weight_types(model: onnx.ModelProto) -> dict[str, str]:
    """Each convolution -> the type its weights have when it reads them, as ONNX spells it: ``FLOAT16``, ``FLOAT``.

    A weight that is stored in FP16 and cast to FP32 on the way counts as ``FLOAT``.
    """
    types = value_types(model)
    return {
        node.name: TensorProto.DataType.Name(types[node.input[1]])
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose")
    }


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model is written in; 0 when it doesn't say."""
    return next((int(item.version) for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


def one_line(error: BaseException) -> str:
    """The first line of a foreign error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
