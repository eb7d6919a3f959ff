"""A session turns any study into the right verdict, or into one clear error, whatever its server does."""

import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from groundglass.errors import DeadlinePassed, NoSeries, ServerError, ServerRefused, ServerUnreachable, UnreadableFile
from groundglass.finding import fold
from groundglass.study import Series, SliceSource, Study
from groundglass_client.requests import Request, Tensors
from groundglass_client.session import SessionSettings, analyse
from groundglass_client.testing import InMemoryTransport
from groundglass_client.transport import ServedScan

SIDE = 16
QUICK = SessionSettings(chunk_bytes=4 * SIDE * SIDE * 2, window=3, connect_timeout_s=0.3, recovery_s=5.0)


def study_of(slice_count: int) -> Study:
    """A study that exists only by description."""
    slices = tuple(
        SliceSource(index, Path(f"{index}.dcm"), f"{index}.dcm", 0, SIDE, SIDE, -2.0 * index)
        for index in range(slice_count)
    )
    series = Series("CT", None, 1, slice_count, SIDE, SIDE, None, (0.7, 0.7), 2.0, 0.0)
    return Study(Path("study"), series, slices)


class Decoder:
    """Gives slices that are positive where asked, and fails where told to."""

    def __init__(self, positives: list[bool], bad: frozenset[int] = frozenset()) -> None:
        self.positives, self.bad = positives, bad

    def __call__(self, source: SliceSource) -> NDArray[np.int16]:
        if source.index in self.bad:
            raise UnreadableFile(f"{source.file}: truncated")
        return np.full((SIDE, SIDE), 40 if self.positives[source.index] else -1000, np.int16)


class Failing(InMemoryTransport):
    """Fails the requests whose number is listed: lost before the server saw them, or lost on the way back."""

    def __init__(self, lost: frozenset[int] = frozenset(), unanswered: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.lost, self.unanswered, self.requests, self.lock = lost, unanswered, 0, threading.Lock()

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        with self.lock:
            number, self.requests = self.requests, self.requests + 1
            future: Future[Tensors] = Future()
            if number not in self.lost:
                future = super().send(request, timeout_s)
        if number in self.lost | self.unanswered:
            future = Future()
            future.set_exception(ServerUnreachable("connection reset"))
        return future


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 9))
def test_the_report_holds_the_fold_of_the_slice_verdicts(positives: list[bool], window: int) -> None:
    """Any scan, in any window, gives each slice's verdict at its place and the fold's verdict of the scan."""
    analysis = analyse(study_of(len(positives)), InMemoryTransport(), Decoder(positives), replace(QUICK, window=window))
    report, expected = analysis.report, fold(enumerate(positives), len(positives))
    assert [result.positive for result in report.slices] == positives
    assert (report.longest_run, report.scan_positive) == (expected.longest_run, expected.positive)
    assert analysis.masks is not None
    assert np.unpackbits(analysis.masks).sum() == sum(result.lesion_pixels for result in report.slices)


@settings(max_examples=15, deadline=None)
@given(st.frozensets(st.integers(0, 12), max_size=3), st.frozensets(st.integers(0, 12), max_size=3))
def test_lost_requests_are_sent_again_and_change_nothing(lost: frozenset[int], unanswered: frozenset[int]) -> None:
    """Requests lost on the way there or back are repeated, and the verdict stays that of an undisturbed run."""
    positives = [5 <= index < 25 for index in range(30)]
    report = analyse(study_of(30), Failing(lost, unanswered), Decoder(positives), QUICK).report
    assert (report.longest_run, report.scan_positive) == (20, True)


def test_an_unreachable_server_is_given_up_after_its_patience() -> None:
    """A server that never answers is one clear error, soon."""

    class Absent(InMemoryTransport):
        def describe(self, timeout_s: float) -> ServedScan:
            raise ServerUnreachable("model ct_scan at localhost:1: failed to connect (UNAVAILABLE)")

    with pytest.raises(ServerUnreachable, match="localhost:1"):
        analyse(study_of(3), Absent(), Decoder([False] * 3), QUICK)


