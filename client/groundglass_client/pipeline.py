"""The hot path: slices are decoded by as many threads as there are cores, chunks are sent by as many as the window is
wide, and the next chunk is decoded while the server works on those before it.

A chunk is decoded into the very memory that its request is read from. At most ``window`` + ``ahead`` chunks exist at
once, whatever the study's size. The first failure wins: everything else is cancelled.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groundglass.errors import ServerError, ServerUnreachable, StudyError, VersionGone
from groundglass.study import Refusal, SliceSource
from groundglass_client.asking import Asking
from groundglass_client.buffers import MASK_BYTES, Buffer
from groundglass_client.choice import Choice
from groundglass_client.chunk import HU_BYTES, Chunk, DecodeHu, plan_chunks
from groundglass_client.requests import ChunkAnswer, read_scan_answer, scan_request
from groundglass_client.settings import SessionSettings
from groundglass_client.spans import ChunkSpan
from groundglass_client.transport import Transport

_ALIGNMENT: Final = 4096


@dataclass(slots=True, eq=False)
class _Job:
    """One chunk on its way. ``hu`` int16 (n, rows, columns) lies at the start of ``buffer``."""

    sources: Sequence[SliceSource]
    buffer: Buffer
    hu: NDArray[np.int16]
    left: int
    in_doubt: bool = False
    bad: list[int] = field(default_factory=list)
    decode_s: float = 0.0
    decoded_s: float = 0.0
    sent_s: float = 0.0
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    """One chunk's answer, and where its time went."""

    answer: ChunkAnswer
    span: ChunkSpan


