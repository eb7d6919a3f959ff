"""Sources of studies: the closed loop's user, which waits for its report, and the open loop's arrivals, which don't.

They run as greenlets: the session's worker threads are greenlets too once locust has patched the standard library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from gevent import Greenlet, GreenletExit
from gevent.pool import Pool

from groundglass.errors import GroundglassError
from groundglass.tls import TlsSettings
from groundglass_bench.load.arrivals import Arrivals
from groundglass_bench.load.contact import open_transport
from groundglass_bench.load.samples import Clock, Sample
from groundglass_bench.load.settings import Load
from groundglass_bench.load.studies import Phantoms, check_verdict
from groundglass_client.session import SessionSettings, analyse

CUT_OFF: Final = "cut off: the load ended before the report came"
PAUSE_AFTER_FAILURE_S: Final = 1.0
"""A closed loop's user waits so long after a failure: a server that refuses at once would be stormed otherwise."""

_CUT_OFF_WITHIN_S: Final = 10.0
"""Longest wait for sessions that are cut off: they end at once, unless the machine is very busy."""

Report = Callable[[Sample], None]


class Sender:
    """One connection to a server, over which whole studies go."""

    def __init__(
        self,
        server: str,
        load: Load,
        phantoms: Phantoms,
        report: Report,
        rng: np.random.Generator,
        *,
        tls: TlsSettings | None = None,
    ) -> None:
        """``report`` is given a sample of every study, ``rng`` draws the studies' sizes."""
        self._opened = open_transport(server, shared_memory=load.shared_memory, tls=tls)
        self._transport = self._opened.__enter__()
        self._load = load
        self._phantoms = phantoms
        self._report = report
        self._rng = rng
        self._clock = Clock()
        self._settings = SessionSettings(
            chunk_bytes=load.chunk_bytes,
            window=load.window,
            request_timeout_s=load.request_timeout_s,
            connect_timeout_s=load.recovery_s,
            recovery_s=load.recovery_s,
            deadline_s=load.study_timeout_s,
            masks=load.masks,
        )

    def close(self) -> None:
        """Close the connection."""
        self._opened.__exit__(None, None, None)

    def now_s(self) -> float:
        """Seconds since the epoch."""
        return self._clock.now_s()

    def draw_slices(self) -> int:
        """The size of the next study."""
        first, last = self._load.slice_range
        return int(self._rng.integers(first, last, endpoint=True))

    def refuse(self, slices: int, intended_s: float) -> None:
        """Report a study that is not sent, since too many are in flight."""
        reason = f"refused by the generator: {self._load.max_in_flight} studies in flight"
        now_s = self.now_s()
        self._report(Sample(intended_s, now_s, now_s - intended_s, slices, reason, sent=False))

    def send(self, slices: int, intended_s: float) -> bool:
        """Send a study that was to start at ``intended_s``, check its verdict, report. Returns whether it was right."""
        started_s = self.now_s()
        answers: list[tuple[float, int]] = []
        error: str | None = None
        try:
            self._analyse(slices, lambda count: answers.append((self.now_s(), count)))
        except (Exception, GreenletExit) as failure:  # one failed study must not end the load
            error = fate(failure)
        self._report(Sample(intended_s, started_s, self.now_s() - intended_s, slices, error, tuple(answers)))
        return error is None

    def _analyse(self, slices: int, on_slices: Callable[[int], None]) -> None:
        made = self._phantoms.study(slices)
        analysis = analyse(
            made.study, self._transport, lambda source: self._phantoms.hu(made, source), self._settings, on_slices
        )
        check_verdict(made, analysis.report, self._load.expected_run)


class Source(Protocol):
    """What one user of locust does."""

    def work(self) -> None:
        """Send what is to be sent now."""

    def pause_s(self) -> float:
        """Seconds until :meth:`work` is to be called again."""

    def finish(self, patience_s: float) -> None:
        """Wait so long for the studies in flight, cut off the rest, and close the connection."""


