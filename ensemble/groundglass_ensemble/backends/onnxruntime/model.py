"""Stand-in for Triton's ONNX Runtime backend, for servers that have none: any ONNX model repository loads under it.

Triton takes this file only where ``libtriton_onnxruntime.so`` is missing. It reads the model's own configuration, and
holds nothing of the project that ships it. Settings carry the names of NVIDIA's backend:
https://github.com/triton-inference-server/onnxruntime_backend#model-config-options
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

Config = dict[str, Any]
Feed = dict[str, NDArray[Any]]

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
        self._batching = config.get("max_batch_size", 0) > 0
        self._inputs = {tensor["name"]: tensor for tensor in config["input"]}
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._session = _open(_model_file(args, config), config, args)
        _check(self._session, config)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request: those of one shape run as one batch, and each fails on its own."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[object, list[tuple[int, Feed]]] = defaultdict(list)
        for position, request in enumerate(requests):
            try:
                feed = self._feed(request)
            except UnicodeDecodeError as error:
                responses[position] = _refuse(f"ONNX Runtime takes UTF-8 strings only: {error}")
                continue
            groups[self._batch_key(position, feed)].append((position, feed))
        for members in groups.values():
            for (position, _), response in zip(members, self._run(requests, members), strict=True):
                responses[position] = response
        return responses

    def finalize(self) -> None:
        """Let go of the session and its memory."""
        del self._session

    def _feed(self, request: Any) -> Feed:
        feed = {}
        for name in self._inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:  # an optional input
                feed[name] = _to_onnx(tensor.as_numpy())
        return feed

    def _batch_key(self, position: int, feed: Feed) -> object:
        """Requests with equal keys can share a batch."""
        if not self._batching:
            return position
        return tuple((name, array.shape[1:]) for name, array in feed.items())

    def _run(self, requests: Sequence[Any], members: list[tuple[int, Feed]]) -> list[Any]:
        wanted = {name for position, _ in members for name in requests[position].requested_output_names()}
        names = [name for name in self._outputs if name in wanted]
        feeds = [feed for _, feed in members]
        try:
            parts = _split(names, self._session.run(names, _join(feeds)), feeds)
        except Exception as error:  # whatever the runtime raises belongs to the request, never to the server
            if len(members) == 1:
                return [_refuse(f"ONNX Runtime: {_first_line(error)}")]
            return [self._run(requests, [member])[0] for member in members]  # one bad request must not fail the others
        return [
            _answer(names, part, requests[position].requested_output_names())
            for (position, _), part in zip(members, parts, strict=True)
        ]


def _answer(names: list[str], arrays: list[NDArray[Any]], wanted: Sequence[str]) -> Any:
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, _to_triton(array)) for name, array in zip(names, arrays, strict=True) if name in wanted]
    )


def _refuse(reason: str) -> Any:
    return pb_utils.InferenceResponse([], pb_utils.TritonError(reason, pb_utils.TritonError.INVALID_ARG))


def _join(feeds: list[Feed]) -> Feed:
    """One batch; a single request is taken as it is, without a copy."""
    if len(feeds) == 1:
        return feeds[0]
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def _split(names: list[str], outputs: list[NDArray[Any]], feeds: list[Feed]) -> list[list[NDArray[Any]]]:
    """The rows of every request, from outputs of the batch that held them all."""
    if len(feeds) == 1:
        return [outputs]
    sizes = [len(next(iter(feed.values()))) for feed in feeds]
    for name, output in zip(names, outputs, strict=True):
        if len(output) != sum(sizes):
            raise ValueError(f"output {name} has {len(output)} rows for a batch of {sum(sizes)}")
    ends = np.cumsum(sizes)[:-1]
    return [list(part) for part in zip(*(np.split(output, ends) for output in outputs), strict=True)]


def _to_onnx(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype != np.object_:
        return array  # a view of the shared memory that Triton wrote: no copy
    return np.array([text.decode() for text in array.ravel()], dtype=np.object_).reshape(array.shape)


def _to_triton(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "OUS":
        return np.ascontiguousarray(array)
    return np.array([str(text).encode() for text in array.ravel()], dtype=np.object_).reshape(array.shape)


def _model_file(args: dict[str, str], config: Config) -> Path:
    name = config.get("default_model_filename") or "model.onnx"
    path = Path(args["model_repository"]) / args["model_version"] / name
    if path.is_dir():  # a model with external data, as NVIDIA's backend lays it out
        path /= "model.onnx"
    if not path.is_file():
        raise RuntimeError(f"model '{args['model_name']}' version {args['model_version']} has no file {path}")
    return path


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
        raise RuntimeError(f"{path} can't be loaded: {_first_line(error)}") from None
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
            _check_dims(kind, tensor, list(node.shape), config.get("max_batch_size", 0) > 0)


def _check_dims(kind: str, tensor: Config, shape: list[Any], batching: bool) -> None:
    """Compare fixed sizes; names and None in ``shape`` stand for free ones."""
    dims = [int(size) for size in tensor.get("reshape", {}).get("shape", tensor["dims"])]
    expected = [-1, *dims] if batching else dims
    fixed = [(a, b) for a, b in zip(expected, shape, strict=False) if a != -1 and isinstance(b, int)]
    if shape and (len(expected) != len(shape) or any(a != b for a, b in fixed)):
        raise RuntimeError(
            f"{kind} '{tensor['name']}' is {expected} in the configuration (batch first), {shape} in the model"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
