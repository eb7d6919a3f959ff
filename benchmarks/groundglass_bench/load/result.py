"""What a load found: exact latencies, throughput, failures with their reasons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundglass.errors import GroundglassError
from groundglass_bench.load.samples import Record, Sample
from groundglass_bench.load.settings import Load


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The studies of a load, the warm-up's included, and the window that is measured: seconds since the epoch."""

    load: Load
    server: str
    recorded: tuple[Sample, ...]
    window: tuple[float, float]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The studies whose intended start lies in the window, in that order. Their ends may lie behind it."""
        start_s, end_s = self.window
        return tuple(sample for sample in self.recorded if start_s <= sample.intended_s < end_s)

    @property
    def duration_s(self) -> float:
        """Length of the window."""
        return self.window[1] - self.window[0]

    def latency_s(self, percent: float) -> float:
        """The latency that so many percent of the answered studies did not exceed; NaN when none was answered.

        It is one of the measured latencies (an order statistic), never a value between two or a rounded one.
        """
        seconds = [sample.seconds for sample in self.samples if sample.ok]
        return float(np.percentile(seconds, percent, method="inverted_cdf")) if seconds else math.nan

    @property
    def failures(self) -> dict[str, int]:
        """Number of failed studies by reason, the most frequent first."""
        return dict(Counter(sample.error for sample in self.samples if sample.error is not None).most_common())

    @property
    def offered_studies_per_s(self) -> float:
        """Studies that were to start in the window, a second."""
        return len(self.samples) / self.duration_s

    @property
    def studies_per_s(self) -> float:
        """Studies whose right report came in the window, a second, wherever they began."""
        return sum(sample.ok and self._inside(sample.ended_s) for sample in self.recorded) / self.duration_s

    @property
    def slices_per_s(self) -> float:
        """Slices that were answered in the window, a second, of the studies that got their right report.

        Studies that only half lie in the window count with what lies in it.
        """
        answers = (answer for sample in self.recorded if sample.ok for answer in sample.answers)
        return sum(slices for at_s, slices in answers if self._inside(at_s)) / self.duration_s

    @property
    def most_in_flight(self) -> int:
        """The largest number of studies that were sent and not answered at one moment of the window."""
        sent = [sample for sample in self.recorded if sample.sent]
        steps = [(sample.started_s, 1) for sample in sent] + [(sample.ended_s, -1) for sample in sent]
        now = most = 0
        for at_s, step in sorted(steps):
            now += step
            most = max(most, now) if self._inside(at_s) else most
        return most

    @property
    def generator_delay_s(self) -> float:
        """The longest time that the generator itself was late: a large part of a latency means that it is too slow."""
        return max((sample.started_s - sample.intended_s for sample in self.samples), default=0.0)

    def summary(self) -> dict[str, Any]:
        """The figures as JSON takes them; a latency is None when no study was answered."""
        latencies = {f"p{percent}": self.latency_s(percent) for percent in (50, 90, 99)} | {"max": self.latency_s(100)}
        return {
            "studies": len(self.samples),
            "failed": sum(self.failures.values()),
            "failures": self.failures,
            "latency_s": {name: None if math.isnan(value) else value for name, value in latencies.items()},
            "offered_studies_per_s": self.offered_studies_per_s,
            "studies_per_s": self.studies_per_s,
            "slices_per_s": self.slices_per_s,
            "most_in_flight": self.most_in_flight,
            "generator_delay_s": self.generator_delay_s,
            "duration_s": self.duration_s,
        }

    def _inside(self, at_s: float) -> bool:
        return self.window[0] <= at_s < self.window[1]


def combine(load: Load, server: str, records: Sequence[Record]) -> LoadResult:
    """The result of what one or several processes sent at the same time.

    The measured window is the part of it during which all of them sent. Raises GroundglassError when there is none.
    """
    start_s = max(record.started_s for record in records) + load.warm_up_s
    end_s = min(start_s + load.duration_s, *(record.stopped_s for record in records))
    if end_s <= start_s:
        raise GroundglassError("the load generator ended before the warm-up did: nothing was measured")
    samples = sorted((sample for record in records for sample in record.samples), key=lambda one: one.intended_s)
    return LoadResult(load, server, tuple(samples), (start_s, end_s))
