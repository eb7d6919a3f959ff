"""Several servers as one: a study's chunks go to whichever has least to do, and past those that don't answer."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final

from groundglass import contract
from groundglass.errors import ServerError, ServerRefused, ServerUnreachable, VersionGone
from groundglass_client.buffers import Buffers
from groundglass_client.requests import Request, Tensors
from groundglass_client.transport import ServedScan, Transport

log = logging.getLogger(__name__)

REST_S: Final = 0.5
LONGEST_REST_S: Final = 8.0
"""A server that did not answer is left alone for so long, doubled with every further failure."""


@dataclass(slots=True, eq=False)
class _Replica:
    """``live`` and ``pins`` are what the latest description says: nothing for a replica that could not be reached."""

    transport: Transport
    in_flight: int = 0
    rest_s: float = REST_S
    rests_until: float = 0.0
    live: str | None = None
    pins: frozenset[str] = frozenset()
    last_live: str | None = None


class ReplicaTransport:
    """A transport over replicas that serve the same models. Threads may share it.

    While versions are swapped replica by replica, a chunk goes only to those that answer it with the version that its
    study is on. Any replica folds the verdict: the session sends what it holds.
    """

    def __init__(self, replicas: Sequence[Transport]) -> None:
        """``replicas`` are one transport a server, over the same buffers; at least one."""
        self._replicas = [_Replica(transport) for transport in replicas]
        self._lock = threading.Lock()
        self._live: str | None = None
        self._departures: Counter[str] = Counter()
        self._left_out: tuple[str, ...] = ()

    def buffers(self) -> Buffers:
        """See ``Transport.buffers``."""
        return self._replicas[0].transport.buffers()

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """See ``Transport.send``: to the replica with the fewest requests in flight among those that answer."""
        with self._lock:
            replica = _least_busy(self._suitable(request))
            replica.in_flight += 1
        try:
            answer = replica.transport.send(request, timeout_s)
        except BaseException as error:
            answer = Future()
            answer.set_exception(error)
        future: Future[Tensors] = Future()
        answer.add_done_callback(partial(self._hand_on, replica, request, future))
        future.add_done_callback(lambda done: answer.cancel() if done.cancelled() else None)
        return future

    def describe(self, timeout_s: float) -> ServedScan:
        """What the replicas that can be reached say of themselves.

        The live version is that of most of them; of several, the one that more can be asked for by name, then the
        lower. A version can be asked for that any replica has.

        Raises ServerUnreachable when none can be reached, ServerRefused when one serves something else, or another run
        makes a scan positive there.
        """
        described: list[tuple[_Replica, ServedScan | None]] = []
        absent: list[ServerUnreachable] = []
        for replica in self._replicas:
            try:
                described.append((replica, replica.transport.describe(timeout_s)))
            except ServerUnreachable as error:
                self._let_rest(replica)
                described.append((replica, None))
                absent.append(error)
        served = [scan for _, scan in described if scan is not None]
        if not served:
            raise absent[0]
        for reason in absent:
            log.warning("a replica is left out: %s", reason)
        runs = sorted({scan.positive_run for scan in served})
        if len(runs) > 1:
            raise ServerRefused(f"the replicas make a scan positive from {runs[0]} and from {runs[-1]} slices in a row")
        return self._taken_in(described, _live_version(served), runs[0])

    def _taken_in(
        self, described: Sequence[tuple[_Replica, ServedScan | None]], live: str, positive_run: int
    ) -> ServedScan:
        with self._lock:
            for replica, scan in described:
                replica.live = None if scan is None else scan.model_version
                replica.pins = frozenset() if scan is None else scan.pinned
                if scan is not None and replica.last_live not in (None, scan.model_version):
                    self._departures[str(replica.last_live)] += 1
                replica.last_live = replica.live or replica.last_live
            self._live = live
            pinned = frozenset().union(*(replica.pins for replica in self._replicas))
            left_out = tuple(self._unfit(live, by_name=live in pinned))
            news, self._left_out = left_out != self._left_out, left_out
            departures = self._departures[live]
        for who in left_out if news else ():
            log.warning("%s takes no part in studies on version %s, which counts as live", who, live)
        return ServedScan(live, positive_run, pinned, departures)

    def _unfit(self, live: str, *, by_name: bool) -> Iterator[str]:
        for number, replica in enumerate(self._replicas, 1):
            if replica.live is not None and not (live in replica.pins if by_name else replica.live == live):
                yield f"replica {number} of {len(self._replicas)}, where version {replica.live} is live,"

    def _suitable(self, request: Request) -> list[_Replica]:
        """The replicas that answer a request with the version that it wants. Raises VersionGone when none does."""
        if request.model.name == contract.SCAN_AGGREGATOR.name or self._live is None:
            return self._replicas
        version = request.pin or request.live or self._live
        suitable = [
            replica
            for replica in self._replicas
            if (version in replica.pins if request.pin else version == replica.live)
        ]
        if not suitable:
            raise VersionGone(f"model {request.model.name}: no replica answers it with version {version} any longer")
        return suitable

    def _hand_on(self, replica: _Replica, request: Request, future: Future[Tensors], answer: Future[Tensors]) -> None:
        if answer.cancelled():
            self._settle(replica, None)
            future.cancel()
            return
        error = answer.exception()
        self._settle(replica, error)
        if isinstance(error, VersionGone):
            error = self._gone(replica, request, error)
        if not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(answer.result())

    def _gone(self, replica: _Replica, request: Request, error: VersionGone) -> ServerError:
        """Forget that the version can be asked for there; a failure that passes while another replica has it."""
        with self._lock:
            replica.pins -= {request.pin or ""}
            now_s = time.monotonic()
            if not any(request.pin in other.pins and other.rests_until <= now_s for other in self._replicas):
                return error
        elsewhere = ServerUnreachable(f"{error}; another replica still has it")
        elsewhere.__cause__ = error
        return elsewhere

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


def _live_version(served: Sequence[ServedScan]) -> str:
    live = Counter(scan.model_version for scan in served)
    pinned = Counter(version for scan in served for version in scan.pinned)
    return min(live, key=lambda version: (-live[version], -pinned[version], int(version)))


def _least_busy(replicas: Sequence[_Replica]) -> _Replica:
    now_s = time.monotonic()
    awake = [replica for replica in replicas if replica.rests_until <= now_s]
    if not awake:
        return min(replicas, key=lambda replica: replica.rests_until)
    return min(awake, key=lambda replica: replica.in_flight)