class Pipeline:
    """The chunks of one study. Use it once."""

    def __init__(
        self,
        transport: Transport,
        decode_hu: DecodeHu,
        settings: SessionSettings,
        asking: Asking,
        *,
        choice: Choice,
        started: float,
    ) -> None:
        """Every chunk goes to the version of ``choice``. ``started`` is when the study began, by ``time.monotonic``."""
        self._transport = transport
        self._decode_hu = decode_hu
        self._settings = settings
        self._asking = asking
        self._choice = choice
        self._started = started
        self._key = secrets.token_hex(16)  # opaque, and new for each analysis: an earlier one's state can't interfere
        self._slice_count = 0
        self._lock = threading.Lock()
        self._jobs: set[_Job] = set()
        self._outcomes: SimpleQueue[Answered | BaseException | None] = SimpleQueue()
        self.bad: dict[int, Refusal] = {}
        """Slices that could not be decoded, by their index (only with ``skip_bad``)."""

    def run(self, slices: Sequence[SliceSource]) -> Generator[Answered, None, None]:
        """Send a whole study; every chunk's answer as it comes. Raises whatever failed first."""
        self._slice_count = len(slices)
        shared = self._transport.buffers().shared
        chunks = list(plan_chunks(slices, self._settings.chunk_bytes_of(shared=shared)))
        self._buffer_bytes = max(map(_buffer_bytes, chunks))
        self._decoders = ThreadPoolExecutor(self._settings.decode_threads, thread_name_prefix="decode")
        self._senders = ThreadPoolExecutor(self._settings.window, thread_name_prefix="send")
        try:
            yield from self._flow(iter(chunks))
        except BaseException:
            self._asking.cancel()
            raise
        finally:
            self._decoders.shutdown(wait=True, cancel_futures=True)
            self._senders.shutdown(wait=True, cancel_futures=True)
            for job in tuple(self._jobs):
                self._let_go(job)

    def _flow(self, chunks: Iterator[Sequence[SliceSource]]) -> Iterator[Answered]:
        under_way = 0
        while True:
            while under_way < self._settings.window + self._settings.ahead and (sources := next(chunks, None)):
                self._start(sources)
                under_way += 1
            if not under_way:
                return
            outcome = self._outcomes.get()
            under_way -= 1
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is not None:
                yield outcome

    def _start(self, sources: Sequence[SliceSource]) -> None:
        buffer = self._transport.buffers().take(self._buffer_bytes)
        first = sources[0]
        job = _Job(sources, buffer, buffer.hu(len(sources), first.rows, first.columns), len(sources))
        self._jobs.add(job)
        for position, source in enumerate(sources):
            self._decoders.submit(self._decode, job, position, source)

    def _decode(self, job: _Job, position: int, source: SliceSource) -> None:
        if self._asking.aborted:
            return
        began = time.perf_counter()
        bad = False
        try:
            job.hu[position] = self._decode_hu(source)
        except StudyError as error:
            if not self._settings.skip_bad:
                self._outcomes.put(error)
                return
            bad = True
            self.bad[source.index] = Refusal(source.file, str(error))
        except BaseException as error:
            self._outcomes.put(error)
            return
        took_s = time.perf_counter() - began
        with self._lock:
            job.decode_s += took_s
            job.left -= 1
            done = job.left == 0
            if bad:
                job.bad.append(position)
        if done:
            job.decoded_s = time.monotonic() - self._started
            self._senders.submit(self._send, job)

    def _send(self, job: _Job) -> None:
        try:
            outcome: Answered | BaseException | None = self._answered(job)
        except BaseException as error:
            outcome = error
        self._let_go(job)
        self._outcomes.put(outcome)

    def _answered(self, job: _Job) -> Answered | None:
        if self._asking.aborted:
            raise CancelledError
        chunk = _without(job)
        if not len(chunk.indices):
            return None
        job.sent_s = time.monotonic() - self._started
        answer = self._asking.until_answered(
            lambda timeout_s: self._ask(job, chunk, timeout_s), self._settings.recovery_s
        )
        answered_s = time.monotonic() - self._started
        span = ChunkSpan(len(chunk.indices), job.decode_s, job.decoded_s, job.sent_s, answered_s, job.attempts)
        return Answered(answer, span)

    def _ask(self, job: _Job, chunk: Chunk, timeout_s: float) -> ChunkAnswer:
        """One try.

        Every repetition goes under a new key: a request that was lost on its way back may have been counted, and its
        repetition can land in another batch, where a slice at the very threshold may fall on the other side. Under the
        same key that would be a contradiction. It also travels as bytes: two requests would write to one buffer.
        """
        first = job.attempts == 0
        job.attempts += 1
        request = scan_request(
            chunk,
            self._key if first else secrets.token_hex(16),
            self._slice_count,
            masks=self._settings.masks,
            buffer=job.buffer if first else None,
            model=self._choice.model,
            live=self._choice.live,
        )
        try:
            tensors = self._asking.answer(self._transport.send(request, timeout_s))
        except (ServerUnreachable, CancelledError):
            job.in_doubt |= first
            raise
        except VersionGone as gone:
            raise self._gone(gone, timeout_s) from gone
        return read_scan_answer(chunk, self._slice_count, tensors)

    def _gone(self, gone: VersionGone, timeout_s: float) -> ServerError:
        """What it means that a version is gone. One that was asked for by name may be served by others behind a
        balancer, since a server that stops gives up all of its own; where it had to be live, another one is.
        """
        if not self._choice.by_name:
            return gone
        served = self._transport.describe(min(timeout_s, self._settings.connect_timeout_s))
        if self._choice.version not in served.pinned:
            return gone
        return ServerUnreachable(f"{gone}; it is still served elsewhere")

    def _let_go(self, job: _Job) -> None:
        self._jobs.discard(job)
        self._transport.buffers().give_back(job.buffer, answered=not job.in_doubt)


def _buffer_bytes(sources: Sequence[SliceSource]) -> int:
    """Room for the pixels of a chunk and for its masks, in whole pages."""
    slice_bytes = sources[0].rows * sources[0].columns * HU_BYTES + MASK_BYTES
    return -(-len(sources) * slice_bytes // _ALIGNMENT) * _ALIGNMENT


def _without(job: _Job) -> Chunk:
    """The chunk of the slices that could be decoded, moved together."""
    good = [position for position in range(len(job.sources)) if position not in job.bad]
    if job.bad:
        job.hu[: len(good)] = job.hu[good]
    return Chunk(np.array([job.sources[place].index for place in good], dtype=np.int32), job.hu[: len(good)])
