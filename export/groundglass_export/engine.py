"""The engine of ONNX graphs, under ONNX Runtime; a TensorRT plan has an engine of its own.

No torch is needed, so that a candidate can be checked in the container that serves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from groundglass.contract import (
    ANY,
    HU,
    IMAGE,
    LESION_PIXELS,
    MASK,
    PREPROCESS,
    SLICE_POSITIVE,
    UNET,
    ModelSpec,
    TensorSpec,
)
from groundglass.errors import ModelError, RepositoryError
from groundglass.manifest import file_digest
from groundglass_export.answers import Answers
from groundglass_export.graph_types import one_line

LOGITS: Final = "LOGITS"
"""The value inside the ``unet`` graph that its outputs are decided on; it is not served."""

CPU: Final = ("CPUExecutionProvider",)
_FATAL_ONLY: Final = 4  # ONNX Runtime would write an error to stderr that is raised anyway
_ONNX_TYPES: Final = MappingProxyType(
    {
        "INT16": onnx.TensorProto.INT16,
        "INT32": onnx.TensorProto.INT32,
        "FP32": onnx.TensorProto.FLOAT,
        "UINT8": onnx.TensorProto.UINT8,
        "BOOL": onnx.TensorProto.BOOL,
    }
)
_QUANTIZED: Final = frozenset({"DequantizeLinear", "QLinearConv", "ConvInteger"})


class OnnxEngine:
    """A ``unet`` graph under ONNX Runtime. Its logits are observed when the graph holds a value of that name.

    ``source`` is a file, or a graph in memory; the observed output is added in memory only. ``precision`` is read off
    the graph: what a file says of itself does not choose the limits that it is held to.

    Raises ModelError for a file that is missing, corrupted or refused by ONNX Runtime, and RepositoryError for a graph
    that breaks the tensor contract.
    """

    def __init__(
        self, source: Path | onnx.ModelProto, *, name: str | None = None, providers: Sequence[str] = CPU
    ) -> None:
        self.name = name or source_name(source)
        model = _checked_model(source, UNET)
        self.precision = graph_precision(model)
        self.digest = _digest(source)
        self._outputs = [tensor.name for tensor in UNET.outputs]
        if any(LOGITS in node.output for node in model.graph.node):
            self._outputs.append(LOGITS)
        self._session = open_session(_observed(model), self.name, providers)

    def answers(self, images: NDArray[np.float32]) -> Answers:
        """Raises ModelError when the graph fails on this batch, or answers in other shapes than the contract's."""
        found = _run(self._session, self._outputs, {IMAGE.name: images}, self.name)
        for tensor in UNET.outputs:
            _check_shape(self.name, tensor, found[tensor.name], len(images))
        return Answers(
            mask=np.unpackbits(found[MASK.name], axis=2).view(np.bool_),
            pixels=found[LESION_PIXELS.name][:, 0],
            positive=found[SLICE_POSITIVE.name][:, 0],
            probability=probability_of(found[LOGITS])[:, 0] if LOGITS in found else None,
        )


