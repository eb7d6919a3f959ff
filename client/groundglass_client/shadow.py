"""Shadow traffic: what the live version is asked, a candidate is asked too, and their disagreements are counted.

The caller gets the live answer, as it would without a shadow. A copy travels as bytes, under a study key of its own,
and nobody waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final

from groundglass import contract
from groundglass.errors import ServerUnreachable, VersionGone
from groundglass_client.buffers import Buffers
from groundglass_client.requests import Request, Tensors
from groundglass_client.shadow_pair import Asked, Pair, copied
from groundglass_client.shadow_report import ShadowReport
from groundglass_client.shadow_scans import ShadowScans, StudyKey, read_scans
from groundglass_client.shadow_settings import DEFAULT_SHADOW, ShadowSettings
from groundglass_client.shadow_slices import SliceAnswers, SliceDifference, compare_slices, read_slices
from groundglass_client.shadow_tally import Tally
from groundglass_client.shadow_worst import WorstSlice, WorstSlices
from groundglass_client.transport import ServedScan, Transport

__all__ = ["ShadowReport", "ShadowSettings", "ShadowTransport"]

log = logging.getLogger(__name__)

UNKNOWN_VERSION: Final = "unknown"
"""The live version where neither the request nor the server was asked for it."""

_COMPARED: Final = (contract.LESION_PIXELS, contract.SLICE_POSITIVE)
"""What a request must ask for to be compared; masks and scan verdicts are compared where it asks for them."""


class ShadowTransport:
    """A transport whose requests for the live version are compared with what a candidate answers.

    The live answer is handed on as it is, and no failure of the candidate reaches the caller. Threads may share it.
    Close it, or use it as a context manager, before the transport below it.
    """

    def __init__(self, transport: Transport, version: str, settings: ShadowSettings = DEFAULT_SHADOW) -> None:
        """``version`` is the candidate: its ensemble ``contract.pinned(version)`` is asked."""
        self._transport = transport
        self._version = version
        self._settings = settings
        self._changed = threading.Condition()
        """Guards all that follows, and tells when a place in the window is free."""
        self._tally = Tally(settings.mask_tolerance)
        self._scans = ShadowScans(settings.scans)
        self._worst = WorstSlices(settings.pictures)
        self._pairs: set[Pair] = set()
        self._live_version: str | None = None
        self._closed = False
        # One thread sends and compares the copies: the caller's threads and gRPC's have other work.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="shadow")

    def __enter__(self) -> ShadowTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def buffers(self) -> Buffers:
        """See ``Transport.buffers``."""
        return self._transport.buffers()

    def describe(self, timeout_s: float) -> ServedScan:
        """See ``Transport.describe``. The first time, raises VersionGone when the candidate can't be asked for by name.

        A candidate that is taken away later is no concern of the studies: its failures are counted.
        """
        served = self._transport.describe(timeout_s)
        if self._live_version is None and self._version not in served.pinned:
            named = ", ".join(sorted(served.pinned)) or "none"
            raise VersionGone(
                f"model version {self._version} can't be a shadow: the server has no model "
                f"{contract.pinned(self._version).name}. Version {served.model_version} is live; versions that can be "
                f"asked for by name: {named}"
            )
        self._live_version = served.model_version
        return served

    def send(self, request: Request, timeout_s: float) -> Future[Tensors]:
        """See ``Transport.send``: the live answer. The copy is made while the live request is on its way."""
        began_s = time.perf_counter()
        live = Asked(self._transport.send(request, timeout_s), began_s)
        if self._is_for_scan(request):
            try:
                self._shadow(request, live)
            except Exception as error:  # whatever it is, the live answer must not be touched by it
                log.info("a request got no copy: %s", type(error).__name__)  # its words may hold a study key
                with self._changed:
                    self._tally.skipped += 1
        return live.future

    def report(self) -> ShadowReport:
        """What was found so far; after :meth:`close`, all of it."""
        with self._changed:
            worst = [slice_.difference for slice_ in self._worst.slices]
            return self._tally.report(self._version, self._scans, worst)

    def write_pictures(self, folder: Path) -> list[Path]:
        """Write the worst slices as PNG, one file each, named by rank and slice index. Returns their paths.

        Pictures that an earlier shadow left in ``folder`` are removed. Raises SettingError when it can't be written to.
        """
        from groundglass_client.shadow_picture import write_pictures  # matplotlib is slow to load, and seldom needed

        with self._changed:
            slices = self._worst.slices
        return write_pictures(slices, folder)

    def close(self) -> None:
        """Wait for the copies on their way, for a bounded time; from now on requests go to the live version only."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._pairs, self._settings.close_s)
            left, self._pairs = self._pairs, set()
            for pair in left:
                self._tally_unanswered(pair)
            self._scans.close()
        for pair in left:
            if pair.candidate is not None:
                pair.candidate.future.cancel()
        self._worker.shutdown(wait=not left, cancel_futures=True)

    @staticmethod
    def _is_for_scan(request: Request) -> bool:
        return request.model.name == contract.CT_SCAN.name or request.pin is not None

    def _shadow(self, request: Request, live: Asked) -> None:
        pair = Pair(request, live, request.pin or request.live or self._live_version or UNKNOWN_VERSION)
        keys = self._admitted(request, pair)
        if keys is None:
            return
        try:
            pair.copy = copied(request, self._version, keys)
            self._worker.submit(self._send_copy, pair, pair.copy)
        except BaseException:
            self._let_go(pair)
            raise

    def _admitted(self, request: Request, pair: Pair) -> dict[StudyKey, bytes] | None:
        """The study keys of the copy, by live key, when there is to be one: it has a place in the window then."""
        with self._changed:
            if self._closed:
                return None
            if pair.live_version == self._version:
                self._tally.to_candidate += 1
                return None
            # Before the wait, and without a copy too: a scan that is not compared is counted.
            keys = {key: self._scans.candidate_key(key) for key in pair.live_keys}
            if all(spec in request.outputs for spec in _COMPARED) and self._has_room() and not self._closed:
                self._pairs.add(pair)
                return keys
            self._tally.skipped += 1
            return None

    def _has_room(self) -> bool:
        """Whether another copy may be made. The patient wait for it, and others may have the lock meanwhile."""
        window = self._settings.window
        if not self._settings.patient:
            return len(self._pairs) < window
        return self._changed.wait_for(lambda: self._closed or len(self._pairs) < window, self._settings.timeout_s)

    def _send_copy(self, pair: Pair, copy: Request) -> None:
        if pair not in self._pairs:  # given up by close
            return
        began_s = time.perf_counter()
        try:
            candidate = Asked(self._transport.send(copy, self._settings.timeout_s), began_s)
        except Exception as error:
            refused: Future[Tensors] = Future()
            refused.set_exception(error)
            candidate = Asked(refused, began_s)
        pair.ask_candidate(candidate, partial(self._hand_over, pair))

    def _hand_over(self, pair: Pair) -> None:
        """Both have ended; this is whichever thread noticed it."""
        try:
            self._worker.submit(self._settle, pair)
        except RuntimeError:  # closed: the pair was counted there
            self._let_go(pair)

    def _settle(self, pair: Pair) -> None:
        try:
            self._compare(pair)
        except Exception as error:  # of ours, or an answer that nobody foresaw: it is not a comparison
            self._fail(error, pair)
        finally:
            self._let_go(pair)

    def _compare(self, pair: Pair) -> None:
        rows = len(pair.live_keys)
        try:
            live_answer = pair.live.future.result()
            live = read_slices(live_answer, rows, masks=contract.MASK.name in live_answer)
        except Exception:  # its caller is told
            with self._changed:
                self._tally.live_failures += pair in self._pairs
            return
        assert pair.candidate is not None  # noqa: S101
        candidate_answer = pair.candidate.future.result()
        candidate = read_slices(candidate_answer, rows, masks=True)
        differences = compare_slices(pair.indices, live, candidate)
        with self._changed:
            if pair not in self._pairs:  # given up by close
                return
            self._tally.add_request(pair.live_version, pair.live.took_s, pair.candidate.took_s)
            self._tally.add_slices(differences, masks=live.masks is not None)
            self._scans.add(*(read_scans(answer, pair.live_keys) for answer in (live_answer, candidate_answer)))
            for row, difference in enumerate(differences):
                if difference.disagrees(self._settings.mask_tolerance):
                    self._worst.offer(difference, partial(self._kept, pair, row, difference, live, candidate))

    def _kept(
        self, pair: Pair, row: int, difference: SliceDifference, live: SliceAnswers, candidate: SliceAnswers
    ) -> WorstSlice:
        """One row's pixels and masks, apart from the request that they came in."""
        return WorstSlice(
            difference,
            pair.live_version,
            self._version,
            pair.hu[row].copy(),
            None if live.masks is None else live.masks[row].copy(),
            None if candidate.masks is None else candidate.masks[row].copy(),
        )

    def _fail(self, error: BaseException, pair: Pair) -> None:
        with self._changed:
            if pair in self._pairs:
                self._tally.add_failure(error, pair.secrets)

    def _tally_unanswered(self, pair: Pair) -> None:
        if not pair.live.future.done():
            self._tally.live_failures += 1
            return
        self._tally.add_failure(ServerUnreachable(f"no answer until {self._settings.close_s:g} s after the end"), ())

    def _let_go(self, pair: Pair) -> None:
        with self._changed:
            self._pairs.discard(pair)
            self._changed.notify_all()
