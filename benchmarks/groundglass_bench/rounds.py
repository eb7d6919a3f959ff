"""Repeated timings of several things in turn, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from groundglass.contract import MAX_BATCH
from groundglass.errors import SettingError

_SHORTEST_S = 1e-6


class Clock(Protocol):
    """Tells how long work takes."""

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Do ``work`` so often, one after the other. Returns the seconds of all of it."""


class HostClock:
    """For work that is done when its call returns."""

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """See :class:`Clock`."""
        start = time.perf_counter()
        for _ in range(times):
            work()
        return time.perf_counter() - start


class CudaClock:
    """For work that is put on a stream of the GPU: CUDA events around it, so that Python's own time is seen only where
    it keeps the GPU waiting.
    """

    def __init__(self, stream: Any) -> None:
        import torch

        self._cuda = torch.cuda
        self._stream = stream

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """See :class:`Clock`."""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(self._stream)
        for _ in range(times):
            work()
        end.record(self._stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Slices a second over the repetitions; ``spread`` is from the smallest to the largest, in shares of the median."""

    median: float
    smallest: float
    largest: float
    repetitions: int
    runs_each: int

    @property
    def spread(self) -> float:
        """0 where every repetition took the same time."""
        return (self.largest - self.smallest) / self.median


@dataclass(frozen=True, slots=True)
class Rounds:
    """What is measured: batch sizes, rounds, and the seconds that a repetition lasts at least.

    Raises SettingError for values that make no measurement.
    """

    batches: tuple[int, ...]
    repetitions: int = 5
    min_seconds: float = 1.0

    def __post_init__(self) -> None:
        for size in self.batches:
            if not 1 <= size <= MAX_BATCH:
                raise SettingError(f"--batch {size}: expected 1 to {MAX_BATCH}")
        if self.repetitions < 1:
            raise SettingError(f"--repetitions {self.repetitions}: expected at least 1")
        if self.min_seconds < 0:
            raise SettingError(f"--min-seconds {self.min_seconds:g}: expected 0 or more")


def measure(works: Mapping[str, Callable[[], object]], batch: int, rounds: Rounds, clock: Clock) -> dict[str, Rate]:
    """Rates of all ``works``, each a run of one batch: warm-up, then rounds of A, B, C, A, B, C.

    A repetition runs a work as often as fills ``min_seconds``, judged by the second run of its warm-up.
    """
    times = {}
    for name, work in works.items():
        clock.seconds(work, 1)  # allocates, compiles, captures
        times[name] = max(1, round(rounds.min_seconds / max(clock.seconds(work, 1), _SHORTEST_S)))
        if times[name] > 1:
            clock.seconds(work, times[name])  # brings the device to the clock rate that it keeps under load
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds.repetitions):
        for name, work in works.items():
            rates[name].append(batch * times[name] / clock.seconds(work, times[name]))
    return {
        name: Rate(statistics.median(found), min(found), max(found), len(found), times[name])
        for name, found in rates.items()
    }
