"""Chunks: the slices of a study that travel in one request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import MAX_BATCH
from groundglass.study import SliceSource

HU_BYTES = np.dtype(np.int16).itemsize

DecodeHu = Callable[[SliceSource], NDArray[np.int16]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Decoded slices of one study: ``hu`` int16 (n, rows, columns) in Hounsfield units, ``indices`` int32 (n,)."""

    indices: NDArray[np.int32]
    hu: NDArray[np.int16]


def plan_chunks(sources: Sequence[SliceSource], chunk_bytes: int) -> Iterator[tuple[SliceSource, ...]]:
    """Cut a study into runs of slices of one size, each at most ``chunk_bytes`` of pixels and one request's rows.

    A slice larger than ``chunk_bytes`` travels alone. A change of rows or columns starts a new chunk, since the rows
    of a request share one shape.
    """
    for (rows, columns), same_size in groupby(sources, key=lambda source: (source.rows, source.columns)):
        slices = tuple(same_size)
        step = max(1, min(MAX_BATCH, chunk_bytes // (rows * columns * HU_BYTES)))
        for start in range(0, len(slices), step):
            yield slices[start : start + step]
