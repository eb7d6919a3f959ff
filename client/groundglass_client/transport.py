"""Transport: how requests reach a Triton server and how its refusals become our errors."""

from __future__ import annotations

import re
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from groundglass import contract
from groundglass.contract import ModelSpec
from groundglass.errors import ServerError, ServerRefused, ServerUnreachable, SettingError
from groundglass_client.requests import Request, Tensors

CHANNEL_ARGUMENTS: Final = [
    # tritonclient drops its own defaults when it is given arguments: a message of a chunk is larger than gRPC's 4 MiB.
    ("grpc.max_send_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
    ("grpc.max_receive_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
    # gRPC waits up to 120 s before it dials a lost server again; ours is back within seconds of a restart.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]

PASSING: Final = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "ABORTED"})
"""gRPC codes of a server that is gone, restarting or overloaded: the same request may be answered later."""

PASSING_INTERNAL: Final = re.compile(r"stub process .* is not healthy|failed to .*shared memory", re.IGNORECASE)
"""A Python backend whose process died is started again by Triton, which reports INTERNAL meanwhile."""


@dataclass(frozen=True, slots=True)
class ServedScan:
    """What a server says of itself: the version of ``unet`` that answers, and the run that makes a scan positive."""

    model_version: str
    positive_run: int


class Transport(Protocol):
    """The seam between a session and a server."""

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """Start one inference; cancelling the future cancels it on the wire.

        The future raises ServerUnreachable when the same request may succeed later, and ServerRefused when it won't.
        """

    def describe(self, timeout_s: float) -> ServedScan:
        """Check that the server speaks the contract. Raises ServerUnreachable, ServerRefused."""


class GrpcTransport:
    """A Triton server over one gRPC channel. Threads may share it. Close it, or use it as a context manager."""

    def __init__(self, server: str) -> None:
        """Connect lazily to ``server``, HOST:PORT. Raises SettingError when it is no such thing."""
        if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:/\s]+):\d{1,5}", server):
            raise SettingError(
                f"server {server!r}: expected HOST:PORT of Triton's gRPC endpoint, such as localhost:8001"
            )
        self._server = server
        self._client = triton.InferenceServerClient(server, channel_args=CHANNEL_ARGUMENTS)

    def __enter__(self) -> GrpcTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; what is still in flight is cancelled."""
        self._client.close()

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """See :meth:`Transport.send`."""
        future: Future[Tensors] = Future()
        try:
            call = self._client.async_infer(
                request.model.name,
                _inputs(request),
                partial(self._settle, future, request),
                outputs=[triton.InferRequestedOutput(spec.name) for spec in request.outputs],
                client_timeout=timeout_s,
            )
        except InferenceServerException as error:
            raise self._translated(error, request.model.name) from error
        future.add_done_callback(lambda done: call.cancel() if done.cancelled() else None)
        return future

    def describe(self, timeout_s: float) -> ServedScan:
        """See :meth:`Transport.describe`."""
        for spec in contract.MODELS:
            metadata = self._ask(self._client.get_model_metadata, spec.name, timeout_s)
            self._check(spec, metadata)
            if spec is contract.UNET:
                version = max(metadata.versions, key=int)
        config = self._ask(self._client.get_model_config, contract.SCAN_AGGREGATOR.name, timeout_s).config
        positive_run = config.parameters[contract.RUN_PARAMETER].string_value
        if not positive_run.isdecimal():
            raise ServerRefused(
                f"model {config.name} at {self._server}: parameter {contract.RUN_PARAMETER} is {positive_run!r}, "
                "expected a number of slices"
            )
        return ServedScan(version, int(positive_run))

    def _ask(self, question: Any, model: str, timeout_s: float) -> Any:
        try:
            return question(model, client_timeout=timeout_s)
        except InferenceServerException as error:
            raise self._translated(error, model) from error

    def _check(self, spec: ModelSpec, metadata: Any) -> None:
        served = {(tensor.name, tensor.datatype) for tensor in (*metadata.inputs, *metadata.outputs)}
        missing = {(tensor.name, tensor.datatype) for tensor in (*spec.inputs, *spec.outputs)} - served
        if missing:
            names = ", ".join(f"{name} ({datatype})" for name, datatype in sorted(missing))
            raise ServerRefused(f"model {spec.name} at {self._server} lacks {names}: it serves another tensor contract")

    def _settle(
        self, future: Future[Tensors], request: Request, result: Any, error: InferenceServerException | None
    ) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if error is not None:
            translated = self._translated(error, request.model.name)
            translated.__cause__ = error
            future.set_exception(translated)
            return
        try:
            future.set_result({spec.name: result.as_numpy(spec.name) for spec in request.outputs})
        except Exception as misread:  # a garbled answer must reach the waiting session, not gRPC's callback thread
            future.set_exception(misread)

    def _translated(self, error: InferenceServerException, model: str) -> ServerError:
        code = str(error.status()).removeprefix("StatusCode.")
        words = f"model {model} at {self._server}: {error.message()} ({code})"
        if code in PASSING or (code == "INTERNAL" and PASSING_INTERNAL.search(error.message() or "")):
            return ServerUnreachable(words)
        return ServerRefused(words)


def _inputs(request: Request) -> list[triton.InferInput]:
    inputs = []
    for spec in request.model.inputs:
        tensor = request.tensors[spec.name]
        wire = triton.InferInput(spec.name, list(tensor.shape), spec.datatype)
        wire.set_data_from_numpy(tensor)
        inputs.append(wire)
    return inputs
