"""Networks that cost next to nothing, so that everything around a network can be measured; and repositories with them.

Both keep the tensor contract. They are served with the CPU configuration on any machine: what is measured is the way
to the network and back.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from groundglass import contract
from groundglass.manifest import Manifest, file_digest, write_manifest
from groundglass_bench import waiting_unet
from groundglass_ensemble.repository import config_file, read_config

CONFIG_NAME: Final = "cpu"

_OPSET: Final = 18
_ONNX_TYPES: Final = {
    "FP32": TensorProto.FLOAT,
    "UINT8": TensorProto.UINT8,
    "INT32": TensorProto.INT32,
    "BOOL": TensorProto.BOOL,
}
_LESION_FROM: Final = 0.9
"""Of the lung window, -1350 to 150 HU: 0 HU."""

POSITIVE_PIXELS: Final = 64
"""Lesion pixels that make a slice positive."""


def near_free_unet(positive_pixels: int = POSITIVE_PIXELS) -> onnx.ModelProto:
    """IMAGE -> a mask that looks at the middle 64 rows, eight of whose values stand for a row of the mask each.

    What it reads lies in one piece: 0.04 ms a slice, where every eighth column took 0.13 (one core, November 2026).
    """
    side, row_bytes = contract.IMAGE_SIDE, contract.MASK_ROW_BYTES
    constants: dict[str, Any] = {
        "first": np.array([(side - row_bytes) // 2], np.int64),
        "end": np.array([(side + row_bytes) // 2], np.int64),
        "rows": np.array([2], np.int64),
        "mask": np.array([0, side, row_bytes], np.int64),
        "lesion_from": np.float32(_LESION_FROM),
        "all_bits": np.uint8(255),
        "values": np.array([1, 2], np.int64),
        "eight": np.float32(8),
        "column": np.array([-1, 1], np.int64),
        "enough": np.int32(positive_pixels),
    }
    nodes = [
        helper.make_node("Slice", ["IMAGE", "first", "end", "rows"], ["middle"]),
        helper.make_node("Reshape", ["middle", "mask"], ["sampled"]),
        helper.make_node("GreaterOrEqual", ["sampled", "lesion_from"], ["lesion"]),
        helper.make_node("Cast", ["lesion"], ["bytes"], to=TensorProto.UINT8),
        helper.make_node("Mul", ["bytes", "all_bits"], ["MASK"]),
        helper.make_node("Cast", ["lesion"], ["ones"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["ones", "values"], ["count"], keepdims=0),
        helper.make_node("Mul", ["count", "eight"], ["area"]),
        helper.make_node("Reshape", ["area", "column"], ["area_column"]),
        helper.make_node("Cast", ["area_column"], ["LESION_PIXELS"], to=TensorProto.INT32),
        helper.make_node("GreaterOrEqual", ["LESION_PIXELS", "enough"], ["SLICE_POSITIVE"]),
    ]
    graph = helper.make_graph(
        nodes,
        "near_free",
        [_value(tensor) for tensor in contract.UNET.inputs],
        [_value(tensor) for tensor in contract.UNET.outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def describe_near_free(file: Path, positive_pixels: int = POSITIVE_PIXELS) -> None:
    """Write the manifest of a near-free network, without which it is no version that can be swapped."""
    window = {"centre": contract.LUNG_WINDOW_CENTRE_HU, "width": contract.LUNG_WINDOW_WIDTH_HU}
    manifest = Manifest(
        model=contract.UNET.name,
        file=file.name,
        model_sha256=file_digest(file),
        sources=(),
        precision="fp32",
        opset=_OPSET,
        window_hu=window,
        calibration={"probability_threshold": _LESION_FROM, "min_lesion_pixels": positive_pixels},
        parity={},
        training={},
        versions={},
    )
    write_manifest(file, manifest)


def near_free_repository(source: Path, target: Path, max_batch: int = contract.MAX_BATCH) -> Path:
    """A copy of the model repository ``source`` with the near-free network. Returns ``target``.

    ``max_batch`` is the rows that a request may carry; another than the contract's is for peers, not for our client.
    """
    unet = _copied(source, target)
    onnx.save(near_free_unet(), unet / "1" / "model.onnx")
    describe_near_free(unet / "1" / "model.onnx")
    _rewrite(config_file(unet, CONFIG_NAME), _whole)
    if max_batch != contract.MAX_BATCH:
        for model in (contract.CT_SCAN, contract.PREPROCESS, contract.UNET):
            _rewrite(config_file(target / model.name, CONFIG_NAME), lambda config: _set_batch(config, max_batch))
    return target


def _whole(config: Any) -> None:
    """Run requests as they come: what costs nothing gains nothing by being cut into slices."""
    for name in ("rows_per_run", "concurrent_runs"):
        if name in config.parameters:
            del config.parameters[name]


def waiting_repository(source: Path, target: Path, slice_ms: float, rows: int, instances: int = 1) -> Path:
    """A copy of ``source`` whose network waits ``slice_ms`` for each slice, in each of ``instances`` processes.

    It takes requests of ``rows`` slices one by one.
    """
    unet = _copied(source, target)
    shutil.copy(waiting_unet.__file__, unet / "1" / "model.py")

    def wait(config: Any) -> None:
        config.backend = "python"
        config.default_model_filename = "model.py"
        config.instance_group[0].count = instances
        # One request an execution: several would be answered together, after the last. The queue keeps its bound.
        config.dynamic_batching.preferred_batch_size[:] = [rows]
        config.ClearField("parameters")
        config.parameters[waiting_unet.SLICE_MS].string_value = str(slice_ms)

    _rewrite(config_file(unet, CONFIG_NAME), wait)
    return target


def _copied(source: Path, target: Path) -> Path:
    """A copy without any version of ``unet``; returns its folder there, with an empty version 1."""
    unet = source / contract.UNET.name

    def left_out(folder: str, names: list[str]) -> set[str]:
        versions = {name for name in names if name.isdecimal()} if Path(folder) == unet else set()
        return versions | {name for name in names if name == "__pycache__"}

    shutil.copytree(source, target, ignore=left_out)
    (target / contract.UNET.name / "1").mkdir()
    return target / contract.UNET.name


def _rewrite(file: Path, change: Callable[[Any], None]) -> None:
    config = read_config(file)
    change(config)
    file.write_text(text_format.MessageToString(config))


def _set_batch(config: Any, max_batch: int) -> None:
    config.max_batch_size = max_batch


def _value(tensor: contract.TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, _ONNX_TYPES[tensor.datatype], ["n", *tensor.dims])
