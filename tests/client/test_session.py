"""A session turns any study into the right verdict, or into one clear error, whatever its server does."""

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from client_study import QUICK, SIDE, Decoder, study_of
from groundglass.errors import (
    DeadlinePassed,
    NoSeries,
    ServerError,
    ServerRefused,
    ServerUnreachable,
    UnreadableFile,
    VersionGone,
)
from groundglass.finding import fold
from groundglass.study import SliceSource
from groundglass_client.buffers import Buffer, Buffers
from groundglass_client.requests import Request, Tensors
from groundglass_client.session import MOST_ATTEMPTS, analyse
from groundglass_client.testing import InMemoryTransport
from groundglass_client.transport import ServedScan


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


def two_versions(*pinned: str) -> InMemoryTransport:
    """A server whose version 1 marks what version 2 leaves alone."""
    return InMemoryTransport(pinned=pinned, mark_from_hu={"2": 100})


class Told:
    """Does something once so many slices are answered, and keeps what it was told."""

    def __init__(self, after: int, what: Callable[[], None]) -> None:
        self.after, self.what, self.heard, self.done = after, what, list[int](), False

    def __call__(self, slices: int) -> None:
        self.heard.append(slices)
        if sum(self.heard) >= self.after and not self.done:
            self.done = True
            self.what()


POSITIVES = [5 <= index < 25 for index in range(30)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30))
def test_a_promotion_does_not_touch_a_study_on_a_version_asked_for_by_name(after: int) -> None:
    """Whenever another version goes live, a study that began before is answered by its own version to the end."""
    server = two_versions("1", "2")
    told = Told(after, lambda: server.promote("2"))
    report = analyse(study_of(30), server, Decoder(POSITIVES), QUICK, told).report
    assert (report.model_version, [result.positive for result in report.slices]) == ("1", POSITIVES)
    assert min(told.heard) > 0
    assert analyse(study_of(30), server, Decoder(POSITIVES), QUICK).report.model_version == "2"


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30))
def test_a_swap_where_versions_have_no_names_has_the_study_computed_again(after: int) -> None:
    """Where only the live version can be asked, a swap before the verdict starts the study anew: one version, never a
    mixture.
    """
    server = two_versions()
    told = Told(after, lambda: server.promote("2"))
    analysis = analyse(study_of(30), server, Decoder(POSITIVES), QUICK, told)
    assert (analysis.report.model_version, analysis.report.longest_run) == ("2", 0)
    assert not any(result.lesion_pixels for result in analysis.report.slices)
    assert sum(told.heard) == sum(span.slices for span in analysis.spans) == 30
    assert min(told.heard) < 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20))
def test_a_version_taken_away_in_the_middle_has_the_study_computed_again(after: int) -> None:
    """When the version of a study is retired before its last chunk, another answers all of it."""
    server = two_versions("1", "2")

    def retire() -> None:
        server.promote("2")
        server.retire("1")

    told = Told(after, retire)
    how = replace(QUICK, window=1, ahead=1)
    report = analyse(study_of(30), server, Decoder(POSITIVES), how, told).report
    assert (report.model_version, report.longest_run, sum(told.heard)) == ("2", 0, 30)


def test_a_version_gone_from_one_server_of_a_balancer_is_asked_for_again() -> None:
    """Chunks that reach a server which stops, while others keep the version, are sent again; the rest is kept."""

    class Stopping(InMemoryTransport):
        sent = 0

        def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
            self.sent += 1
            if not 3 <= self.sent <= 5:
                return super().send(request, timeout_s)
            gone: Future[Tensors] = Future()
            gone.set_exception(VersionGone(f"model {request.model.name}: no available versions"))
            return gone

    heard: list[int] = []
    report = analyse(
        study_of(30), Stopping(pinned=("1",)), Decoder(POSITIVES), replace(QUICK, version="1"), heard.append
    ).report
    assert (report.longest_run, report.scan_positive) == (20, True)
    assert sum(heard) == 30
    assert min(heard) > 0


def test_a_version_no_longer_live_is_left_though_it_can_be_asked_for_by_name() -> None:
    """A study that must have its version live is computed again on the next one, whatever has a name meanwhile."""

    class Strict(InMemoryTransport):
        def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
            if request.live in (None, self.describe(timeout_s).model_version):
                return super().send(request, timeout_s)
            gone: Future[Tensors] = Future()
            gone.set_exception(VersionGone(f"version {request.live} is no longer live"))
            return gone

    transport = Strict(mark_from_hu={"2": 100})

    def swap() -> None:
        transport.pin("1")
        transport.promote("2")

    report = analyse(study_of(30), transport, Decoder(POSITIVES), QUICK, Told(4, swap)).report
    assert (report.model_version, report.longest_run) == ("2", 0)


def test_a_study_computed_again_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The log names the version that was lost and the one that answers."""
    server = two_versions()
    analyse(study_of(30), server, Decoder(POSITIVES), QUICK, Told(8, lambda: server.promote("2")))
    assert "version 1 did not answer the whole study, which is computed again on version 2" in caplog.text


def test_versions_that_never_stay_are_one_error() -> None:
    """When every attempt is overtaken by another version, the study ends with an error that says so."""

    class Restless(InMemoryTransport):
        described = 0

        def describe(self, timeout_s: float) -> ServedScan:
            self.described += 1
            return ServedScan(str(self.described), 15)

    with pytest.raises(ServerError, match=f"begun {MOST_ATTEMPTS} times.*version 10 went live in place of version 9"):
        analyse(study_of(6), Restless(), Decoder([True] * 6), QUICK)


def test_a_study_on_a_named_version_needs_no_second_description() -> None:
    """Where a version can't change under the study, the server is asked once what it serves."""

    class Counted(InMemoryTransport):
        described = 0

        def describe(self, timeout_s: float) -> ServedScan:
            self.described += 1
            return super().describe(timeout_s)

    server = Counted(pinned=("1",))
    analyse(study_of(6), server, Decoder([True] * 6), QUICK)
    assert server.described == 1


