"""A float graph and the ranges of its values become a graph in 8 bits: QuantizeLinear and DequantizeLinear, for CPUs.

Standard ONNX operators only; the forms were chosen by what ONNX Runtime makes integer kernels of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper

from groundglass_export.float_graph import Array, FloatGraph, attributes, in_frame
from groundglass_export.int8_stats import Range

ALONG: Final = frozenset({"Relu", "MaxPool", "Resize"})
"""What a convolution's output may pass on its way to its first rounding: it can be decided by the range behind it."""

_LARGEST_BIAS: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Of one convolution: int8 codes, one scale for each filter (float32), and the bias (float64, still real)."""

    codes: Array
    scales: Array
    bias: Array


@dataclass(frozen=True, slots=True)
class Codes:
    """A value in 8 bits: the name of its uint8 tensor, the names of its scale and zero point, and their meaning."""

    name: str
    parameters: tuple[str, str]
    range: Range


@dataclass
class QdqWriter:
    """Writes the graph in 8 bits. A value of the float graph is there in float, in codes, or in both.

    ``ranges`` names the values that may be in codes; ``weights`` the convolutions that are, by their output.
    """

    graph: FloatGraph
    ranges: Mapping[str, Range]
    weights: Mapping[str, Weights]
    _nodes: list[onnx.NodeProto] = field(default_factory=list)
    _arrays: dict[str, Array] = field(default_factory=dict)
    _codes: dict[str, Codes] = field(default_factory=dict)
    _copies: int = 0

    def model(self) -> onnx.ModelProto:
        """The whole graph, in the order of the float one."""
        for node in self.graph.nodes:
            self._add(node)
        return in_frame(self.graph.frame, self._nodes, {**self.graph.arrays, **self._arrays})

    def _add(self, node: onnx.NodeProto) -> None:
        kind, output = node.op_type, node.output[0]
        if output in self._codes:
            return  # a Relu that went into the range of the convolution before it
        if kind in ("MaxPool", "Concat") or is_doubling(self.graph, node):
            for name in node.input[:1] if kind != "Concat" else node.input:
                self._rounded(name)
        held = self._codes.get(node.input[0])
        if kind == "Conv" and output in self.weights:
            self._convolution(node)
        elif kind == "Relu" and held:
            self._rectified(output, held)
        elif kind == "MaxPool" and held:
            self._on_codes(kind, [held.name], output, held, node)
        elif held and is_doubling(self.graph, node):
            self._doubled(node, held)
        else:
            self._emit(kind, [self._real(name) for name in node.input], node.output, node)
            if kind in ("Add", "Concat") and not is_sum_of_sums(self.graph, node):
                self._rounded(output)

    def _rounded(self, name: str) -> None:
        """Codes for a value that may have some."""
        if name in self.ranges:
            self._quantized(name, self.ranges[name])

    def _convolution(self, node: onnx.NodeProto) -> None:
        source, output = node.input[0], node.output[0]
        stored = self.weights[output]
        step = self._quantized(source, self.ranges[source]).range.scale
        bias_scales = (stored.scales * step).astype(np.float32)
        bias = np.clip(np.rint(stored.bias / bias_scales), -_LARGEST_BIAS, _LARGEST_BIAS).astype(np.int32)
        operands = [
            self._real(source),
            self._stored(node.input[1], stored.codes, stored.scales),
            self._stored(node.input[2], bias, bias_scales),
        ]
        self._emit("Conv", operands, [output], node)
        home = self._home(output)
        if home in self.ranges:
            codes = self._quantized(output, self.ranges[home])
            behind = self.graph.consumers[output]
            if len(behind) == 1 and behind[0].op_type == "Relu":
                # Its range begins at zero, where the rounding to codes clips: that is the Relu.
                self._codes[behind[0].output[0]] = codes

    def _home(self, output: str) -> str:
        """The value whose range a convolution's output is rounded with: behind a Relu or a pool that alone reads it.

        What is less than a pool's least maximum needs no code.
        """
        behind = self.graph.consumers.get(output, ())
        if len(behind) == 1 and behind[0].op_type in ALONG and behind[0].output[0] in self.ranges:
            return str(behind[0].output[0])
        return output

    def _rectified(self, output: str, held: Codes) -> None:
        """On codes of a value with negatives: none below that of zero, which rounds nothing a second time."""
        self._on_codes("Clip", [held.name, held.parameters[1]], output, held)

    def _doubled(self, node: onnx.NodeProto, held: Codes) -> None:
        """Copies of whole pixels, channels last: each beside itself, then each row below itself.

        ONNX Runtime's integer convolutions have channels last, and its Resize is 8 times slower there than these
        copies; the transpositions cancel out with its own (1.32, November 2026: 15.6 ms of 152 ms a slice, and 1.9).
        """
        output = node.output[0]
        _, channels, rows, cols = self.graph.shapes[node.input[0]]
        pixels = self._step("Transpose", [held.name], f"{output}/last", perm=(0, 2, 3, 1))
        wide = self._step("Concat", [pixels, pixels], f"{output}/wide", axis=3)
        lines = self._reshaped(wide, f"{output}/lines", (0, rows, 2 * cols * channels))
        tall = self._step("Concat", [lines, lines], f"{output}/tall", axis=2)
        doubled = self._reshaped(tall, f"{output}/doubled", (0, 2 * rows, 2 * cols, channels))
        codes = self._step("Transpose", [doubled], f"{output}/codes", perm=(0, 3, 1, 2))
        self._codes[output] = Codes(codes, held.parameters, held.range)

    def _reshaped(self, source: str, output: str, shape: tuple[int, ...]) -> str:
        return self._step("Reshape", [source, self._constant(f"{output}/shape", np.array(shape, np.int64))], output)

    def _step(self, kind: str, inputs: list[str], output: str, **given: Any) -> str:
        self._nodes.append(helper.make_node(kind, inputs, [output], output, **given))
        return output

    def _on_codes(
        self, kind: str, inputs: list[str], output: str, held: Codes, like: onnx.NodeProto | None = None
    ) -> None:
        """A node that only picks among its input's codes: they keep their meaning."""
        self._emit(kind, inputs, [f"{output}/codes"], like)
        self._codes[output] = Codes(f"{output}/codes", held.parameters, held.range)

    def _quantized(self, name: str, chosen: Range) -> Codes:
        """The codes of a value; it is rounded here if it was not before."""
        if name not in self._codes:
            parameters = (
                self._constant(f"{name}/scale", np.asarray(chosen.scale)),
                self._constant(f"{name}/zero_point", np.asarray(chosen.zero_point)),
            )
            self._emit("QuantizeLinear", [name, *parameters], [f"{name}/codes"])
            self._codes[name] = Codes(f"{name}/codes", parameters, chosen)
        return self._codes[name]

    def _real(self, name: str) -> str:
        """A value in float, for one reader: runtimes pair a DequantizeLinear with the one node that reads it."""
        held = self._codes.get(name)
        if held is None:
            return name
        self._copies += 1
        output = f"{name}/real_{self._copies}"
        self._emit("DequantizeLinear", [held.name, *held.parameters], [output])
        return output

    def _stored(self, name: str, codes: Array, scales: Array) -> str:
        """A constant as codes with a scale for each row; the zero points are zero."""
        inputs = [
            self._constant(f"{name}/codes", codes),
            self._constant(f"{name}/scale", scales),
            self._constant(f"{name}/zero_point", np.zeros(len(scales), codes.dtype)),
        ]
        return self._step("DequantizeLinear", inputs, f"{name}/real", axis=0)

    def _constant(self, name: str, array: Array) -> str:
        self._arrays[name] = array
        return name

    def _emit(
        self, kind: str, inputs: Iterable[str], outputs: Iterable[str], like: onnx.NodeProto | None = None
    ) -> None:
        """A node; ``like`` gives its name and attributes, as far as it is of the same kind."""
        names = list(outputs)
        node = helper.make_node(kind, list(inputs), names, names[0])
        if like is not None:
            node.name = like.name
            node.attribute.extend(like.attribute)
        self._nodes.append(node)


def is_sum_of_sums(graph: FloatGraph, node: onnx.NodeProto) -> bool:
    """A residual sum on top of another one; it is left in float, so that rounding errors don't pile up along the chain.

    Measured on the reference network: a fifth less error of the logits for 3 % of the time.
    """
    makers = [graph.producer.get(name) for name in node.input]
    return node.op_type == "Add" and any(maker is not None and maker.op_type == "Add" for maker in makers)


def is_doubling(graph: FloatGraph, node: onnx.NodeProto) -> bool:
    """Whether a Resize repeats each pixel of an image of known size twice in both directions."""
    if node.op_type != "Resize":
        return False
    given, scales = attributes(node), graph.arrays.get(node.input[2]) if len(node.input) > 2 else None
    return (
        given.get("mode", b"nearest") == b"nearest"
        and given.get("coordinate_transformation_mode") == b"asymmetric"
        and given.get("nearest_mode") == b"floor"
        and scales is not None
        and scales.tolist() == [1, 1, 2, 2]
        and all(graph.shapes.get(node.input[0], (0, 0))[1:])
    )
