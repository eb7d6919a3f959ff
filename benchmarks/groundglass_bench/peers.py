"""Other ways to send slices to a server, each as a work that returns slices a second.

All ask for what ours asks for. None of them decodes anything: the slices lie in memory.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from groundglass import contract
from groundglass_bench.figures import Work
from groundglass_bench.pytriton_peer import MODEL, pytriton_server
from groundglass_bench.sending import CHUNK_SLICES, REQUEST_TIMEOUT_S, slices_per_s
from groundglass_bench.serving import Server, Surroundings, near_free_server, newest_file
from groundglass_bench.settings import Peers
from groundglass_bench.studies import memory_study, pool_slices
from groundglass_client.chunk import Chunk
from groundglass_client.connection import connect
from groundglass_client.requests import Request, scan_request
from groundglass_client.settings import DEFAULT_SETTINGS

OpenPeer = Callable[[Peers, Surroundings, Server], AbstractContextManager[Work]]
"""Opens a peer against the near-free server, or one of its own; raises where it can't run."""


@contextmanager
def ours(load: Peers, around: Surroundings, server: Server, *, shared_memory: bool = True) -> Iterator[Work]:
    """Our client."""
    study, decode = memory_study(load.slices)
    with connect(server.grpc, shared_memory=shared_memory) as transport:
        yield partial(slices_per_s, study, transport, decode, masks=load.masks)


@contextmanager
def blocking(load: Peers, around: Surroundings, server: Server) -> Iterator[Work]:
    """tritonclient over gRPC: a request for each slice, the next after its answer."""
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(server.grpc) as client:
        yield lambda: _rate(triton, client, _requests(load, load.blocking_slices, 1))


@contextmanager
def one_message(load: Peers, around: Surroundings, server: Server) -> Iterator[Work]:
    """tritonclient over gRPC: all slices in one request, to a server whose batches were made large enough for it."""
    import tritonclient.grpc as triton

    with (
        near_free_server(around, max_batch=load.message_slices) as large,
        triton.InferenceServerClient(large.grpc) as client,
    ):
        yield lambda: _rate(triton, client, _requests(load, load.message_slices, load.message_slices))


@contextmanager
def http_json(load: Peers, around: Surroundings, server: Server) -> Iterator[Work]:
    """tritonclient over HTTP with tensors as JSON, a request for each slice: what some operators of SDKs do."""
    import tritonclient.http as triton

    with triton.InferenceServerClient(server.http, network_timeout=REQUEST_TIMEOUT_S) as client:
        requests = partial(_requests, load, load.json_slices, 1)
        yield lambda: _rate(triton, client, requests(), binary_data=False)


@contextmanager
def pytriton_function(load: Peers, around: Surroundings, server: Server) -> Iterator[Work]:
    """A function bound by nvidia-pytriton, which gets the same chunks, as many in flight, from tritonclient."""
    import tritonclient.grpc as triton

    with (
        pytriton_server(newest_file(around.repository, contract.PREPROCESS.name, "model.onnx")) as address,
        triton.InferenceServerClient(address) as client,
    ):

        def rate() -> float:
            model = replace(contract.CT_SCAN, name=MODEL)
            requests = [replace(request, model=model) for request in _requests(load, load.slices, CHUNK_SLICES)]
            return _rate(triton, client, requests, in_flight=DEFAULT_SETTINGS.window)

        yield rate


PEERS: dict[str, OpenPeer] = {
    "ours": ours,
    "ours_grpc": partial(ours, shared_memory=False),
    "blocking": blocking,
    "one_message": one_message,
    "http_json": http_json,
    "pytriton": pytriton_function,
}
"""By the name in the report; ours first."""


def _requests(load: Peers, slices: int, rows: int) -> list[Request]:
    """A study of ``slices`` as requests of ``rows``, under a new key."""
    key = secrets.token_hex(16)
    pool = pool_slices(min(rows, slices))
    chunks = (np.arange(start, min(start + rows, slices), dtype=np.int32) for start in range(0, slices, rows))
    return [scan_request(Chunk(indices, pool[: len(indices)]), key, slices, masks=load.masks) for indices in chunks]


def _rate(api: Any, client: Any, requests: list[Request], *, in_flight: int = 1, **form: bool) -> float:
    """Slices a second of ``requests``. ``api`` is a module of tritonclient, ``form`` what its HTTP tensors take."""

    def send(request: Request) -> None:
        inputs = []
        for spec in request.model.inputs:
            tensor = request.tensors[spec.name]
            inputs.append(api.InferInput(spec.name, list(tensor.shape), spec.datatype))
            inputs[-1].set_data_from_numpy(tensor, **form)
        outputs = [api.InferRequestedOutput(spec.name, **form) for spec in request.outputs]
        answer = client.infer(request.model.name, inputs, outputs=outputs)
        for spec in request.outputs:
            answer.as_numpy(spec.name)

    slices = sum(len(request.tensors[contract.SLICE_INDEX.name]) for request in requests)
    started = time.perf_counter()
    if in_flight == 1:  # tritonclient's HTTP client belongs to the thread that made it
        for request in requests:
            send(request)
    else:
        with ThreadPoolExecutor(in_flight) as senders:
            for done in [senders.submit(send, request) for request in requests]:
                done.result()
    return slices / (time.perf_counter() - started)
