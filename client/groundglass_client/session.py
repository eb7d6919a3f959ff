"""A session: one study through the server, from decoded slices to the scan verdict.

Chunks are decoded and sent by a few workers, so that decoding overlaps with inference and memory is bounded by the
window and not by the study. An unanswered chunk is sent again, alone. The verdict is the server's; when its state was
lost (a restart, an eviction, a retry) the slice verdicts already held are folded again by the server's aggregator in
one small request. Either way it is compared with the client's own fold, so that a wrong verdict can't pass.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Final, TypeVar

import numpy as np
import tenacity
from numpy.typing import NDArray

from groundglass.contract import IMAGE_SIDE, MASK_ROW_BYTES
from groundglass.errors import DeadlinePassed, NoSeries, ServerError, ServerUnreachable, StudyError
from groundglass.finding import ScanFinding, longest_run_span
from groundglass.report import ScanReport, SliceResult
from groundglass.study import Refusal, SliceSource, Study
from groundglass_client.chunk import DecodeHu, decode_chunk, plan_chunks
from groundglass_client.requests import ChunkAnswer, Tensors, fold_request, read_finding, read_scan_answer, scan_request
from groundglass_client.transport import ServedScan, Transport

log = logging.getLogger(__name__)

MIB: Final = 1 << 20
_Answered = TypeVar("_Answered")


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a study travels.

    chunk_bytes: pixels of one request, in bytes; 2-16 MiB measured best over gRPC.
    window: requests in flight. Four keep the server busy while others are decoded and read.
    request_timeout_s: longest wait for one answer; a CPU needs seconds for a chunk, and a window of them queues.
    connect_timeout_s: how long a server may take to be reachable at first.
    recovery_s: how long a server may stay unreachable in the middle of a study.
    deadline_s: the study's own limit, from the first request to the verdict; None for none.
    masks: ask for the lesion masks (32 KiB a slice).
    skip_bad: leave out slices that can't be decoded and say so in the report, instead of refusing the study.
    """

    chunk_bytes: int = 4 * MIB
    window: int = 4
    request_timeout_s: float = 300.0
    connect_timeout_s: float = 10.0
    recovery_s: float = 120.0
    deadline_s: float | None = None
    masks: bool = True
    skip_bad: bool = False


@dataclass(frozen=True, slots=True)
class ScanAnalysis:
    """The report and, when asked for, the lesion masks: uint8 (n, 512, 64), head to feet, 1 bit a pixel, big-endian
    bits.
    """

    report: ScanReport
    masks: NDArray[np.uint8] | None


def analyse(
    study: Study,
    transport: Transport,
    decode_hu: DecodeHu,
    settings: SessionSettings = SessionSettings(),
    on_slices: Callable[[int], None] = lambda count: None,
) -> ScanAnalysis:
    """Send ``study`` through the server behind ``transport`` and return its report.

    ``on_slices`` is called with the number of slices of each answer, from this thread. Raises ServerUnreachable when
    the server stays away longer than the settings allow, ServerRefused when it refuses, and what ``decode_hu``
    raises. The first failure wins: everything else is cancelled.
    """
    started = time.monotonic()
    scan = _Scan(study, transport, decode_hu, settings, started)
    served = scan.described()
    answers = scan.run_chunks(on_slices)
    kept = scan.without_bad_slices()
    rows = _rows(answers, kept, len(study.slices))
    finding = scan.verdict(answers, rows.positive)
    report = _report(kept, rows, finding, scan.confirmed(served), time.monotonic() - started)
    return ScanAnalysis(report, rows.masks)


