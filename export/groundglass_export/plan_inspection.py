"""In which precision a finished plan computes, layer by layer: read from the engine, not from what was asked for.

Two sources say the same. The engine inspector opens the plan, which takes the GPU that runs it. TensorRT-RTX also lists
the layers of a finished engine in its log while it builds, which takes none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from groundglass.errors import ModelError, ParityError
from groundglass_export.plan_reports import BuildLog
from groundglass_export.tensorrt_runtime import TensorRt, new_logger

FLOATS: Final = frozenset({"fp32", "fp16", "bf16"})
# Words for a type, in the order in which they are looked for: TensorRT 10 hides them in "Row major linear FP16 format".
_WORDS: Final = (
    ("BF16", "bf16"),
    ("BFloat16", "bf16"),
    ("FP16", "fp16"),
    ("Half", "fp16"),
    ("FP32", "fp32"),
    ("Float", "fp32"),
    ("Int8", "int8"),
    ("INT8", "int8"),
)
_LINE: Final = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?, Metadata: ?(?P<metadata>.*)"
)
_TENSOR: Final = re.compile(r"Dimensions: \[(?P<dims>[^\]]*)\].*?Datatype: (?P<type>\w+)")
_NODE: Final = re.compile(r"\[ONNX Layer: ([^\]]*)\]")

LEAST_HALF_LAYERS: Final = 0.8
"""Share of an FP16 plan's floating-point layers; the network has 0.97, its FP32 decisions being fused away."""

MOST_BYTES_PER_WEIGHT: Final = 3.0
"""Of an FP16 plan: FP16 weights take 2, FP32 ones 4. Measured on the network: 2.1 and 4.1."""

LEAST_WEIGHTS: Final = 1_000_000
"""Below that, a plan's size is code more than weights, and says nothing."""


@dataclass(frozen=True, slots=True)
class LayerPrecision:
    """A layer of an engine: often several nodes of the ONNX graph in one kernel.

    ``weights`` is the type of its largest constant, "" without one. ``precision`` is that, or else the type of its
    first floating-point result, or else operand ("" for integers): a kernel at the border casts what it reads and
    writes, and computes in the type of its constants. ``nodes`` are names in the ONNX graph.
    """

    name: str
    kind: str
    precision: str
    weights: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """Counts over a plan. ``source`` is ``inspector`` or ``build log``; layers are those that compute in floats."""

    source: str
    layers: int
    half_layers: int
    convolutions: int
    other_convolutions: tuple[str, ...]
    engine_bytes: int
    weights: int

    @property
    def share_fp16(self) -> float:
        """Of the layers, 0..1."""
        return self.half_layers / self.layers if self.layers else 0.0

    @property
    def bytes_per_weight(self) -> float:
        """Size of the plan over the number of the graph's weights."""
        return self.engine_bytes / self.weights if self.weights else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For the manifest's ``precision_detail``."""
        return {
            "source": self.source,
            "layers": self.layers,
            "share_fp16": round(self.share_fp16, 4),
            "convolutions": self.convolutions,
            "convolutions_fp16": self.convolutions - len(self.other_convolutions),
            "engine_bytes": self.engine_bytes,
            "bytes_per_weight": round(self.bytes_per_weight, 3),
        }


def layers(plan: bytes, runtime: TensorRt, *, version_compatible: bool = False) -> tuple[LayerPrecision, ...]:
    """The layers of a plan, by the engine inspector. Raises ModelError where the plan can't be opened.

    A ``version_compatible`` plan brings code of its own, which is run: say so only of one that you built.
    """
    log = BuildLog()
    logger = new_logger(runtime, log)
    opener = runtime.api.Runtime(logger)
    if version_compatible:
        opener.engine_host_code_allowed = True
    engine = opener.deserialize_cuda_engine(plan)
    if engine is None:
        raise ModelError(f"{runtime.title} can't open the plan here, on its own GPU it can: {log.complaint()}")
    text = engine.create_engine_inspector().get_engine_information(runtime.api.LayerInformationFormat.JSON)
    return layers_from_json(text)


def layers_from_json(text: str) -> tuple[LayerPrecision, ...]:
    """The engine inspector's JSON, of TensorRT 10 (type and format in one field) or of 11 and RTX (a field each).

    Raises ModelError for a plan that was built without detailed profiling: it holds names only.
    """
    found = json.loads(text).get("Layers", [])
    if any(isinstance(layer, str) for layer in found):
        raise ModelError("the plan holds only names of layers, no types: build it with groundglass export tensorrt")
    return tuple(_layer_from_json(layer) for layer in found)


