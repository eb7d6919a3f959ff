"""The scan verdict: a pure fold over slice verdicts, the same in any order, any chunking and after any repetition."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import MAX_SCAN_SLICES, POSITIVE_RUN
from groundglass.errors import AggregationError

_UNSEEN: Final = 0
_NEGATIVE: Final = 1
_POSITIVE: Final = 2


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


@dataclass(slots=True, eq=False)
class ScanRows:
    """The slice verdicts of one scan, gathered chunk by chunk; a byte a slice.

    It is a set: rows may come in any order and more than once. Rows that contradict what is known, or each other, raise
    and leave everything as it was. Raises AggregationError for a slice count that no scan has.
    """

    slice_count: int
    slices_seen: int = field(init=False, default=0)
    _verdicts: NDArray[np.int8] = field(init=False, repr=False)  # (slice_count,)

    def __post_init__(self) -> None:
        if not 1 <= self.slice_count <= MAX_SCAN_SLICES:
            raise AggregationError(f"slice count {self.slice_count}: a scan has 1 to {MAX_SCAN_SLICES} slices")
        self._verdicts = np.full(self.slice_count, _UNSEEN, dtype=np.int8)

    def check(self, indices: NDArray[np.integer[Any]], positives: NDArray[np.bool_]) -> None:
        """Raise AggregationError if these rows can't be of this scan: ``indices`` (n,) from 0, ``positives`` (n,)."""
        outside = (indices < 0) | (indices >= self.slice_count)
        if outside.any():
            raise AggregationError(
                f"slice index {indices[outside][0]} given for a scan of {self.slice_count} slices, counted from 0"
            )
        known = self._verdicts[indices]
        changed = (known != _UNSEEN) & (known != _code(positives))
        if changed.any():
            first = int(np.flatnonzero(changed)[0])
            raise AggregationError(
                f"slice {indices[first]} was {_word(not positives[first])} and is now {_word(positives[first])}: two "
                "model versions answered; send the study again under a new key"
            )
        both = np.intersect1d(indices[positives], indices[~positives])
        if both.size:
            raise AggregationError(f"slice {both[0]} came twice in one request, positive and negative")

    def add(self, indices: NDArray[np.integer[Any]], positives: NDArray[np.bool_]) -> None:
        """Take in rows that :meth:`check` accepted."""
        self.slices_seen += len(np.unique(indices[self._verdicts[indices] == _UNSEEN]))
        self._verdicts[indices] = _code(positives)

    def finding(self, positive_run: int = POSITIVE_RUN) -> ScanFinding:
        """The verdict over the rows seen so far."""
        run = longest_run(self._verdicts == _POSITIVE)
        return ScanFinding(self.slice_count, self.slices_seen, run, run >= positive_run)


def fold(rows: Iterable[tuple[int, bool]], slice_count: int, positive_run: int = POSITIVE_RUN) -> ScanFinding:
    """The verdict over (slice index, slice positive) rows of one scan of ``slice_count`` slices.

    The order of rows and their repetition do not matter. Raises AggregationError for an index outside the scan, for a
    slice with two verdicts, and for a slice count that no scan has.
    """
    scan = ScanRows(slice_count)
    pairs = list(rows)
    indices = np.array([index for index, _ in pairs], dtype=np.int64)
    positives = np.array([positive for _, positive in pairs], dtype=np.bool_)
    scan.check(indices, positives)
    scan.add(indices, positives)
    return scan.finding(positive_run)


def _code(positives: NDArray[np.bool_]) -> NDArray[np.int8]:
    return np.where(positives, np.int8(_POSITIVE), np.int8(_NEGATIVE))


def _word(positive: bool | np.bool_) -> str:
    return "positive" if positive else "negative"
