"""The tally of shadow traffic: counters that grow with every request, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import numpy as np

from groundglass_client.shadow_report import ShadowLatency, ShadowReport
from groundglass_client.shadow_scans import ShadowScans
from groundglass_client.shadow_slices import SliceDifference

LATENCIES: Final = 10_000
"""Requests whose latency is remembered, the latest ones: enough for a p99, and 160 kB."""
MESSAGES: Final = 3
_MESSAGE_CHARACTERS: Final = 300
_LIVE_VERSIONS: Final = 8


class Tally:
    """Counts what was compared, and what was not. Not for several threads at once."""

    def __init__(self, mask_tolerance: int) -> None:
        self._mask_tolerance = mask_tolerance
        self.live_failures = self.skipped = self.to_candidate = 0
        self._requests = self._slices = self._disagreeing = self._masks = 0
        self._masks_differ = self._pixels_differ = self._verdicts_differ = 0
        self._dices, self._dice_sum, self._dice_worst = 0, 0.0, 1.0
        self._failures = 0
        self._messages: list[str] = []
        self._live_versions: list[str] = []
        self._live_s: deque[float] = deque(maxlen=LATENCIES)
        self._candidate_s: deque[float] = deque(maxlen=LATENCIES)

    def add_request(self, live_version: str, live_s: float, candidate_s: float) -> None:
        """Both versions answered a request, in so many seconds."""
        self._requests += 1
        self._live_s.append(live_s)
        self._candidate_s.append(candidate_s)
        if live_version not in self._live_versions and len(self._live_versions) < _LIVE_VERSIONS:
            self._live_versions.append(live_version)

    def add_slices(self, differences: Iterable[SliceDifference], *, masks: bool) -> None:
        """Slices under both versions; with ``masks`` their masks were compared."""
        for difference in differences:
            self._slices += 1
            self._masks += masks
            self._masks_differ += masks and difference.differing_pixels > 0
            self._disagreeing += difference.disagrees(self._mask_tolerance)
            self._pixels_differ += difference.live_pixels != difference.candidate_pixels
            self._verdicts_differ += difference.verdict_differs
            if difference.dice is not None:
                self._dices += 1
                self._dice_sum += difference.dice
                self._dice_worst = min(self._dice_worst, difference.dice)

    def add_failure(self, error: BaseException, secrets: Collection[str]) -> None:
        """The candidate did not answer. The message is kept if it is new; ``secrets``, study keys, are taken out."""
        self._failures += 1
        message = str(error) or type(error).__name__
        for key in sorted(filter(None, secrets), key=len, reverse=True):  # one may be part of another
            message = message.replace(key, "(study key)")
        message = message[:_MESSAGE_CHARACTERS]
        if message not in self._messages and len(self._messages) < MESSAGES:
            self._messages.append(message)

    def report(self, candidate_version: str, scans: ShadowScans, worst: Sequence[SliceDifference]) -> ShadowReport:
        """Everything so far."""
        return ShadowReport(
            candidate_version=candidate_version,
            live_versions=tuple(self._live_versions),
            mask_tolerance=self._mask_tolerance,
            requests_compared=self._requests,
            slices_compared=self._slices,
            slices_disagreeing=self._disagreeing,
            slices_with_mask=self._masks,
            slices_mask_differs=self._masks_differ,
            slices_pixels_differ=self._pixels_differ,
            slices_verdict_differs=self._verdicts_differ,
            dice_worst=self._dice_worst if self._dices else None,
            dice_mean=self._dice_sum / self._dices if self._dices else None,
            scans_compared=scans.compared,
            scans_not_compared=scans.not_compared,
            scans_verdict_differs=scans.verdict_differs,
            scans_run_differs=scans.run_differs,
            candidate_failures=self._failures,
            failure_messages=tuple(self._messages),
            live_failures=self.live_failures,
            skipped=self.skipped,
            to_candidate=self.to_candidate,
            live_latency=_latency(self._live_s),
            candidate_latency=_latency(self._candidate_s),
            worst=tuple(worst),
        )


def _latency(seconds: Sequence[float]) -> ShadowLatency | None:
    if not seconds:
        return None
    median, p99 = np.percentile(seconds, (50, 99)) * 1e3
    return ShadowLatency(float(median), float(p99))
