"""Several servers as one: a study's chunks go to whichever has least to do, and past those that don't answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from groundglass.errors import ServerRefused, ServerUnreachable
from groundglass_client.buffers import Buffers
from groundglass_client.requests import Request, Tensors
from groundglass_client.transport import ServedScan, Transport

log = logging.getLogger(__name__)

REST_S: Final = 0.5
LONGEST_REST_S: Final = 8.0
"""A server that did not answer is left alone for so long, doubled with every further failure."""


@dataclass(slots=True, eq=False)
class _Replica:
    transport: Transport
    in_flight: int = 0
    rest_s: float = REST_S
    rests_until: float = 0.0


class ReplicaTransport:
    """A transport over replicas that serve the same models. Threads may share it.

    Any replica may answer any chunk, and any of them folds the verdict: the session sends what it holds.
    """

    def __init__(self, replicas: Sequence[Transport]) -> None:
        """``replicas`` are one transport a server, over the same buffers; at least one."""
        self._replicas = [_Replica(transport) for transport in replicas]
        self._lock = threading.Lock()

    def buffers(self) -> Buffers:
        """See ``Transport.buffers``."""
        return self._replicas[0].transport.buffers()

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """See ``Transport.send``: to the replica with the fewest requests in flight among those that answer."""
        with self._lock:
            replica = self._least_busy()
            replica.in_flight += 1
        try:
            future = replica.transport.send(request, timeout_s)
        except BaseException as error:
            self._settle(replica, error)
            raise
        future.add_done_callback(lambda done: self._settle(replica, None if done.cancelled() else done.exception()))
        return future

    def describe(self, timeout_s: float) -> ServedScan:
        """What the replicas that can be reached say of themselves; versions that differ are all named.

        Raises ServerUnreachable when none can be reached, ServerRefused when one serves something else, or another run
        makes a scan positive there.
        """
        served: list[ServedScan] = []
        absent: list[ServerUnreachable] = []
        for replica in self._replicas:
            try:
                served.append(replica.transport.describe(timeout_s))
            except ServerUnreachable as error:
                self._let_rest(replica)
                absent.append(error)
        if not served:
            raise absent[0]
        for reason in absent:
            log.warning("a replica is left out: %s", reason)
        runs = sorted({scan.positive_run for scan in served})
        if len(runs) > 1:
            raise ServerRefused(f"the replicas make a scan positive from {runs[0]} and from {runs[-1]} slices in a row")
        versions = sorted({scan.model_version for scan in served})
        return ServedScan(" and ".join(versions), runs[0])

    def _least_busy(self) -> _Replica:
        now_s = time.monotonic()
        awake = [replica for replica in self._replicas if replica.rests_until <= now_s]
        if not awake:
            return min(self._replicas, key=lambda replica: replica.rests_until)
        return min(awake, key=lambda replica: replica.in_flight)

    def _settle(self, replica: _Replica, error: BaseException | None) -> None:
        with self._lock:
            replica.in_flight -= 1
        if isinstance(error, ServerUnreachable):
            self._let_rest(replica)
        elif error is None:
            replica.rest_s = REST_S

    def _let_rest(self, replica: _Replica) -> None:
        with self._lock:
            now_s = time.monotonic()
            if replica.rests_until <= now_s:  # the failures of one outage count once
                replica.rests_until = now_s + replica.rest_s
                replica.rest_s = min(2 * replica.rest_s, LONGEST_REST_S)
