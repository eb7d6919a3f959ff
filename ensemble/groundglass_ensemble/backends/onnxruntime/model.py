"""Stand-in for Triton's ONNX Runtime backend, for servers that have none: any ONNX model repository loads under it.

Triton takes this file only where ``libtriton_onnxruntime.so`` is missing. It reads the model's own configuration, and
holds nothing of the project that ships it. Settings carry the names of NVIDIA's backend:
https://github.com/triton-inference-server/onnxruntime_backend#model-config-options
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # at run time the files of a backend's folder lie beside one another, in no package
    from groundglass_ensemble.backends.onnxruntime.onnx_pieces import Pieces, pieces_wanted
    from groundglass_ensemble.backends.shared.stand_in_batch import Feed, split_rows
    from groundglass_ensemble.backends.shared.stand_in_config import (
        Config,
        check_dims,
        find_model_file,
        first_line,
        is_batching,
    )
    from groundglass_ensemble.backends.shared.stand_in_manifest import check_file
    from groundglass_ensemble.backends.shared.stand_in_requests import Requests
else:
    from onnx_pieces import Pieces, pieces_wanted
    from stand_in_batch import split_rows
    from stand_in_config import check_dims, find_model_file, first_line, is_batching
    from stand_in_manifest import check_file
    from stand_in_requests import Requests

THREADS_VARIABLE = "STANDIN_INTRA_OP_THREADS"
"""Environment variable: threads of an operator, for models whose configuration doesn't say."""

_ONNX_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_UINT16": "tensor(uint16)",
    "TYPE_UINT32": "tensor(uint32)",
    "TYPE_UINT64": "tensor(uint64)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
    "TYPE_STRING": "tensor(string)",
}  # TYPE_BF16 is missing: numpy has no such type


class TritonPythonModel:
    """One instance of an ONNX model: one session."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model file; raises RuntimeError, with the reason in its first line, when it can't be served."""
        config = json.loads(args["model_config"])
        path = find_model_file(args, config, "model.onnx")
        check_file(path)
        self._session = _open(path, config, args)
        _check(self._session, config)
        pieces = pieces_wanted(config)
        self._pieces = Pieces(self._session, config, *pieces) if pieces else None
        self._requests = Requests(config, "ONNX Runtime", self._run, take=_to_onnx, give=_to_triton)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request: those of one shape run as one batch, or each in pieces; each fails on its own."""
        return self._requests.answer(requests) if self._pieces is None else self._pieces.answer(requests)

    def finalize(self) -> None:
        """Let go of the session and its memory."""
        if self._pieces is not None:
            self._pieces.close()
        del self._pieces, self._requests, self._session

    def _run(self, names: list[str], feeds: list[Feed]) -> list[list[NDArray[Any]]]:
        return split_rows(names, self._session.run(names, _join(feeds)), feeds)


def _join(feeds: list[Feed]) -> Feed:
    """One batch; a single request is taken as it is, without a copy."""
    if len(feeds) == 1:
        return feeds[0]
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def _to_onnx(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype != np.object_:
        return array
    try:
        texts = [text.decode() for text in array.ravel()]
    except UnicodeDecodeError as error:
        raise ValueError(f"it takes UTF-8 strings only: {error}") from None
    return np.array(texts, dtype=np.object_).reshape(array.shape)


def _to_triton(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "OUS":
        return np.ascontiguousarray(array)
    return np.array([str(text).encode() for text in array.ravel()], dtype=np.object_).reshape(array.shape)


def _open(path: Path, config: Config, args: dict[str, str]) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeError(
            f"the package onnxruntime is missing ({error}): pip install onnxruntime (extra 'serve')"
        ) from None
    options = _session_options(onnxruntime, config)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=_providers(onnxruntime, args))
    except Exception as error:  # a corrupted file raises one of a dozen types
        raise RuntimeError(f"{path} can't be loaded: {first_line(error)}") from None
    return session


def _providers(onnxruntime: Any, args: dict[str, str]) -> list[Any]:
    if args["model_instance_kind"] != "GPU":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError(
            "the configuration asks for KIND_GPU, and this onnxruntime has no CUDA provider: install "
            "onnxruntime-gpu, or serve with --model-config-name=cpu"
        )
    return [("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"]}), "CPUExecutionProvider"]


def _session_options(onnxruntime: Any, config: Config) -> Any:
    options = onnxruntime.SessionOptions()
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0)) or _default_threads(config)
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 0))
    if parameters.get("execution_mode") == "1":
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.enable_cpu_mem_arena = parameters.get("enable_mem_arena", "1") == "1"
    options.enable_mem_pattern = parameters.get("enable_mem_pattern", "1") == "1"
    options.graph_optimization_level = _optimization(onnxruntime.GraphOptimizationLevel, config)
    # Threads that spin between two runs take the cores from whoever prepares the next request on the same machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", parameters.get("allow_spinning", "0"))
    return options


def _optimization(levels: Any, config: Config) -> Any:
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    return {-1: levels.ORT_ENABLE_BASIC, 1: levels.ORT_ENABLE_EXTENDED, 2: levels.ORT_DISABLE_ALL}.get(
        level, levels.ORT_ENABLE_ALL
    )


def _default_threads(config: Config) -> int:
    """Threads of one session: every instance is a process of its own, and together they should fill the cores once."""
    instances = sum(group.get("count", 1) for group in config.get("instance_group", [])) or 1
    cores = len(os.sched_getaffinity(0))
    return int(os.environ.get(THREADS_VARIABLE, 0)) or max(1, cores // instances)


def _check(session: Any, config: Config) -> None:
    """Raise RuntimeError where the configuration and the model disagree."""
    for kind, nodes in (("input", session.get_inputs()), ("output", session.get_outputs())):
        known = {node.name: node for node in nodes}
        for tensor in config[kind]:
            node = known.get(tensor["name"])
            if node is None:
                raise RuntimeError(f"configured {kind} '{tensor['name']}' is not in the model: it has {sorted(known)}")
            if _ONNX_TYPES.get(tensor["data_type"]) != node.type:
                raise RuntimeError(
                    f"{kind} '{node.name}' is {tensor['data_type']} in the configuration, {node.type} in the model"
                )
            check_dims(kind, tensor, node.shape, is_batching(config))
