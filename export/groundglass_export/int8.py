"""FP32 ONNX -> INT8 for CPUs: static, weights per channel, ranges set by calibration slices, in standard operators.

Convolutions compute in integers; the first and the last stay in float, and so does everything behind the logits: the
decisions are made exactly as in the FP32 graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from groundglass.errors import ModelError, SettingError
from groundglass_export.engine import LOGITS
from groundglass_export.float_graph import Array, FloatGraph, attributes, folded, is_depthwise
from groundglass_export.graph_types import one_line
from groundglass_export.int8_equalize import equalized
from groundglass_export.int8_qdq import QdqWriter, Weights, is_sum_of_sums
from groundglass_export.int8_stats import ChannelStats, channel_stats

METHOD: Final = "QDQ; extremes of equalized channels; weights per channel, symmetric; bias corrected"
MEASURED: Final = frozenset({"Conv", "Relu", "MaxPool", "Add", "Concat", "Resize"})
"""Operators whose results can be in 8 bits."""

LARGEST_WEIGHT: Final = 127
"""The largest code of a weight; the least is its negative."""

LARGEST_PAIR: Final = 127
"""Of two weights' codes before they are rounded, 128 after that: 255 * 128 is within 16 bits, 255 * 129 is not."""

_LEAST_STEP = 1e-12
_SOME = 3
_MOST_HEADROOM = 4.0


@dataclass(frozen=True, slots=True)
class Int8Settings:
    """How to quantize.

    vnni_only: use all 8 bits of every weight. CPUs with AVX2 or AVX-512 but without VNNI (most laptops before 2021) add
    two products of an activation and a weight in 16 bits, and what does not fit is clipped, silently: measured, the
    error of the logits doubled there. By default weights are scaled so that no such pair is too large; all CPUs then
    give the same answers.
    headroom: ranges are this many times what was seen. 1 suits real slices; a phantom varies less than patients do, and
    1.5 makes good for much of it.
    keep_float: names of convolutions that stay in float besides the first and the last.
    """

    vnni_only: bool = False
    headroom: float = 1.0
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1.0 <= self.headroom <= _MOST_HEADROOM:
            raise SettingError(f"headroom is {self.headroom}; expected 1 to {_MOST_HEADROOM:g}")


@dataclass(frozen=True, slots=True, eq=False)
class Int8Model:
    """A quantized graph and its account.

    kept_float: the convolutions that compute in float. images_sha256: over the calibration images' bytes, float32
    little-endian, in order.
    """

    model: onnx.ModelProto
    kept_float: tuple[str, ...]
    float_sums: tuple[str, ...]
    convolutions: int
    settings: Int8Settings
    slices: int
    images_sha256: str
    method: str = METHOD

    def precision_detail(self) -> dict[str, Any]:
        """For the manifest: what is in which precision."""
        return {
            "activation_bits": 8,
            "weight_bits": 8,
            "needs_vnni": self.settings.vnni_only,
            "convolutions": self.convolutions,
            "convolutions_int8": self.convolutions - len(self.kept_float),
            "kept_float": [*self.kept_float, *self.float_sums],
        }

    def quantization(self) -> dict[str, Any]:
        """For the manifest: what set the ranges."""
        return {
            "method": self.method,
            "headroom": self.settings.headroom,
            "slices": self.slices,
            "images_sha256": self.images_sha256,
        }


def quantize(
    model: onnx.ModelProto, images: Iterable[NDArray[np.float32]], settings: Int8Settings | None = None
) -> Int8Model:
    """The FP32 graph in INT8, its ranges set by ``images``, each float32 (1, 1, 512, 512): the graph's input.

    Two dozen slices that resemble what will be served, lesions among them, are enough. The value ``LOGITS`` stays a
    float value of that name. The same input on the same kind of CPU gives the same bytes. Needs about 2 GiB.

    Raises ModelError for a graph that can't be quantized (no LOGITS, too few convolutions, an opset below 13, weights
    that are not finite), and for images that are missing, not finite or of another shape; SettingError for a name in
    ``keep_float`` that no convolution has.
    """
    settings = settings or Int8Settings()
    graph = folded(model)
    inner = _before_logits(graph)
    kept = _kept_float(graph, settings.keep_float)
    slices = tuple(images)
    _check_images(slices, graph)
    measured = [node.output[0] for node in inner if node.op_type in MEASURED]
    graph, stats = equalized(graph, channel_stats(graph, measured, slices))
    weights = {
        node.output[0]: _weights(node, graph.arrays, stats, settings)
        for node in graph.convolutions
        if _name(node) not in kept
    }
    ranges = {name: found.range(settings.headroom) for name, found in stats.items() if name != LOGITS}
    quantized = QdqWriter(graph, ranges, weights).model()
    _check(quantized)
    return Int8Model(
        model=quantized,
        kept_float=kept,
        float_sums=tuple(_name(node) for node in inner if is_sum_of_sums(graph, node)),
        convolutions=len(graph.convolutions),
        settings=settings,
        slices=len(slices),
        images_sha256=_digest(slices),
    )


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])