def test_a_version_can_be_asked_for() -> None:
    """The version in the settings answers, whichever is live."""
    how = replace(QUICK, version="2")
    report = analyse(study_of(30), two_versions("1", "2"), Decoder(POSITIVES), how).report
    assert (report.model_version, report.longest_run) == ("2", 0)


@pytest.mark.parametrize(("pinned", "words"), [((), "no version can"), (("1", "2"), "versions 1, 2 can")])
def test_a_version_that_is_not_there_is_refused(pinned: tuple[str, ...], words: str) -> None:
    """Who asks for a version that can't be had is told which is live and which can."""
    with pytest.raises(VersionGone, match=f"version 3 can't be asked for by name: version 1 is live, and {words}"):
        analyse(study_of(3), two_versions(*pinned), Decoder([True] * 3), replace(QUICK, version="3"))


def test_a_version_asked_for_that_goes_is_an_error() -> None:
    """No other version answers in place of the one that was asked for."""
    server = two_versions("1", "2")
    told = Told(4, lambda: server.retire("2"))
    with pytest.raises(VersionGone, match="version 2 can't be asked for"):
        analyse(study_of(30), server, Decoder(POSITIVES), replace(QUICK, version="2", window=1, ahead=1), told)


def test_the_deadline_spans_all_attempts() -> None:
    """A study that is computed again gets no second deadline."""
    server = two_versions()

    def swap_late() -> None:
        time.sleep(0.3)
        server.promote("2")

    with pytest.raises(DeadlinePassed, match=r"0\.2 s"):
        analyse(study_of(30), server, Decoder(POSITIVES), replace(QUICK, deadline_s=0.2), Told(30, swap_late))


def test_a_server_gone_before_the_version_is_confirmed_is_an_error() -> None:
    """Slices of a version that nobody can confirm make no report."""

    class Gone(InMemoryTransport):
        answered = False

        def describe(self, timeout_s: float) -> ServedScan:
            if self.answered:
                raise ServerUnreachable("connection refused")
            return super().describe(timeout_s)

    server = Gone()
    told = Told(6, lambda: setattr(server, "answered", True))
    with pytest.raises(ServerUnreachable, match="connection refused"):
        analyse(study_of(6), server, Decoder([True] * 6), replace(QUICK, recovery_s=0.2), told)


def test_skipped_slices_leave_the_pixels_of_the_others_in_place() -> None:
    """When slices of a chunk are left out, each of the others is sent with its own pixels."""

    def decode(source: SliceSource) -> NDArray[np.int16]:
        if source.index % 3 == 0:
            raise UnreadableFile(f"{source.file}: truncated")
        hu = np.full((SIDE, SIDE), -1000, np.int16)
        hu.flat[: source.index] = 40
        return hu

    report = analyse(study_of(40), InMemoryTransport(), decode, replace(QUICK, skip_bad=True)).report
    scale = (512 // SIDE) ** 2
    assert [result.lesion_pixels for result in report.slices] == [n * scale for n in range(40) if n % 3]


def test_no_more_chunks_exist_than_the_window_and_those_ahead() -> None:
    """However long the study and however slow the server, memory is bounded by the settings."""
    taken, most = 0, 0

    class Watched(Buffers):
        def take(self, size: int) -> Buffer:
            nonlocal taken, most
            taken += 1
            most = max(most, taken)
            return super().take(size)

        def give_back(self, buffer: Buffer, *, answered: bool) -> None:
            nonlocal taken
            taken -= 1
            super().give_back(buffer, answered=answered)

    class Slow(InMemoryTransport):
        kept = Watched(shared=False)

        def buffers(self) -> Buffers:
            return self.kept

        def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
            time.sleep(0.002)
            return super().send(request, timeout_s)

    analyse(study_of(200), Slow(), Decoder([True] * 200), replace(QUICK, window=3, ahead=2))
    assert (most, taken) == (5, 0)


def test_spans_cover_the_study() -> None:
    """Every slice is in one span, and a chunk is decoded before it is sent and sent before it is answered."""
    spans = analyse(study_of(30), Failing(lost=frozenset({1})), Decoder([True] * 30), QUICK).spans
    assert sum(span.slices for span in spans) == 30
    assert sum(span.attempts for span in spans) == len(spans) + 1
    assert all(0 <= span.decoded_s <= span.sent_s <= span.answered_s for span in spans)


def test_the_server_in_memory_answers_one_request_at_a_time() -> None:
    """Threads that send at once can't see a scan half taken in: the verdict is right every time."""
    positives = [index % 5 != 0 for index in range(30)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            report = analyse(study_of(30), InMemoryTransport(), Decoder(positives), replace(QUICK, window=9)).report
            assert report.longest_run == 4
    finally:
        sys.setswitchinterval(interval)
