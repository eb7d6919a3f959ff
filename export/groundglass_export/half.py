"""An FP32 ONNX graph becomes an FP16 one with the same inputs and outputs, and says what it left in FP32 and why.

TensorRT builds a strongly typed network as its graph is typed, so the precision of a plan is decided here, where it can
be read from the file, and not by a builder's flag that newer versions ignore.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from groundglass.errors import ModelError
from groundglass_export.engine import LOGITS
from groundglass_export.float_graph import folded
from groundglass_export.graph_types import computing_type, conv_weight_types, opset_of, value_types
from groundglass_export.half_autocast import autocast
from groundglass_export.half_ranges import float_weights, largest_values, magnitudes_of, weight_error

OPSETS = range(14, 24)
"""Opsets that are converted: each was tried on the whole network, under ONNX Runtime and TensorRT-RTX 1.7."""

FP16_LARGEST = float(np.finfo(np.float16).max)
_QUANTIZED = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger"}
)


@dataclass(frozen=True, slots=True)
class HalfSettings:
    """When a node stays FP32.

    ``largest_value``: it reads or writes a larger magnitude on the calibration images, or has a larger weight. FP16
    ends at 65,504; the default leaves a factor of two for slices that were not seen. ``weight_error``: rounding its
    weights changes them by more than this share (RMS over RMS); within FP16's normal range it is 2e-4, and grows where
    weights are so small that FP16 runs out of exponent. ``keep_fp32``: names of nodes that shall stay.
    """

    largest_value: float = FP16_LARGEST / 2
    weight_error: float = 1e-3
    keep_fp32: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KeptNode:
    """A node that computes in FP32, and why: ``named``, ``decision``, ``range``, ``accuracy`` or ``operator``.

    ``decision``: it comes after the logits, where a threshold is compared and pixels are counted, which must be exact.
    ``operator``: ONNX defines it for FP32 only.
    """

    name: str
    operator: str
    reason: str


@dataclass(frozen=True, slots=True)
class HalfModel:
    """An FP16 graph and its account. Counts are of nodes that compute in floating point; casts are none."""

    model: onnx.ModelProto
    kept_fp32: tuple[KeptNode, ...]
    float_nodes: int
    convolutions: int
    half_convolutions: int

    @property
    def share_fp16(self) -> float:
        """Of the nodes that compute in floating point, 0..1."""
        return 1.0 - len(self.kept_fp32) / self.float_nodes if self.float_nodes else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For the manifest's ``precision_detail``."""
        return {
            "share_fp16": round(self.share_fp16, 4),
            "float_nodes": self.float_nodes,
            "convolutions": self.convolutions,
            "convolutions_fp16": self.half_convolutions,
            "kept_fp32": {node.name: f"{node.operator}: {node.reason}" for node in self.kept_fp32},
        }


def to_half(
    model: onnx.ModelProto, images: Sequence[NDArray[Any]] = (), settings: HalfSettings | None = None
) -> HalfModel:
    """Cast an FP32 graph to FP16; its inputs and outputs keep their types.

    ``images`` are calibration batches of its input (for ``unet`` float32 (n, 1, 512, 512) in 0..1); without them only
    the weights decide what stays FP32. Batch normalisation is folded into convolutions first, in FP32: rounding once
    was measured to be half as far from FP32 as rounding weights and normalisation apart. The value ``LOGITS``, where
    the graph has it, stays an FP32 value of that name. The same input and the same packages give the same bytes.

    Raises ModelError for a graph that can't be cast (its opset, a foreign operator, weights that are not finite),
    SettingError never, MissingExtra without nvidia-modelopt.
    """
    settings = settings or HalfSettings()
    _refuse_unsuitable(model)
    plain = _plain(model)
    reasons = _reasons(plain, largest_values(plain, images), settings)
    half = _tidied(autocast(plain, reasons), model)
    onnx.checker.check_model(half, full_check=True)
    return _account(half, reasons)


