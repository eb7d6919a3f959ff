"""The worst slices of shadow traffic: few are kept, with their pixels, to be looked at."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundglass_client.shadow_slices import SliceDifference


@dataclass(frozen=True, slots=True)
class WorstSlice:
    """One slice with what both versions marked in it: ``hu`` int16 (rows, columns), Hounsfield units, and masks uint8
    (512, 64), bit-packed. A mask is None when it was not asked for, as callers of the live version may do.
    """

    difference: SliceDifference
    live_version: str
    candidate_version: str
    hu: NDArray[np.int16]
    live_mask: NDArray[np.uint8] | None
    candidate_mask: NDArray[np.uint8] | None

    def same_as(self, other: WorstSlice) -> bool:
        """Whether it is the same slice again: a study that is replayed would fill all places with its worst one."""
        return self.difference == other.difference and np.array_equal(self.hu, other.hu)


class WorstSlices:
    """At most ``most`` slices, the worst first. Not for several threads at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[WorstSlice] = []

    @property
    def slices(self) -> tuple[WorstSlice, ...]:
        """The kept ones, the worst first."""
        return tuple(self._kept)

    def offer(self, difference: SliceDifference, keep: Callable[[], WorstSlice]) -> None:
        """Keep the slice if it is among the worst; only then is ``keep`` called, which copies its pixels."""
        if not self._most or (
            len(self._kept) == self._most and difference.gravity <= self._kept[-1].difference.gravity
        ):
            return
        slice_ = keep()
        if any(kept.same_as(slice_) for kept in self._kept):
            return
        insort(self._kept, slice_, key=_from_worst)
        del self._kept[self._most :]


def _from_worst(slice_: WorstSlice) -> tuple[bool, int, int]:
    differs, pixels, index = slice_.difference.gravity
    return not differs, -pixels, -index
