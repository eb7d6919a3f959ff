"""How large the values of a graph become on calibration images: what decides where FP16 is too small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from groundglass.errors import ModelError
from groundglass_export.engine import open_session
from groundglass_export.graph_types import value_types

_PREFIX = "largest of "


def largest_values(model: onnx.ModelProto, images: Sequence[NDArray[Any]]) -> dict[str, float]:
    """Each FP32 value that the nodes make -> its largest magnitude over ``images``, each one batch of the only input.

    The maxima are taken inside the graph, so that no more than one image's values are in memory at a time.

    Raises ModelError when the graph has not exactly one input, when an image doesn't fit it, or when a value is not
    finite even in FP32.
    """
    if not images:
        return {}
    inputs = {value.name for value in model.graph.input} - {item.name for item in model.graph.initializer}
    if len(inputs) != 1:
        raise ModelError(f"calibration feeds one input; the graph {model.graph.name!r} has {sorted(inputs)}")
    names = _float_values(model)
    runner = open_session(_with_maxima(model, names), model.graph.name)
    found = np.zeros(len(names))
    for image in images:
        try:
            maxima = runner.run([_PREFIX + name for name in names], {next(iter(inputs)): image})
        except Exception as error:  # ONNX Runtime's own tree of errors has no public root
            raise ModelError(f"a calibration image {image.dtype} {image.shape} can't be run: {error}") from error
        found = np.maximum(found, np.array(maxima, dtype=np.float64))
    _all_finite(names, found)
    return dict(zip(names, found.tolist(), strict=True))


def weight_error(weights: NDArray[np.float32]) -> float:
    """What rounding to FP16 does to weights: RMS of the error over RMS of the weights. About 2e-4 in FP16's range."""
    exact = weights.astype(np.float64)
    with np.errstate(over="ignore"):
        error = exact - weights.astype(np.float16)
    power = float(np.square(exact).sum())
    return float(np.sqrt(np.square(error).sum() / power)) if power else 0.0


def float_weights(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """The initializers that are floats, by name."""
    floating = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer if item.data_type in floating}


def _float_values(model: onnx.ModelProto) -> list[str]:
    types = value_types(model)
    return [name for node in model.graph.node for name in node.output if types.get(name) == TensorProto.FLOAT]


def _with_maxima(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for name in names:
        watched.graph.node.append(helper.make_node("Abs", [name], [f"magnitude of {name}"]))
        watched.graph.node.append(helper.make_node("ReduceMax", [f"magnitude of {name}"], [_PREFIX + name], keepdims=0))
        watched.graph.output.append(helper.make_tensor_value_info(_PREFIX + name, TensorProto.FLOAT, []))
    return watched


def _all_finite(names: Sequence[str], found: NDArray[np.float64]) -> None:
    for name, largest in zip(names, found, strict=True):
        if not np.isfinite(largest):
            raise ModelError(f"the value {name!r} is not finite in FP32 on the calibration images; check the weights")


def magnitudes_of(node: onnx.NodeProto, largest: Mapping[str, float]) -> float:
    """The largest magnitude that a node reads or writes, as far as it was measured."""
    return max((largest[name] for name in (*node.input, *node.output) if name in largest), default=0.0)