class _InFlight:
    """The studies of one user that are being sent, each in a greenlet of its own."""

    def __init__(self, sender: Sender, most: int) -> None:
        self.sender = sender
        self._pool = Pool(most)

    @property
    def full(self) -> bool:
        """Whether there is no room for another study."""
        return bool(self._pool.full())

    def start(self, slices: int, intended_s: float) -> Greenlet:
        """Send a study; the greenlet returns whether its verdict was right."""
        return self._pool.spawn(self.sender.send, slices, intended_s)

    def finish(self, patience_s: float) -> None:
        """See :meth:`Source.finish`."""
        try:
            self._pool.join(timeout=patience_s)
        finally:
            # First the sessions, which cancel their requests and give their buffers back, then what they run on.
            self._pool.kill(timeout=_CUT_OFF_WITHIN_S)
            self.sender.close()


class ClosedSource:
    """A user that sends a study, waits for its report, and sends the next."""

    def __init__(self, sender: Sender, wait_s: float) -> None:
        self._sender = sender
        self._in_flight = _InFlight(sender, 1)
        self._wait_s = wait_s
        self._failed = False

    def work(self) -> None:
        """See :meth:`Source.work`."""
        study = self._in_flight.start(self._sender.draw_slices(), self._sender.now_s())
        self._failed = not study.get()

    def pause_s(self) -> float:
        """See :meth:`Source.pause_s`."""
        return max(self._wait_s, PAUSE_AFTER_FAILURE_S if self._failed else 0.0)

    def finish(self, patience_s: float) -> None:
        """See :meth:`Source.finish`."""
        self._in_flight.finish(patience_s)


class OpenSource:
    """Studies that arrive at random times, each sent at once whatever became of those before."""

    def __init__(self, sender: Sender, arrivals: Arrivals, max_in_flight: int) -> None:
        self._sender = sender
        self._in_flight = _InFlight(sender, max_in_flight)
        self._arrivals = arrivals

    def work(self) -> None:
        """See :meth:`Source.work`."""
        for intended_s in self._arrivals.due(self._sender.now_s()):
            slices = self._sender.draw_slices()
            if self._in_flight.full:
                self._sender.refuse(slices, intended_s)
            else:
                self._in_flight.start(slices, intended_s)

    def pause_s(self) -> float:
        """See :meth:`Source.pause_s`."""
        return max(0.0, self._arrivals.next_s - self._sender.now_s())

    def finish(self, patience_s: float) -> None:
        """See :meth:`Source.finish`."""
        self._in_flight.finish(patience_s)


@dataclass(frozen=True, slots=True)
class Seat:
    """Which of a load's users this is: the ``number``-th of the ``process``-th process, both from 0."""

    process: int
    number: int


def make_source(
    load: Load, server: str, phantoms: Phantoms, report: Report, seat: Seat, *, tls: TlsSettings | None = None
) -> Source:
    """A user of ``load``. Its random numbers are its own, and the same in every run.

    The users of an open loop share the rate and the room in flight: Poisson processes add up to one.
    """
    sizes, gaps = np.random.default_rng([load.seed, seat.process, seat.number]).spawn(2)
    sender = Sender(server, load, phantoms, report, sizes, tls=tls)
    if load.rate_per_s is None:
        return ClosedSource(sender, load.wait_s)
    arrivals = Arrivals(load.rate_per_s / load.users, sender.now_s(), gaps)
    return OpenSource(sender, arrivals, max(1, load.max_in_flight // load.users))


def fate(failure: BaseException) -> str:
    """One line on what became of a study.

    A kill may come in the middle of waiting for a lock, and leaving it then fails: that study was cut off too.
    """
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, GreenletExit):
            return CUT_OFF
        cause = cause.__context__
    text = str(failure) if isinstance(failure, GroundglassError) else f"{type(failure).__name__}: {failure}"
    return " ".join(text.split())