def test_a_refusal_is_not_repeated() -> None:
    """What the server refuses is raised at once and not sent again."""

    class Refusing(InMemoryTransport):
        sent = 0

        def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
            Refusing.sent += 1
            future: Future[Tensors] = Future()
            future.set_exception(ServerRefused("unexpected shape"))
            return future

    with pytest.raises(ServerRefused, match="unexpected shape"):
        analyse(study_of(2), Refusing(), Decoder([False] * 2), QUICK)
    assert Refusing.sent == 1


def test_the_first_failure_cancels_what_is_in_flight() -> None:
    """When one chunk fails, requests that would hang for ever are cancelled and the root cause is raised."""
    pending: list[Future[Tensors]] = []

    class Hanging(InMemoryTransport):
        def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
            pending.append(Future())
            return pending[-1]

    with pytest.raises(UnreadableFile, match=r"8\.dcm"):
        analyse(study_of(12), Hanging(), Decoder([False] * 12, bad=frozenset({8})), QUICK)
    assert pending
    assert all(future.cancelled() for future in pending)


def test_the_deadline_ends_a_study_that_is_not_answered() -> None:
    """The caller's own limit holds even while the server keeps being unreachable."""

    class Slow(InMemoryTransport):
        def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
            time.sleep(min(timeout_s, 0.05))
            future: Future[Tensors] = Future()
            future.set_exception(ServerUnreachable("deadline exceeded"))
            return future

    with pytest.raises(DeadlinePassed, match=r"0\.2 s"):
        analyse(study_of(3), Slow(), Decoder([False] * 3), replace(QUICK, deadline_s=0.2))


def test_skipped_slices_are_counted_and_the_verdict_is_over_the_rest() -> None:
    """With leave to skip, bad slices are named in the report, the others are renumbered and the verdict is partial."""
    positives = [2 <= index < 20 for index in range(24)]
    bad = frozenset({0, 7, 23})
    report = analyse(study_of(24), InMemoryTransport(), Decoder(positives, bad), replace(QUICK, skip_bad=True)).report
    assert [refusal.file for refusal in report.study.refused] == ["0.dcm", "7.dcm", "23.dcm"]
    assert [result.source.index for result in report.slices] == list(range(21))
    assert (report.longest_run, report.partial, report.verdict) == (17, True, "positive (partial: 3 files refused)")


def test_a_study_of_bad_slices_only_is_refused() -> None:
    """When no slice can be decoded there is no verdict, even with leave to skip."""
    with pytest.raises(NoSeries, match="none of the 3 slices"):
        analyse(
            study_of(3), InMemoryTransport(), Decoder([True] * 3, frozenset(range(3))), replace(QUICK, skip_bad=True)
        )


def test_a_server_that_folds_wrongly_is_found_out() -> None:
    """A verdict that contradicts the slice verdicts it rests on is an error, never a report."""

    class Miscounting(InMemoryTransport):
        def _aggregate(self, tensors: Tensors, positive: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
            answer = super()._aggregate(tensors, positive)
            return answer | {"LONGEST_RUN": answer["LONGEST_RUN"] + 1}

    with pytest.raises(ServerError, match="scan_aggregator is broken"):
        analyse(study_of(6), Miscounting(), Decoder([True] * 6), QUICK)


def test_a_swap_in_the_middle_is_named() -> None:
    """When another model version answers at the end than at the start, the report names both."""

    class Swapped(InMemoryTransport):
        described = 0

        def describe(self, timeout_s: float) -> ServedScan:
            Swapped.described += 1
            return ServedScan(str(Swapped.described), 15)

    assert analyse(study_of(6), Swapped(), Decoder([True] * 6), QUICK).report.model_version == "1 and 2"
