"""The report of shadow traffic: how often two versions disagreed, in values that hold no study's key, name or UID."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from groundglass_client.shadow_slices import SliceDifference


@dataclass(frozen=True, slots=True)
class ShadowLatency:
    """Milliseconds from a request to its answer, over the latest requests that both versions answered."""

    median_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What shadow traffic found so far.

    requests_compared, slices_compared: what both versions answered.
    slices_disagreeing: slices with another verdict, or with more than ``mask_tolerance`` differing pixels.
    slices_with_mask, slices_mask_differs: slices whose live mask was asked for, and those where any pixel differs.
    slices_pixels_differ, slices_verdict_differs: slices with another count of lesion pixels, with another verdict.
    dice_worst, dice_mean: over slices where either mask has a pixel; None when there were none.
    scans_compared: scans that both versions have seen whole; scans_not_compared: those that were dropped, or ended,
    before (a chunk that was skipped, failed, or repeated under another key; the scan still runs).
    candidate_failures: copies that the candidate did not answer; ``failure_messages`` are the first kinds of them.
    live_failures: requests that the live version did not answer, which compare nothing.
    skipped: requests without a copy, because too many were on their way or they asked for no slice verdicts.
    to_candidate: requests that were for the candidate anyway.
    live_latency, candidate_latency: of the same requests; None when there were none. The candidate is asked second, by
    a server that is at work on the live request, if one server serves both: it is no benchmark.
    worst: the disagreeing slices that are kept as pictures, the worst first.
    """

    candidate_version: str
    live_versions: tuple[str, ...]
    mask_tolerance: int
    requests_compared: int
    slices_compared: int
    slices_disagreeing: int
    slices_with_mask: int
    slices_mask_differs: int
    slices_pixels_differ: int
    slices_verdict_differs: int
    dice_worst: float | None
    dice_mean: float | None
    scans_compared: int
    scans_not_compared: int
    scans_verdict_differs: int
    scans_run_differs: int
    candidate_failures: int
    failure_messages: tuple[str, ...]
    live_failures: int
    skipped: int
    to_candidate: int
    live_latency: ShadowLatency | None
    candidate_latency: ShadowLatency | None
    worst: tuple[SliceDifference, ...]

    @property
    def agrees(self) -> bool:
        """Whether something was compared, nothing disagreed, and the candidate answered every copy."""
        return not self.complaints

    @property
    def complaints(self) -> tuple[str, ...]:
        """Why it does not agree, with the counts; empty when it does."""
        found = (
            (not self.slices_compared, "nothing was compared"),
            (self.slices_disagreeing, f"{self.slices_disagreeing} of {self.slices_compared} slices disagree"),
            (self.slices_verdict_differs, f"{self.slices_verdict_differs} slices have another verdict"),
            (
                self.scans_verdict_differs,
                f"{self.scans_verdict_differs} of {self.scans_compared} scans another verdict",
            ),
            (self.scans_run_differs, f"{self.scans_run_differs} of {self.scans_compared} scans another longest run"),
            (self.candidate_failures, f"{self.candidate_failures} requests failed"),
        )
        return tuple(words for count, words in found if count)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"agrees": self.agrees, **asdict(self)}

    def as_text(self) -> str:
        """The report as a table for a terminal."""
        live = " and ".join(self.live_versions) or "unknown"
        rows = [*self._counts(), *self._latencies()]
        width = max(len(name) for name, _ in rows)
        lines = [f"candidate version {self.candidate_version} beside live version {live}"]
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
        lines += [f"  failure: {message}" for message in self.failure_messages]
        lines.append("agrees" if self.agrees else f"does not agree: {'; '.join(self.complaints)}")
        return "\n".join(lines)

    def _counts(self) -> Iterator[tuple[str, str]]:
        tolerated = f" (more than {self.mask_tolerance} pixels)" if self.mask_tolerance else ""
        yield "slices compared", str(self.slices_compared)
        yield "  that disagree", f"{self.slices_disagreeing}{tolerated}"
        yield "  with another verdict", str(self.slices_verdict_differs)
        yield "  with another lesion area", str(self.slices_pixels_differ)
        yield "  with another mask", f"{self.slices_mask_differs} of {self.slices_with_mask} masks"
        yield "dice, worst / mean", f"{_dice(self.dice_worst)} / {_dice(self.dice_mean)}"
        yield "scans compared", f"{self.scans_compared}, {self.scans_not_compared} not"
        yield "  with another verdict", str(self.scans_verdict_differs)
        yield "  with another longest run", str(self.scans_run_differs)
        yield "requests compared", str(self.requests_compared)
        yield "  skipped", str(self.skipped)
        yield "  failed, candidate / live", f"{self.candidate_failures} / {self.live_failures}"
        if self.to_candidate:
            yield "  for the candidate anyway", str(self.to_candidate)

    def _latencies(self) -> Iterator[tuple[str, str]]:
        for name, latency in (("live", self.live_latency), ("candidate", self.candidate_latency)):
            if latency is not None:
                yield f"{name} latency, median / p99", f"{latency.median_ms:.1f} / {latency.p99_ms:.1f} ms"


def _dice(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
