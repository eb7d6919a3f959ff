"""A near-free network that keeps the tensor contract, and whose verdict can be told beforehand.

A pixel is lesion where ``IMAGE >= 0.9``, which is where HU reaches 0; a slice is positive from
A pixel is lesion where ``IMAGE >= 0.9``, that is where HU reaches 0; a slice is positive from
serving side need no torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from groundglass import contract

LESION_HU = 0
"""Hounsfield units from which the probe network marks a pixel."""

POSITIVE_PIXELS = 64
"""Lesion pixels of the 512x512 image that make a slice positive."""

_THRESHOLD = 0.9  # of the window from -1350 to 150 HU: 0 HU
_OPSET = 18
_ONNX_TYPES = {
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "FP32": TensorProto.FLOAT,
    "UINT8": TensorProto.UINT8,
    "BOOL": TensorProto.BOOL,
}


def slices(positives: list[bool] | NDArray[np.bool_], side: int = 32) -> NDArray[np.int16]:
    """Slices int16 (n, side, side), HU, that the probe network finds positive or negative as asked."""
    hu = np.full((len(positives), side, side), -1000, dtype=np.int16)
    hu[np.asarray(positives, dtype=np.bool_), side // 4 : side // 2, side // 4 : side // 2] = LESION_HU + 40
    return hu


def preprocess() -> onnx.ModelProto:
    """HU -> lung window -> 512x512 by nearest neighbour -> [0, 1]."""
    low_hu = contract.LUNG_WINDOW_CENTRE_HU - contract.LUNG_WINDOW_WIDTH_HU / 2
    constants = {
        "low": np.float32(low_hu),
        "width": np.float32(contract.LUNG_WINDOW_WIDTH_HU),
        "zero": np.float32(0),
        "one": np.float32(1),
        "channel": np.array([1], np.int64),
        "side": np.array([contract.IMAGE_SIDE, contract.IMAGE_SIDE], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["HU"], ["hu"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["hu", "low"], ["above"]),
        helper.make_node("Div", ["above", "width"], ["windowed"]),
        helper.make_node("Clip", ["windowed", "zero", "one"], ["clipped"]),
        helper.make_node("Unsqueeze", ["clipped", "channel"], ["image"]),
        helper.make_node(
            "Resize", ["image", "", "", "side"], ["IMAGE"], axes=[2, 3], mode="nearest",
            coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        ),
    ]  # fmt: skip
    return _model(contract.PREPROCESS, nodes, constants)


def unet(positive_pixels: int = POSITIVE_PIXELS) -> onnx.ModelProto:
    """IMAGE -> mask by threshold, bit-packed; lesion pixels; slice verdict."""
    side, row_bytes = contract.IMAGE_SIDE, contract.MASK_ROW_BYTES
    constants = {
        "threshold": np.float32(_THRESHOLD),
        "bits": np.array([0, side, row_bytes, 8], np.int64),
        "weights": 2.0 ** np.arange(7, -1, -1, dtype=np.float32)[:, None],
        "last": np.array([3], np.int64),
        "pixels": np.array([1, 2, 3], np.int64),
        "column": np.array([-1, 1], np.int64),
        "enough": np.int32(positive_pixels),
    }
    nodes = [
        helper.make_node("GreaterOrEqual", ["IMAGE", "threshold"], ["lesion"]),
        helper.make_node("Cast", ["lesion"], ["bit"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["bit", "bits"], ["octets"]),
        helper.make_node("MatMul", ["octets", "weights"], ["bytes"]),
        helper.make_node("Squeeze", ["bytes", "last"], ["byte"]),
        helper.make_node("Cast", ["byte"], ["MASK"], to=TensorProto.UINT8),
        helper.make_node("ReduceSum", ["bit", "pixels"], ["area"], keepdims=0),
        helper.make_node("Reshape", ["area", "column"], ["area_column"]),
        helper.make_node("Cast", ["area_column"], ["LESION_PIXELS"], to=TensorProto.INT32),
        helper.make_node("GreaterOrEqual", ["LESION_PIXELS", "enough"], ["SLICE_POSITIVE"]),
    ]
    return _model(contract.UNET, nodes, constants)


def build_repository(source: Path, target: Path) -> Path:
    """A copy of the model repository ``source`` that serves the probe network. Returns ``target``."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.onnx", "*.plan", "*.manifest.json", "__pycache__"))
    for name, model in (("preprocess", preprocess()), ("unet", unet())):
        folder = target / name / "1"
        folder.mkdir(exist_ok=True)
        onnx.save(model, folder / "model.onnx")
    return target


def _model(
    spec: contract.ModelSpec, nodes: list[onnx.NodeProto], constants: dict[str, NDArray[np.generic]]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        spec.name,
        [_value(tensor) for tensor in spec.inputs],
        [_value(tensor) for tensor in spec.outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def _value(tensor: contract.TensorSpec) -> onnx.ValueInfoProto:
    free = [f"{tensor.name}_{axis}" if size == contract.ANY else size for axis, size in enumerate(tensor.dims)]
    return helper.make_tensor_value_info(tensor.name, _ONNX_TYPES[tensor.datatype], ["n", *free])