class _Scan:
    """The run of one study: what is shared between its workers."""

    def __init__(
        self, study: Study, transport: Transport, decode_hu: DecodeHu, settings: SessionSettings, started: float
    ) -> None:
        self._study = study
        self._transport = transport
        self._decode_hu = decode_hu
        self._settings = settings
        self._key = secrets.token_hex(16)  # opaque, and new for each analysis: an earlier one's state can't interfere
        self._ends = None if settings.deadline_s is None else started + settings.deadline_s
        self._abort = threading.Event()
        self._in_flight: set[Future[Tensors]] = set()
        self._bad: dict[int, Refusal] = {}
        self._answered = self._warned = False
        self._lock = threading.Lock()

    def described(self) -> ServedScan:
        """What the server says of itself, once it can be reached."""
        patience_s = self._settings.connect_timeout_s
        return self.retried(lambda timeout_s: self._transport.describe(min(timeout_s, patience_s)), patience_s)

    def run_chunks(self, on_slices: Callable[[int], None]) -> list[ChunkAnswer]:
        """Every chunk's answer, in the order they came."""
        chunks = plan_chunks(self._study.slices, self._settings.chunk_bytes)
        workers = ThreadPoolExecutor(self._settings.window, thread_name_prefix="chunk")
        answers = []
        try:
            for done in as_completed([workers.submit(self._answer, chunk) for chunk in chunks]):
                if answer := done.result():
                    answers.append(answer)
                    self._answered = True
                    on_slices(len(answer.indices))
        except BaseException:
            self._cancel()
            raise
        finally:
            workers.shutdown(wait=True, cancel_futures=True)
        return answers

    def without_bad_slices(self) -> Study:
        """The study with the slices that could not be decoded counted in ``refused``; the others keep their index."""
        if not self._bad:
            return self._study
        slices = tuple(source for source in self._study.slices if source.index not in self._bad)
        if not slices:
            raise NoSeries(f"none of the {len(self._study.slices)} slices could be decoded: {self._bad[0].reason}")
        refused = (*self._study.refused, *(self._bad[index] for index in sorted(self._bad)))
        return replace(self._study, slices=slices, refused=refused)

    def verdict(self, answers: list[ChunkAnswer], positive: NDArray[np.bool_]) -> ScanFinding:
        """The server's verdict on the whole scan, compared with our own fold of its slice verdicts, bool (n,)."""
        finding = next((answer.finding for answer in answers if answer.finding.complete), None)
        if finding is None:
            log.info("the server does not hold all of this scan: its slice verdicts are folded again")
            finding = self._fold(positive)
        start, end = longest_run_span(positive)
        if not finding.complete or finding.longest_run != end - start:
            raise ServerError(
                f"the server found a longest run of {finding.longest_run} over {finding.slices_seen} slices, the slice "
                f"verdicts that it sent hold {end - start} over {len(positive)}: its scan_aggregator is broken"
            )
        return finding

    def confirmed(self, served: ServedScan) -> ServedScan:
        """``served`` with the model version that answers now added, when that is another one: a mixture is never
        silent.
        """
        try:
            version_now = self._transport.describe(self._settings.connect_timeout_s).model_version
        except ServerError as error:
            log.warning("the model version could not be confirmed after the last answer: %s", error)
            return served
        versions = sorted({served.model_version, version_now})
        return ServedScan(" and ".join(versions), served.positive_run)

    def retried(self, ask: Callable[[float], _Answered], patience_s: float) -> _Answered:
        """What ``ask`` returns; asked again, with backoff, while the server is unreachable for less than
        ``patience_s``.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ServerUnreachable),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=3.0),
            stop=tenacity.stop_any(_StopAfterOutage(patience_s), tenacity.stop_when_event_set(self._abort)),
            sleep=tenacity.sleep_using_event(self._abort),
            before_sleep=self._tell,
            reraise=True,
        )
        return retrying(lambda: ask(self._timeout_s()))

    def _answer(self, sources: tuple[SliceSource, ...]) -> ChunkAnswer | None:
        if self._abort.is_set():
            raise CancelledError
        slice_count = len(self._study.slices)
        chunk = decode_chunk(sources, self._decode_hu, self._on_bad)
        if not len(chunk.indices):
            return None
        keys = _keys(self._key)

        def ask(timeout_s: float) -> ChunkAnswer:
            request = scan_request(chunk, next(keys), slice_count, masks=self._settings.masks)
            return read_scan_answer(chunk, slice_count, self._wait(self._transport.send(request, timeout_s)))

        return self.retried(ask, self._settings.recovery_s)

    def _tell(self, state: tenacity.RetryCallState) -> None:
        """Warn once when a study is interrupted; what follows, and the wait for a first contact, is for the curious."""
        level = logging.WARNING if self._answered and not self._warned else logging.INFO
        self._warned |= self._answered
        log.log(level, "no answer, trying again: %s", state.outcome and state.outcome.exception())

    def _on_bad(self, source: SliceSource, error: StudyError) -> None:
        if not self._settings.skip_bad:
            raise error
        self._bad[source.index] = Refusal(source.file, str(error))

    def _fold(self, positive: NDArray[np.bool_]) -> ScanFinding:
        slices = len(positive)

        def ask(timeout_s: float) -> ScanFinding:
            request = fold_request(positive, secrets.token_hex(16))
            return read_finding(self._wait(self._transport.send(request, timeout_s)), slices, slices)

        return self.retried(ask, self._settings.recovery_s)

    def _wait(self, future: Future[Tensors]) -> Tensors:
        with self._lock:
            self._in_flight.add(future)
        try:
            if self._abort.is_set():
                future.cancel()
            return future.result()
        finally:
            with self._lock:
                self._in_flight.discard(future)

    def _cancel(self) -> None:
        self._abort.set()
        with self._lock:
            in_flight = tuple(self._in_flight)
        for future in in_flight:
            future.cancel()

    def _timeout_s(self) -> float:
        if self._ends is None:
            return self._settings.request_timeout_s
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            raise DeadlinePassed(
                f"the study's deadline of {self._settings.deadline_s:g} s has passed without a verdict"
            )
        return min(self._settings.request_timeout_s, left_s)


def _keys(first: str) -> Iterator[str]:
    """``first``, then a new key for each repetition.

    A request that was lost on its way back may have been counted. Its repetition can land in another batch, where a
    slice at the very threshold may fall on the other side: under the same key that would be a contradiction.
    """
    yield first
    while True:
        yield secrets.token_hex(16)


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


@dataclass(frozen=True, slots=True)
class _Rows:
    """Slice verdicts of a whole scan, head to feet: int32 (n,), bool (n,), uint8 (n, 512, 64) or None."""

    lesion_pixels: NDArray[np.int32]
    positive: NDArray[np.bool_]
    masks: NDArray[np.uint8] | None


def _rows(answers: list[ChunkAnswer], kept: Study, sent: int) -> _Rows:
    """The answers put in anatomical order, without the slices that were never sent."""
    place = np.full(sent, -1)
    place[[source.index for source in kept.slices]] = np.arange(len(kept.slices))
    lesion_pixels = np.zeros(len(kept.slices), dtype=np.int32)
    positive = np.zeros(len(kept.slices), dtype=np.bool_)
    with_masks = all(answer.masks is not None for answer in answers)
    masks = np.zeros((len(kept.slices) if with_masks else 0, IMAGE_SIDE, MASK_ROW_BYTES), dtype=np.uint8)
    for answer in answers:
        places = place[answer.indices]
        lesion_pixels[places] = answer.lesion_pixels
        positive[places] = answer.positive
        if with_masks and answer.masks is not None:
            masks[places] = answer.masks
    return _Rows(lesion_pixels, positive, masks if with_masks else None)


def _report(kept: Study, rows: _Rows, finding: ScanFinding, served: ServedScan, seconds: float) -> ScanReport:
    start, end = longest_run_span(rows.positive)
    return ScanReport(
        study=kept,
        slices=tuple(
            SliceResult(replace(source, index=index), int(rows.lesion_pixels[index]), bool(rows.positive[index]))
            for index, source in enumerate(kept.slices)
        ),
        scan_positive=finding.positive,
        longest_run=finding.longest_run,
        run_start=start if end > start else None,
        positive_run=served.positive_run,
        model_version=served.model_version,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        groundglass_version=version("groundglass"),
        seconds=seconds,
    )
