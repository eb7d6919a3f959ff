"""Transport: how requests reach a Triton server and how its refusals become our errors."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from groundglass import contract
from groundglass.contract import ModelSpec, TensorSpec
from groundglass.errors import ServerError, ServerRefused, ServerUnreachable, SettingError, VersionGone
from groundglass.tls import TlsSettings, tls_failure
from groundglass_client.buffers import MASK_BYTES, PREFIX, SHARED_MEMORY, Buffer, Buffers
from groundglass_client.requests import Request, Tensors

log = logging.getLogger(__name__)

CHANNEL_ARGUMENTS: Final = [
    # tritonclient drops its own defaults when it is given arguments: a message of a chunk is larger than gRPC's 4 MiB.
    ("grpc.max_send_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
    ("grpc.max_receive_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
    # gRPC waits up to 120 s before it dials a lost server again; ours is back within seconds of a restart.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Channels to one address would share a connection otherwise.
    ("grpc.use_local_subchannel_pool", 1),
]

PASSING: Final = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "ABORTED"})
"""gRPC codes of a server that is gone, restarting or overloaded: the same request may be answered later."""

PASSING_INTERNAL: Final = re.compile(r"stub process .* is not healthy|failed to .*shared memory", re.IGNORECASE)
"""A Python backend whose process died is started again by Triton, which reports INTERNAL meanwhile."""

STOPPING: Final = re.compile(r"has no available versions", re.IGNORECASE)
"""NOT_FOUND with these words is a model that was served a moment ago: its server is stopping (2.51, under a rolling
restart, November 2026). Behind a balancer, which hears of it later, the next request reaches another one."""

NO_REPLICA: Final = "Received http2 header with status: 503"
"""gRPC's words for a balancer's answer in HTTP: it has no server to send to, or none that has room."""

UNKNOWN_REGION: Final = re.compile(r"unable to find shared memory region", re.IGNORECASE)
"""A server that restarted knows none of our regions: the same request goes through as bytes."""

KNOWN_REGION: Final = "already in manager"
"""Triton's words for a region that is registered already."""

REGION_TIMEOUT_S: Final = 5.0
"""Longest wait for a server to register a region, or to let go of it."""


@dataclass(frozen=True, slots=True)
class ServedScan:
    """What a server says of itself: the version of ``unet`` that answers, and the run that makes a scan positive.

    ``pinned`` are the versions that can be asked for by name: ``contract.pinned`` gives the model to send to.
    ``departures`` counts how often a server where ``model_version`` was live was found to have left it: slices that
    were sent to whatever is live between two answers may be of two versions when it rose, though the version is the
    same in both.
    """

    model_version: str
    positive_run: int
    pinned: frozenset[str] = frozenset()
    departures: int = 0


class Transport(Protocol):
    """The seam between a session and a server."""

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """Start one inference; cancelling the future cancels it on the wire.

        The future raises ServerUnreachable when the same request may succeed later, and ServerRefused when it won't:
        VersionGone when that is because the version it asks for is not served, or no longer.
        """

    def describe(self, timeout_s: float) -> ServedScan:
        """Check that the server speaks the contract. Raises ServerUnreachable, ServerRefused."""

    def buffers(self) -> Buffers:
        """Where the memory of requests comes from: what lies there may reach the server without a copy."""