def layers_from_log(lines: Iterable[str]) -> tuple[LayerPrecision, ...]:
    """The list of layers that TensorRT-RTX logs, one a line; lines of another form are left out."""
    matches = (_LINE.match(line) for line in lines)
    return tuple(_layer_from_line(match) for match in matches if match)


def precision_report(
    found: Sequence[LayerPrecision], source: str, *, convolutions: Collection[str], sizes: tuple[int, int]
) -> PrecisionReport:
    """Count. ``convolutions`` are names in the ONNX graph; ``sizes`` are the plan's bytes and the graph's weights.

    A convolution has the precision of the weights that the layer which runs it reads. One that no layer names counts
    as not FP16.
    """
    floats = [layer.precision for layer in found if layer.precision in FLOATS]
    types = _convolution_types(found)
    return PrecisionReport(
        source=source,
        layers=len(floats),
        half_layers=floats.count("fp16"),
        convolutions=len(convolutions),
        other_convolutions=tuple(name for name in convolutions if types.get(name) != "fp16"),
        engine_bytes=sizes[0],
        weights=sizes[1],
    )


def require_precision(report: PrecisionReport, precision: str, kept_fp32: Collection[str] = ()) -> None:
    """Raise ParityError, with the figures, for a plan that does not compute in ``precision``.

    ``fp16``: every convolution takes FP16 weights, ``kept_fp32`` excepted; most layers are FP16; the plan is no larger
    than FP16 weights make it. Nothing is asked of other precisions.
    """
    if precision != "fp16":
        return
    others = [name for name in report.other_convolutions if name not in kept_fp32]
    complaints = []
    if not report.layers:
        complaints.append("its layers could not be read")
    if others:
        complaints.append(f"{len(others)} of {report.convolutions} convolutions are not FP16 ({others[0]!r} first)")
    if report.layers and report.share_fp16 < LEAST_HALF_LAYERS:
        complaints.append(f"{report.share_fp16:.0%} of its layers are FP16, expected {LEAST_HALF_LAYERS:.0%}")
    if report.weights >= LEAST_WEIGHTS and report.bytes_per_weight > MOST_BYTES_PER_WEIGHT:
        complaints.append(f"it takes {report.bytes_per_weight:.1f} bytes a weight, expected 2 or little more")
    if complaints:
        raise ParityError(f"the plan is not FP16: {'; '.join(complaints)}. Build it from the FP16 graph")


def _convolution_types(found: Sequence[LayerPrecision]) -> dict[str, str]:
    """Node -> precision of the layer that runs it: the last that has weights, else the last that names it.

    A layer that only brings a convolution's input into another layout names the convolution too, and has no weights.
    """
    types: dict[str, str] = {}
    for layer in sorted(found, key=lambda layer: bool(layer.weights)):
        types.update(dict.fromkeys(layer.nodes, layer.weights or layer.precision))
    return types


def _layer_from_line(match: re.Match[str]) -> LayerPrecision:
    tensors = {part: _tensors_from_text(match[part]) for part in ("inputs", "constants", "outputs")}
    return _layer(match["name"], match["kind"], tensors, match["metadata"])


def _tensors_from_text(text: str) -> list[tuple[str, int]]:
    return [
        (_precision(match["type"]), prod(abs(int(size)) for size in re.findall(r"-?\d+", match["dims"])))
        for match in _TENSOR.finditer(text)
    ]


def _layer_from_json(layer: Mapping[str, Any]) -> LayerPrecision:
    tensors = {
        part.lower(): [
            (
                _precision(str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")),
                prod(abs(int(size)) for size in tensor.get("Dimensions", ())),
            )
            for tensor in layer.get(part, ())
        ]
        for part in ("Inputs", "Constants", "Outputs")
    }
    weights = layer.get("Weights")
    if isinstance(weights, Mapping) and weights.get("Count"):
        tensors["constants"].append((_precision(str(weights.get("Type", ""))), int(weights["Count"])))
    kind = str(layer.get("ParameterType") or layer.get("LayerType", ""))
    return _layer(str(layer.get("Name", "")), kind, tensors, str(layer.get("Metadata", "")))


def _layer(name: str, kind: str, tensors: Mapping[str, list[tuple[str, int]]], metadata: str) -> LayerPrecision:
    constants = [constant for constant in tensors["constants"] if constant[0]]
    weights = max(constants, key=lambda constant: constant[1])[0] if constants else ""
    moving = [precision for part in ("outputs", "inputs") for precision, _ in tensors[part]]
    return LayerPrecision(
        name=name,
        kind=kind,
        precision=next((precision for precision in (weights, *moving) if precision in FLOATS), ""),
        weights=weights,
        nodes=tuple(_NODE.findall(metadata)),
    )


def _precision(text: str) -> str:
    return next((precision for word, precision in _WORDS if word in text), "")