def _before_logits(graph: FloatGraph) -> Sequence[onnx.NodeProto]:
    """Everything up to the logits; what follows decides, and stays as it is."""
    for place, node in enumerate(graph.nodes):
        if LOGITS in node.output:
            return graph.nodes[: place + 1]
    raise ModelError(f"the model has no value called {LOGITS}; expected a unet exported by this package")


def _kept_float(graph: FloatGraph, more: Iterable[str]) -> tuple[str, ...]:
    names = [_name(node) for node in graph.convolutions]
    unknown = [name for name in more if name not in names]
    if unknown:
        raise SettingError(
            f"no convolution is called {', '.join(unknown[:_SOME])}; there are {', '.join(names[:_SOME])} ..."
        )
    kept = {names[0], names[-1], *more}
    if len(kept) == len(names):
        raise ModelError(f"all {len(names)} convolutions of the model stay in float: there is nothing to quantize")
    return tuple(name for name in names if name in kept)


def _check_images(images: Sequence[NDArray[np.float32]], graph: FloatGraph) -> None:
    if not images:
        raise ModelError(
            "there is no calibration image: INT8 ranges are set by what the network sees; name some slices"
        )
    shape = tuple(size or 1 for size in graph.shapes[graph.frame.graph.input[0].name])
    for place, image in enumerate(images):
        if image.dtype != np.float32 or image.shape != shape:
            raise ModelError(f"calibration image {place} is {image.dtype} {image.shape}; expected float32 {shape}")
        if not np.isfinite(image).all():
            raise ModelError(f"calibration image {place} holds values that are not finite; leave its slice out")


def _weights(
    node: onnx.NodeProto, arrays: Mapping[str, Array], stats: Mapping[str, ChannelStats], settings: Int8Settings
) -> Weights:
    weight = arrays[node.input[1]].astype(np.float64)
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1) / LARGEST_WEIGHT
    if not settings.vnni_only:
        largest = np.maximum(largest, largest_pairs(weight, is_depthwise(node, weight)) / LARGEST_PAIR)
    scales = np.maximum(largest, _LEAST_STEP).astype(np.float32)
    per_filter = scales.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    codes = np.clip(np.rint(weight / per_filter), -LARGEST_WEIGHT, LARGEST_WEIGHT)
    bias = arrays[node.input[2]].astype(np.float64) - _mean_shift(node, codes * per_filter - weight, stats)
    return Weights(codes.astype(np.int8), scales, bias)


def largest_pairs(weight: Array, depthwise: bool) -> Array:
    """Per filter, the largest sum of two weights of one sign that a CPU may add in 16 bits.

    A matrix product pairs neighbours along its inner axis: channels at one tap where channels come last, elements as
    they lie in ``weight`` (filters, channels, rows, cols) where they come first. Of a depthwise filter any two count.
    """
    taps = weight.reshape(len(weight), -1, int(np.prod(weight.shape[2:])))
    if depthwise:
        orders = [np.sort(taps[:, 0])[:, -2:], np.sort(-taps[:, 0])[:, -2:]]
    else:
        orders = [taps.reshape(len(weight), -1), taps.swapaxes(1, 2).reshape(len(weight), -1)]
    found = np.zeros(len(weight))
    for order in orders:
        even = np.pad(order, ((0, 0), (0, order.shape[1] % 2))).reshape(len(weight), -1, 2)
        for sign in (1.0, -1.0):
            found = np.maximum(found, np.maximum(sign * even, 0.0).sum(axis=2).max(axis=1))
    return found


def _mean_shift(node: onnx.NodeProto, error: Array, stats: Mapping[str, ChannelStats]) -> Array:
    """By how much rounded weights move each channel's mean, for the mean input (Nagel et al., arXiv:1906.04721)."""
    taps = error.reshape(*error.shape[:2], -1).sum(axis=2)
    mean = stats[node.input[0]].mean if node.input[0] in stats else np.zeros(0)
    if is_depthwise(node, error) and len(mean) == len(taps):
        return np.asarray(taps[:, 0] * mean)
    if int(attributes(node).get("group", 1)) == 1 and len(mean) == taps.shape[1]:
        return np.asarray(taps @ mean)
    return np.zeros(len(taps))


def _check(model: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"the quantized graph is no valid ONNX model: {one_line(error)}") from error


def _digest(images: Sequence[NDArray[np.float32]]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(np.ascontiguousarray(image, dtype="<f4").data)
    return digest.hexdigest()