class GrpcTransport:
    """A Triton server over gRPC. Threads may share it. Close it, or use it as a context manager."""

    def __init__(
        self, server: str, buffers: Buffers | None = None, *, channels: int = 1, tls: TlsSettings | None = None
    ) -> None:
        """Connect lazily to ``server``, HOST:PORT. Raises SettingError when it is no such thing.

        ``buffers`` in shared memory are named to the server in place of sending their content, for as long as it takes
        them: it must run on this host, see the same ``/dev/shm``, and allow it. Whoever made them closes them, after
        this. Requests take turns over ``channels`` connections, which are plain without ``tls``.
        """
        if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:/\s]+):\d{1,5}", server):
            raise SettingError(
                f"server {server!r}: expected HOST:PORT of Triton's gRPC endpoint, such as localhost:8001"
            )
        self._server = server
        self._tls = tls
        options = {} if tls is None else tls.client_options()
        self._clients = [
            triton.InferenceServerClient(server, channel_args=CHANNEL_ARGUMENTS, **options) for _ in range(channels)
        ]
        self._client = self._clients[0]
        self._turn = itertools.cycle(self._clients)
        self._buffers = buffers or Buffers(shared=False)
        self._regions = _Regions(self._client, server)

    def __enter__(self) -> GrpcTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channels; what is still in flight is cancelled."""
        for client in self._clients:
            client.close()

    def buffers(self) -> Buffers:
        """See :meth:`Transport.buffers`."""
        return self._buffers

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """See :meth:`Transport.send`."""
        future: Future[Tensors] = Future()
        if request.buffer is not None and not self._regions.holds(request.buffer):
            request = replace(request, buffer=None)
        try:
            call = next(self._turn).async_infer(
                request.model.name,
                _inputs(request),
                partial(self._settle, future, request),
                outputs=_outputs(request),
                headers=None if request.traceparent is None else {"traceparent": request.traceparent},
                client_timeout=timeout_s,
            )
        except InferenceServerException as error:
            raise self._translated(error, request.model.name) from error
        future.add_done_callback(lambda done: call.cancel() if done.cancelled() else None)
        return future

    def describe(self, timeout_s: float) -> ServedScan:
        """See :meth:`Transport.describe`."""
        # Before unet's versions: a live version is among them, unless it was taken away in between.
        live = self._live_step(timeout_s)
        for spec in contract.MODELS:
            metadata = self._ask(self._client.get_model_metadata, spec.name, timeout_s)
            self._check(spec, metadata)
            if spec is contract.UNET:
                loaded = list(metadata.versions)
        return ServedScan(
            max(loaded, key=int) if live == contract.NEWEST else str(live),
            self._positive_run(timeout_s),
            frozenset(version for version in loaded if self._ready(contract.pinned(version), timeout_s)),
        )

    def _live_step(self, timeout_s: float) -> int:
        """The version of unet in ``ct_scan``; ``contract.NEWEST`` for the newest that is loaded."""
        config = self._ask(self._client.get_model_config, contract.CT_SCAN.name, timeout_s).config
        for step in config.ensemble_scheduling.step:
            if step.model_name == contract.UNET.name:
                return int(step.model_version)
        raise ServerRefused(
            f"model {contract.CT_SCAN.name} at {self._server} has no step {contract.UNET.name}: it is another ensemble"
        )

    def _positive_run(self, timeout_s: float) -> int:
        config = self._ask(self._client.get_model_config, contract.SCAN_AGGREGATOR.name, timeout_s).config
        positive_run = config.parameters[contract.RUN_PARAMETER].string_value
        if not positive_run.isdecimal():
            raise ServerRefused(
                f"model {config.name} at {self._server}: parameter {contract.RUN_PARAMETER} is {positive_run!r}, "
                "expected a number of slices"
            )
        return int(positive_run)

    def _ready(self, spec: ModelSpec, timeout_s: float) -> bool:
        return bool(self._ask(self._client.is_model_ready, spec.name, timeout_s))

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
            future.set_result({spec.name: _read(result, request, spec) for spec in request.outputs})
        except Exception as misread:  # a garbled answer must reach the waiting session, not gRPC's callback thread
            future.set_exception(misread)

    def _translated(self, error: InferenceServerException, model: str) -> ServerError:
        code = str(error.status()).removeprefix("StatusCode.")
        said = error.message() or ""
        if NO_REPLICA in said:
            said = "no server behind it can take the request"
        words = f"model {model} at {self._server}: {said} ({code})"
        if code in PASSING or UNKNOWN_REGION.search(said) or (code == "INTERNAL" and PASSING_INTERNAL.search(said)):
            self._regions.doubt()  # it may have restarted
            return tls_failure(self._server, said, self._tls) or ServerUnreachable(words)
        # An ensemble that is loaded anew keeps answering (2.51, measured under load, November 2026): this one is gone.
        if code == "NOT_FOUND" and model.startswith(contract.PIN_PREFIX):
            return VersionGone(words)
        if code == "NOT_FOUND" and STOPPING.search(said):
            return ServerUnreachable(words)
        return ServerRefused(words)


class _Regions:
    """What one server knows of our shared memory."""

    def __init__(self, client: triton.InferenceServerClient, server: str) -> None:
        self._client = client
        self._server = server
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._taken = True
        self._tidied = False

    def doubt(self) -> None:
        """Register every region again before its next use."""
        with self._lock:
            self._known.clear()

    def holds(self, buffer: Buffer) -> bool:
        """Whether the server reads ``buffer`` itself; registers its region first if it is new.

        Raises ServerUnreachable when that can't be told now.
        """
        region = buffer.region
        if region is None or not self._taken:
            return False
        if region.name in self._known:
            return True
        try:
            self._client.register_system_shared_memory(
                region.name, region.key, region.size, client_timeout=REGION_TIMEOUT_S
            )
        except InferenceServerException as error:
            code = str(error.status()).removeprefix("StatusCode.")
            if KNOWN_REGION not in (error.message() or ""):
                return self._refused(error, code)
        region.holders[id(self)] = self._release
        with self._lock:
            first = not self._tidied
            self._tidied = True
            self._known.add(region.name)
        if first:
            self._forget_abandoned()
        return True

    def _forget_abandoned(self) -> None:
        """Have the server let go of what clients left that were killed: their files are gone.

        This server sees the ``/dev/shm`` that we see, or it would not have taken our region.
        """
        try:
            status = self._client.get_system_shared_memory_status(client_timeout=REGION_TIMEOUT_S)
        except InferenceServerException:
            return
        for name in status.regions:
            if name.startswith(PREFIX) and not (SHARED_MEMORY / name).exists():
                self._release(name)

    def _refused(self, error: InferenceServerException, code: str) -> bool:
        if code in PASSING:
            raise ServerUnreachable(f"{self._server}: {error.message()} ({code})") from error
        with self._lock:
            told, self._taken = not self._taken, False
        if told:
            return False
        log.log(
            logging.WARNING if re.match(r"localhost:|127\.|\[::1\]", self._server) else logging.INFO,
            "%s does not read this process's shared memory, so slices travel as bytes: %s (servers from 26.05 on need "
            "--allow-client-shm=true, and a container this host's or the client's IPC namespace)",
            *(self._server, error.message()),
        )
        return False

    def _release(self, name: str) -> bool:
        """Whether the server has let go of a region: it refuses while a request in progress uses it."""
        with self._lock:
            self._known.discard(name)
        try:
            self._client.unregister_system_shared_memory(name, client_timeout=REGION_TIMEOUT_S)
        except InferenceServerException as error:
            return "in use" not in (error.message() or "")  # a server that is gone holds nothing
        return True


def _inputs(request: Request) -> list[triton.InferInput]:
    inputs = []
    for spec in request.model.inputs:
        tensor = request.tensors[spec.name]
        wire = triton.InferInput(spec.name, list(tensor.shape), spec.datatype)
        if spec is contract.HU and request.buffer is not None and request.buffer.region is not None:
            wire.set_shared_memory(request.buffer.region.name, tensor.nbytes)
        else:
            wire.set_data_from_numpy(tensor)
        inputs.append(wire)
    return inputs


def _outputs(request: Request) -> list[triton.InferRequestedOutput]:
    outputs = []
    for spec in request.outputs:
        wire = triton.InferRequestedOutput(spec.name)
        if spec is contract.MASK and request.buffer is not None and request.buffer.region is not None:
            rows = len(request.tensors[contract.HU.name])
            wire.set_shared_memory(request.buffer.region.name, rows * MASK_BYTES, request.buffer.mask_offset(rows))
        outputs.append(wire)
    return outputs


def _read(result: triton.InferResult, request: Request, spec: TensorSpec) -> NDArray[Any]:
    if spec is not contract.MASK or request.buffer is None:
        tensor: NDArray[Any] = result.as_numpy(spec.name)
        return tensor
    shape = result.get_output(spec.name).shape
    masks = request.buffer.masks(len(request.tensors[contract.HU.name]))
    # A copy: the buffer is another chunk's soon. A mask of another shape did not go there: its shape is refused later.
    return masks.copy() if tuple(shape) == masks.shape else np.empty(tuple(shape), dtype=np.uint8)