def _refuse_unsuitable(model: onnx.ModelProto) -> None:
    opset, name = opset_of(model), model.graph.name
    if opset not in OPSETS:
        raise ModelError(
            f"{name!r} has opset {opset}; FP16 takes {OPSETS[0]} to {OPSETS[-1]}: export it again with one of these"
        )
    for node in model.graph.node:
        if node.op_type in _QUANTIZED:
            raise ModelError(f"{name!r} is quantized ({node.op_type} {node.name!r}); FP16 is made from the FP32 graph")
        if not onnx.defs.has(node.op_type, opset, node.domain) or any(a.type == a.GRAPH for a in node.attribute):
            raise ModelError(f"{name!r} has the operator {node.op_type} ({node.name!r}), which can't be cast to FP16")
    for weight, array in float_weights(model).items():
        if not np.isfinite(array).all():
            raise ModelError(f"{name!r}: weights {weight!r} are not finite; train or export the model again")


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights in FP32, normalisation folded, every node named: names are how autocast is told what to keep."""
    plain = onnx.ModelProto()
    plain.CopyFrom(folded(model).model() if any(node.op_type == "Conv" for node in model.graph.node) else model)
    seen: set[str] = set()
    for number, node in enumerate(plain.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{number}"
        seen.add(node.name)
    return plain


def _reasons(model: onnx.ModelProto, largest: Mapping[str, float], settings: HalfSettings) -> dict[str, str]:
    """Nodes that must stay FP32 -> why."""
    weights = float_weights(model)
    decision = _after(model.graph.node, LOGITS)
    reasons = {}
    for node in model.graph.node:
        own = [weights[name] for name in node.input if name in weights]
        if node.name in settings.keep_fp32:
            reasons[node.name] = "named"
        elif node.name in decision:
            reasons[node.name] = "decision"
        elif max([magnitudes_of(node, largest), *(float(np.abs(w).max(initial=0)) for w in own)]) > (
            settings.largest_value
        ):
            reasons[node.name] = "range"
        elif any(w.ndim > 1 and weight_error(w) > settings.weight_error for w in own):
            reasons[node.name] = "accuracy"
    if unknown := set(settings.keep_fp32) - reasons.keys():
        raise ModelError(f"no node of {model.graph.name!r} is called {sorted(unknown)}; keep_fp32 takes names of nodes")
    return reasons


def _after(nodes: Iterable[onnx.NodeProto], value: str) -> set[str]:
    """Names of the nodes that depend on ``value``; nodes are in an order in which they can be run."""
    values, found = {value}, set()
    for node in nodes:
        if values.intersection(node.input):
            values.update(node.output)
            found.add(node.name)
    return found


def _tidied(half: onnx.ModelProto, origin: onnx.ModelProto) -> onnx.ModelProto:
    """Logits under their own name in FP32, and nothing of the converter's in the file."""
    _name_logits(half.graph)
    half.producer_name, half.producer_version = origin.producer_name, origin.producer_version
    half.graph.name = origin.graph.name
    del half.graph.value_info[:]
    for part in (half, half.graph, *half.graph.node, *half.graph.input, *half.graph.output, *half.graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    return half


def _name_logits(graph: onnx.GraphProto) -> None:
    """The parity gate observes ``LOGITS`` in FP32; autocast gives the name to the FP16 value before the cast."""
    widened = next((n for n in graph.node if n.op_type == "Cast" and list(n.input) == [LOGITS]), None)
    if widened is None or LOGITS in {value.name for value in graph.output}:
        return
    renamed = {LOGITS: f"{LOGITS}_fp16", widened.output[0]: LOGITS}
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]


def _account(half: onnx.ModelProto, reasons: Mapping[str, str]) -> HalfModel:
    types = value_types(half)
    computing = {node.name: (node, computing_type(node, types)) for node in half.graph.node}
    floats = {name: pair for name, pair in computing.items() if pair[1] is not None}
    kept = tuple(
        KeptNode(name, node.op_type, reasons.get(name, "operator"))
        for name, (node, found) in floats.items()
        if found != TensorProto.FLOAT16
    )
    convolutions = conv_weight_types(half)
    halves = sum(found == "FLOAT16" for found in convolutions.values())
    return HalfModel(half, kept, len(floats), len(convolutions), halves)
