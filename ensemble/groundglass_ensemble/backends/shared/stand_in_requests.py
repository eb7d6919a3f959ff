"""What every stand-in does with requests: those of one shape run as one batch, and each fails on its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

if TYPE_CHECKING:  # at run time the files of a backend's folder lie beside one another, in no package
    from groundglass_ensemble.backends.shared.stand_in_batch import Feed
    from groundglass_ensemble.backends.shared.stand_in_config import Config, first_line, is_batching
else:
    from stand_in_batch import Feed
    from stand_in_config import first_line, is_batching

Run = Callable[[list[str], list[Feed]], list[list[NDArray[Any]]]]
"""From the outputs wanted and the inputs of every request of a batch to the outputs of every request."""
Convert = Callable[[NDArray[Any]], NDArray[Any]]


class Requests:
    """Answers the requests of one model with ``run``; ``runtime`` is the name that its errors are told under.

    ``take`` makes an array from Triton one of the runtime, ``give`` does the reverse.
    """

    def __init__(
        self,
        config: Config,
        runtime: str,
        run: Run,
        *,
        take: Convert = np.asarray,
        give: Convert = np.ascontiguousarray,
    ) -> None:
        self._batching = is_batching(config)
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._runtime = runtime
        self._run = run
        self._take = take
        self._give = give

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """A response to every request, in their order."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[object, list[tuple[int, Feed]]] = defaultdict(list)
        for position, request in enumerate(requests):
            try:
                feed = self._feed(request)
            except ValueError as error:
                responses[position] = self._refuse(error)
                continue
            groups[self._batch_key(position, feed)].append((position, feed))
        for members in groups.values():
            for (position, _), response in zip(members, self._answer_batch(requests, members), strict=True):
                responses[position] = response
        return responses

    def _feed(self, request: Any) -> Feed:
        feed = {}
        for name in self._inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:  # an optional input
                feed[name] = self._take(tensor.as_numpy())  # a view of the shared memory that Triton wrote: no copy
        return feed

    def _batch_key(self, position: int, feed: Feed) -> object:
        """Requests with equal keys can share a batch."""
        if not self._batching:
            return position
        return tuple((name, array.shape[1:]) for name, array in feed.items())

    def _answer_batch(self, requests: Sequence[Any], members: list[tuple[int, Feed]]) -> list[Any]:
        wanted = {name for position, _ in members for name in requests[position].requested_output_names()}
        names = [name for name in self._outputs if name in wanted]
        try:
            parts = self._run(names, [feed for _, feed in members])
        except Exception as error:  # whatever the runtime raises belongs to the request, never to the server
            if len(members) == 1:
                return [self._refuse(error)]
            # One bad request must not fail the others.
            return [self._answer_batch(requests, [member])[0] for member in members]
        return [
            self._respond(names, part, requests[position].requested_output_names())
            for (position, _), part in zip(members, parts, strict=True)
        ]

    def _respond(self, names: list[str], arrays: list[NDArray[Any]], wanted: Sequence[str]) -> Any:
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(name, self._give(array))
                for name, array in zip(names, arrays, strict=True)
                if name in wanted
            ]
        )

    def _refuse(self, error: Exception) -> Any:
        reason = f"{self._runtime}: {first_line(error)}"
        return pb_utils.InferenceResponse([], pb_utils.TritonError(reason, pb_utils.TritonError.INVALID_ARG))