class OnnxPreprocess:
    """The ``preprocess`` graph under ONNX Runtime; it raises as :class:`OnnxEngine` does."""

    def __init__(self, source: Path | onnx.ModelProto, *, name: str | None = None) -> None:
        self.name = name or source_name(source)
        self._session = open_session(_checked_model(source, PREPROCESS), self.name)

    def image(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
        """int16 (rows, cols), Hounsfield units -> float32 (1, 512, 512) in 0..1. Raises ModelError."""
        found = _run(self._session, [IMAGE.name], {HU.name: np.ascontiguousarray(hu)[None]}, self.name)[IMAGE.name]
        _check_shape(self.name, IMAGE, found, 1)
        image: NDArray[np.float32] = found[0]
        return image


def open_session(model: onnx.ModelProto, name: str, providers: Sequence[str] = CPU) -> onnxruntime.InferenceSession:
    """A quiet session. Raises ModelError, naming ``name``, when ONNX Runtime refuses the graph or lacks a provider."""
    if lacking := [provider for provider in providers if provider not in onnxruntime.get_available_providers()]:
        # Left alone, ONNX Runtime falls back to the CPU with no more than a warning.
        raise ModelError(
            f"{name}: this onnxruntime has no {lacking[0]}; it has {', '.join(onnxruntime.get_available_providers())}"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(providers))
    except Exception as error:  # onnxruntime's errors share no root of their own
        raise ModelError(f"{name} was refused by ONNX Runtime: {one_line(error)}") from error


def graph_precision(model: onnx.ModelProto) -> str:
    """``int8`` for a quantized graph, ``fp16`` when a convolution takes FP16 weights, else ``fp32``.

    Weights that lie in FP16 and are cast to FP32 before the convolution make an FP32 graph.
    """
    if any(node.op_type in _QUANTIZED for node in model.graph.node):
        return "int8"
    half = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    convolutions = (node for node in model.graph.node if node.op_type == "Conv")
    return "fp16" if any(node.input[1] in half for node in convolutions) else "fp32"


def probability_of(logits: NDArray[Any]) -> NDArray[np.float32]:
    """The sigmoid of logits of any shape and float type, as float32; NaN where a logit is not finite."""
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and its inverse 0, as it should be
        sigmoid = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    return np.where(np.isfinite(logits), sigmoid, np.nan).astype(np.float32)


def source_name(source: Path | onnx.ModelProto) -> str:
    """How messages call a model that has no name of its own."""
    return source.name if isinstance(source, Path) else f"{source.graph.name or 'unnamed'} (in memory)"


def load_model(source: Path) -> onnx.ModelProto:
    """Read an ONNX file. Raises ModelError, naming it, when it is missing, unreadable, cut off or no ONNX at all."""
    try:
        model = onnx.load(source)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise ModelError(f"{source} is no readable ONNX model: {reason}; export it again") from error
    if not model.graph.node:
        raise ModelError(f"{source} is no readable ONNX model: it holds no graph; export it again")
    return model


def _checked_model(source: Path | onnx.ModelProto, spec: ModelSpec) -> onnx.ModelProto:
    model, name = (load_model(source), str(source)) if isinstance(source, Path) else (source, source_name(source))
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in constants}
    outputs = {value.name: value for value in model.graph.output}
    if surplus := sorted(inputs.keys() - {tensor.name for tensor in spec.inputs}):
        raise RepositoryError(f"{name} wants an input {surplus[0]} that the contract of {spec.name} does not have")
    for tensors, found in ((spec.inputs, inputs), (spec.outputs, outputs)):
        for tensor in tensors:
            _check_value(name, tensor, found.get(tensor.name))
    return model


def _check_value(name: str, tensor: TensorSpec, value: onnx.ValueInfoProto | None) -> None:
    if value is None:
        raise RepositoryError(f"{name} has no tensor {tensor.name}, which the contract asks for; export it again")
    found = value.type.tensor_type
    if found.elem_type != _ONNX_TYPES[tensor.datatype]:
        word = onnx.TensorProto.DataType.Name(found.elem_type)
        raise RepositoryError(f"{name} has {tensor.name} as {word}; the contract asks for {tensor.datatype}")
    dims = [dim.dim_value or ANY for dim in found.shape.dim]  # a free or unknown size reads 0
    if not found.HasField("shape"):
        return  # nothing is claimed; the answers' shapes are checked
    if len(dims) != 1 + len(tensor.dims) or any(
        ANY not in (size, asked) and size != asked for size, asked in zip(dims[1:], tensor.dims, strict=True)
    ):
        raise RepositoryError(f"{name} has {tensor.name} of shape {dims}; the contract asks for {[ANY, *tensor.dims]}")
    if dims[0] != ANY:
        raise RepositoryError(f"{name} takes {tensor.name} in batches of {dims[0]} only; the batch axis must be free")


def _observed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the logits among its outputs, in whatever type the graph computes them."""
    present = {value.name for value in model.graph.output}
    if LOGITS in present or not any(LOGITS in node.output for node in model.graph.node):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.append(onnx.ValueInfoProto(name=LOGITS))
    return copy


def _run(
    session: onnxruntime.InferenceSession, outputs: list[str], feed: dict[str, NDArray[Any]], name: str
) -> dict[str, NDArray[Any]]:
    try:
        return dict(zip(outputs, session.run(outputs, feed), strict=True))
    except Exception as error:  # onnxruntime's errors share no root of their own
        rows = len(next(iter(feed.values())))
        raise ModelError(f"{name} failed on a batch of {rows}: {one_line(error)}") from error


def _check_shape(name: str, tensor: TensorSpec, found: NDArray[Any], rows: int) -> None:
    if found.shape != (rows, *tensor.dims):
        raise ModelError(
            f"{name} answered {tensor.name} of shape {found.shape} to {rows} slices; expected {(rows, *tensor.dims)}"
        )


def _digest(source: Path | onnx.ModelProto) -> str:
    if isinstance(source, Path):
        return file_digest(source)
    return hashlib.sha256(source.SerializeToString(deterministic=True)).hexdigest()
