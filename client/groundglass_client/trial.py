"""Trying one version by name: its answers to a few slices, and its latency beside the live version's."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groundglass import contract
from groundglass_client.chunk import Chunk
from groundglass_client.requests import ChunkAnswer, read_scan_answer, scan_request
from groundglass_client.transport import Transport

TIMEOUT_S: Final = 120.0
DEFAULT_ROUNDS: Final = 9
"""Pairs of requests, the live version's and the candidate's in turns, after one of each that is not counted."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """Medians over the rounds, in milliseconds a request, and the median of the rounds' ratios: on a shared machine
    both of a round saw the same load.
    """

    live_ms: float
    candidate_ms: float
    ratio: float


def ask_version(transport: Transport, version: int, hu: NDArray[np.int16]) -> ChunkAnswer:
    """What ``version`` says of slices int16 (n, rows, columns), HU, masks included. No study is kept on the server.

    Raises VersionGone, ServerUnreachable, ServerRefused.
    """
    count = len(hu)
    chunk = Chunk(np.arange(count, dtype=np.int32), np.ascontiguousarray(hu))
    request = scan_request(chunk, contract.PROBE_STUDY.decode(), count, masks=True)
    request = replace(request, model=contract.pinned(str(version)))
    return read_scan_answer(chunk, count, transport.send(request, TIMEOUT_S).result())


def compare_latency(
    transport: Transport, live: int, candidate: int, hu: NDArray[np.int16], rounds: int = DEFAULT_ROUNDS
) -> Latencies:
    """Time requests of slices int16 (n, rows, columns), HU, through both versions; raises as :func:`ask_version`."""
    timed = []
    for round_ in range(rounds + 1):
        order = (live, candidate) if round_ % 2 else (candidate, live)
        seconds = {version: _seconds(transport, version, hu) for version in order}
        timed.append((seconds[live] * 1e3, seconds[candidate] * 1e3))
    counted = timed[1:]
    return Latencies(
        live_ms=statistics.median(mine for mine, _ in counted),
        candidate_ms=statistics.median(other for _, other in counted),
        ratio=statistics.median(other / mine for mine, other in counted),
    )


def _seconds(transport: Transport, version: int, hu: NDArray[np.int16]) -> float:
    began = time.perf_counter()
    ask_version(transport, version, hu)
    return time.perf_counter() - began
