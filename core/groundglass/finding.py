"""The scan verdict: a pure fold over slice verdicts, the same in any order, any chunking and after any repetition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import POSITIVE_RUN
from groundglass.errors import AggregationError


@dataclass(frozen=True, slots=True)
class ScanFinding:
    """What is known of a scan from the slices seen so far.

    ``longest_run`` is the largest number of consecutive positive slices; ``complete`` is true once all ``slice_count``
    slices were seen; ``positive`` is ``longest_run >= positive_run`` and can only turn from false to true as slices
    arrive.
    """

    slice_count: int
    slices_seen: int
    longest_run: int
    positive: bool

    @property
    def complete(self) -> bool:
        """Whether every slice of the scan was seen."""
        return self.slices_seen == self.slice_count


def longest_run_span(positives: NDArray[np.bool_]) -> tuple[int, int]:
    """Start and end (exclusive) of the longest stretch of True in bool (n,), the first of equals; (0, 0) if none."""
    edges = np.flatnonzero(np.diff(positives, prepend=False, append=False))  # starts and ends take turns
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    longest = int(np.argmax(ends - starts))
    return int(starts[longest]), int(ends[longest])


def longest_run(positives: NDArray[np.bool_]) -> int:
    """Length of the longest stretch of True in a bool array (n,)."""
    start, end = longest_run_span(positives)
    return end - start


@dataclass(slots=True)
class ScanRows:
    """The slice verdicts of one scan, gathered row by row.

    It is a set: rows may come in any order and more than once. A row that contradicts what is known raises, and leaves
    everything as it was.
    """

    slice_count: int
    verdicts: dict[int, bool] = field(default_factory=dict)

    def check(self, rows: Mapping[int, bool], slice_count: int) -> None:
        """Raise AggregationError if ``rows`` can't be of this scan."""
        if slice_count != self.slice_count:
            raise AggregationError(f"slice count {slice_count} given for a scan of {self.slice_count} slices")
        for index, positive in rows.items():
            if not 0 <= index < slice_count:
                raise AggregationError(f"slice index {index} given for a scan of {slice_count} slices, counted from 0")
            if self.verdicts.get(index, positive) != positive:
                raise AggregationError(
                    f"slice {index} was {_word(not positive)} and is now {_word(positive)}: two model versions "
                    "answered; send the study again under a new key"
                )

    def add(self, rows: Mapping[int, bool]) -> None:
        """Take in rows that :meth:`check` accepted."""
        self.verdicts.update(rows)

    def finding(self, positive_run: int = POSITIVE_RUN) -> ScanFinding:
        """The verdict over the rows seen so far."""
        positives = np.zeros(self.slice_count, dtype=np.bool_)
        positives[[index for index, positive in self.verdicts.items() if positive]] = True
        run = longest_run(positives)
        return ScanFinding(self.slice_count, len(self.verdicts), run, run >= positive_run)


def gather(rows: Iterable[tuple[int, bool]]) -> dict[int, bool]:
    """Rows as a mapping; raises AggregationError when one index carries both verdicts."""
    gathered: dict[int, bool] = {}
    for index, positive in rows:
        if gathered.setdefault(index, positive) != positive:
            raise AggregationError(f"slice {index} came twice in one request, positive and negative")
    return gathered


def fold(rows: Iterable[tuple[int, bool]], slice_count: int, positive_run: int = POSITIVE_RUN) -> ScanFinding:
    """The verdict over (slice index, slice positive) rows of one scan of ``slice_count`` slices.

    The order of rows and their repetition do not matter. Raises AggregationError for an index outside the scan, for a
    slice with two verdicts, and for a scan without slices.
    """
    if slice_count < 1:
        raise AggregationError(f"slice count {slice_count}: a scan has at least one slice")
    scan = ScanRows(slice_count)
    gathered = gather(rows)
    scan.check(gathered, slice_count)
    scan.add(gathered)
    return scan.finding(positive_run)


def _word(positive: bool) -> str:
    return "positive" if positive else "negative"
