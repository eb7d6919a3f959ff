"""Asking a server until it answers: retries within the caller's limits, and an end to all of it at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import tenacity

from groundglass.errors import DeadlinePassed, ServerUnreachable, TlsFailed
from groundglass_client.requests import Tensors
from groundglass_client.settings import SessionSettings

log = logging.getLogger(__name__)

_Answered = TypeVar("_Answered")


class Asking:
    """The requests of one study, from its start to its end. Threads share it."""

    def __init__(self, settings: SessionSettings, started: float) -> None:
        """``started`` is when the study began, by ``time.monotonic``."""
        self._settings = settings
        self._ends = None if settings.deadline_s is None else started + settings.deadline_s
        self._abort = threading.Event()
        self._in_flight: set[Future[Tensors]] = set()
        self._reached = self._answered = self._warned = False
        self._lock = threading.Lock()

    @property
    def aborted(self) -> bool:
        """Whether the study has ended early."""
        return self._abort.is_set()

    def until_answered(self, ask: Callable[[float], _Answered], patience_s: float) -> _Answered:
        """What ``ask`` returns; asked again, with backoff, while the server is unreachable for less than
        ``patience_s``. It is given the seconds that it may wait. A first contact that fails over TLS is not
        tried again.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._may_pass),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=3.0),
            stop=tenacity.stop_any(_StopAfterOutage(patience_s), tenacity.stop_when_event_set(self._abort)),
            sleep=tenacity.sleep_using_event(self._abort),
            before_sleep=self._tell,
            reraise=True,
        )
        answer = retrying(lambda: ask(self._timeout_s()))
        self._reached = True
        return answer

    def answer(self, future: Future[Tensors]) -> Tensors:
        """Wait for one answer. Raises what the transport raises, and CancelledError once the study is cancelled."""
        with self._lock:
            self._in_flight.add(future)
        try:
            if self._abort.is_set():
                future.cancel()
            tensors = future.result()
        finally:
            with self._lock:
                self._in_flight.discard(future)
        self._answered = True
        return tensors

    def cancel(self) -> None:
        """End the study: what is in flight is cancelled, and nothing is asked again."""
        self._abort.set()
        with self._lock:
            in_flight = tuple(self._in_flight)
        for future in in_flight:
            future.cancel()

    def _may_pass(self, error: BaseException) -> bool:
        """Whether another try may succeed. Certificates that were fine a moment ago are being changed: that passes."""
        return isinstance(error, ServerUnreachable) and (self._reached or not isinstance(error, TlsFailed))

    def _tell(self, state: tenacity.RetryCallState) -> None:
        """Warn once when a study is interrupted; what follows, and the wait for a first contact, is for the curious."""
        level = logging.WARNING if self._answered and not self._warned else logging.INFO
        self._warned |= self._answered
        log.log(level, "no answer, trying again: %s", state.outcome and state.outcome.exception())

    def _timeout_s(self) -> float:
        if self._ends is None:
            return self._settings.request_timeout_s
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            raise DeadlinePassed(
                f"the study's deadline of {self._settings.deadline_s:g} s has passed without a verdict"
            )
        return min(self._settings.request_timeout_s, left_s)


class _StopAfterOutage(tenacity.stop.stop_base):
    """Stop once failures last for ``patience_s``, counted from the first of them: a long wait for an answer is no
    outage.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._first_failure_s: float | None = None

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        now_s = time.monotonic()
        if self._first_failure_s is None:
            self._first_failure_s = now_s
        return now_s - self._first_failure_s >= self._patience_s
