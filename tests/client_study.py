"""A study that exists only by description, and a decoder for it."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundglass.errors import UnreadableFile
from groundglass.study import Series, SliceSource, Study
from groundglass_client.session import SessionSettings

SIDE = 16
QUICK = SessionSettings(chunk_bytes=4 * SIDE * SIDE * 2, window=3, connect_timeout_s=0.3, recovery_s=5.0)


def study_of(slice_count: int, side: int = SIDE) -> Study:
    """A study that exists only by description."""
    slices = tuple(
        SliceSource(index, Path(f"{index}.dcm"), f"{index}.dcm", 0, side, side, -2.0 * index)
        for index in range(slice_count)
    )
    series = Series("CT", None, 1, slice_count, side, side, None, (0.7, 0.7), 2.0, 0.0)
    return Study(Path("study"), series, slices)


class Decoder:
    """Gives slices that are positive where asked, and fails where told to."""

    def __init__(self, positives: list[bool], bad: frozenset[int] = frozenset()) -> None:
        self.positives, self.bad = positives, bad

    def __call__(self, source: SliceSource) -> NDArray[np.int16]:
        if source.index in self.bad:
            raise UnreadableFile(f"{source.file}: truncated")
        return np.full((SIDE, SIDE), 40 if self.positives[source.index] else -1000, np.int16)
