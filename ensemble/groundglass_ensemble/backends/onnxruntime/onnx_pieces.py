"""Requests cut into pieces that run side by side, each on one thread, in a queue that never runs dry.

A network of large images is slower in batches on a CPU: the activations of one row fill its caches. And the threads
of one run wait for one another after every operator. So a request is cut into pieces of a few rows, every thread takes
the next piece of whatever request is waiting, and a request is answered when its last piece is done, while the pieces
of the next are running. NVIDIA's backend ignores the two parameters that turn this on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

if TYPE_CHECKING:  # at run time the files of a backend's folder lie beside one another, in no package
    from groundglass_ensemble.backends.shared.stand_in_batch import Feed
    from groundglass_ensemble.backends.shared.stand_in_config import Config, first_line, is_batching
else:
    from stand_in_config import first_line, is_batching

ROWS_PARAMETER = "rows_per_run"
RUNS_PARAMETER = "concurrent_runs"
"""Parameters of a model's configuration: rows of one piece, and pieces that run at once (0: one a core)."""


def pieces_wanted(config: Config) -> tuple[int, int] | None:
    """Rows of a piece, and pieces at once; None where the configuration asks for none.

    Raises RuntimeError for values that can't be, and for a model that can't be cut.
    """
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    if not parameters.keys() & {ROWS_PARAMETER, RUNS_PARAMETER}:
        return None
    rows, runs = (_number(parameters, name, least) for name, least in ((ROWS_PARAMETER, 1), (RUNS_PARAMETER, 0)))
    if not is_batching(config) or any(_is_free(tensor) for tensor in config["output"]):
        raise RuntimeError(
            f"parameter {ROWS_PARAMETER} needs batching, and outputs of numbers whose rows have fixed dims"
        )
    return rows, runs or len(os.sched_getaffinity(0))


def _number(parameters: dict[str, str], name: str, least: int) -> int:
    text = parameters.get(name, "")
    if not text.isdecimal() or int(text) < least:
        raise RuntimeError(f"parameter {name} is {text!r}: a number from {least} on was expected")
    return int(text)


def _is_free(tensor: Config) -> bool:
    return tensor["data_type"] == "TYPE_STRING" or -1 in _dims(tensor)


def _dims(tensor: Config) -> tuple[int, ...]:
    """The shape of a row as the model knows it."""
    return tuple(int(size) for size in tensor.get("reshape", {}).get("shape", tensor["dims"]))


class _Open:
    """A request under way. It holds on to the request: the inputs are views of its shared memory."""

    def __init__(self, request: Any, feed: Feed, outputs: dict[str, NDArray[Any]], pieces: int) -> None:
        self.sender = request.get_response_sender()
        self.request = request
        self.feed = feed
        self.outputs = outputs
        self.left = pieces
        self.error: Exception | None = None


class Pieces:
    """Answers the requests of one model out of order of their batches."""

    def __init__(self, session: Any, config: Config, rows_per_run: int, concurrent_runs: int) -> None:
        self._session = session
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = {
            tensor["name"]: (_dims(tensor), pb_utils.triton_string_to_numpy(tensor["data_type"]))
            for tensor in config["output"]
        }
        self._rows_per_run = rows_per_run
        self._pool = ThreadPoolExecutor(concurrent_runs, "piece") if concurrent_runs > 1 else None
        self._changed = threading.Condition()
        self._waiting = 0

    def answer(self, requests: Sequence[Any]) -> list[None]:
        """Take requests in, and return as soon as a thread is about to be free: each is answered when it is done."""
        for request in requests:
            self._take_in(request)
        with self._changed:
            self._changed.wait_for(lambda: self._waiting == 0)
        return [None] * len(requests)

    def close(self) -> None:
        """Wait for what is under way."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _take_in(self, request: Any) -> None:
        feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
        wanted = request.requested_output_names()
        rows = len(next(iter(feed.values())))
        outputs = {
            name: np.empty((rows, *dims), dtype=kind) for name, (dims, kind) in self._outputs.items() if name in wanted
        }
        pieces = [slice(start, start + self._rows_per_run) for start in range(0, rows, self._rows_per_run)]
        opened = _Open(request, feed, outputs, len(pieces))
        with self._changed:
            self._waiting += len(pieces)
        for piece in pieces:
            if self._pool is None:
                self._run(opened, piece)
            else:
                self._pool.submit(self._run, opened, piece)

    def _run(self, opened: _Open, piece: slice) -> None:
        with self._changed:
            self._waiting -= 1
            self._changed.notify()
        try:
            if opened.error is None:
                self._fill(opened, piece)
        except Exception as error:  # whatever the runtime raises belongs to the request, never to the server
            opened.error = error
        with self._changed:
            opened.left -= 1
            done = opened.left == 0
        if done:
            opened.sender.send(_response(opened), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _fill(self, opened: _Open, piece: slice) -> None:
        binding = self._session.io_binding()
        for name, array in opened.feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array[piece]))
        for name, array in opened.outputs.items():
            part = array[piece]
            binding.bind_output(name, "cpu", 0, part.dtype, part.shape, part.ctypes.data)
        self._session.run_with_iobinding(binding)


def _response(opened: _Open) -> Any:
    if opened.error is not None:
        reason = f"ONNX Runtime: {first_line(opened.error)}"
        return pb_utils.InferenceResponse([], pb_utils.TritonError(reason, pb_utils.TritonError.INVALID_ARG))
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in opened.outputs.items()])
