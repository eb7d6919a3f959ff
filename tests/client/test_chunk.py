"""Chunks cut a study without losing, repeating or mixing anything."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundglass.contract import MAX_BATCH
from groundglass.errors import UnreadableFile
from groundglass.study import SliceSource
from groundglass_client.chunk import decode_chunk, plan_chunks

sizes = st.lists(st.sampled_from([(512, 512), (256, 256), (512, 400), (2048, 2048)]), min_size=1, max_size=150)


def source(index: int, rows: int = 4, columns: int = 4) -> SliceSource:
    """A slice that exists only by description."""
    return SliceSource(index, Path(f"{index}.dcm"), f"{index}.dcm", 0, rows, columns, float(-index))


@given(sizes, st.integers(1, 1 << 24))
def test_chunks_hold_every_slice_once_and_in_order(shapes: list[tuple[int, int]], chunk_bytes: int) -> None:
    """Whatever the sizes, the chunks put together are the study; each is of one shape and within its bounds."""
    study = [source(index, *shape) for index, shape in enumerate(shapes)]
    chunks = list(plan_chunks(study, chunk_bytes))
    assert [item for chunk in chunks for item in chunk] == study
    for chunk in chunks:
        assert len({(item.rows, item.columns) for item in chunk}) == 1
        assert len(chunk) <= MAX_BATCH
        assert len(chunk) == 1 or sum(2 * item.rows * item.columns for item in chunk) <= chunk_bytes


def test_a_bad_slice_leaves_its_chunk_to_the_others() -> None:
    """A slice that can't be decoded goes to the callback, and the chunk holds the rest with their own indices."""
    bad: list[int] = []

    def decode(item: SliceSource) -> np.ndarray:
        if item.index == 1:
            raise UnreadableFile("1.dcm: truncated")
        return np.full((4, 4), item.index, np.int16)

    chunk = decode_chunk([source(0), source(1), source(2)], decode, lambda item, error: bad.append(item.index))
    assert bad == [1]
    assert chunk.indices.tolist() == [0, 2]
    assert chunk.hu[:, 0, 0].tolist() == [0, 2]


def test_a_bad_slice_stops_the_chunk_when_the_callback_raises() -> None:
    """Without leave to skip, the first bad slice is the chunk's error."""

    def refuse(item: SliceSource, error: Exception) -> None:
        raise error

    def decode(item: SliceSource) -> np.ndarray:
        raise UnreadableFile("0.dcm: truncated")

    with pytest.raises(UnreadableFile, match=r"0\.dcm"):
        decode_chunk([source(0)], decode, refuse)
