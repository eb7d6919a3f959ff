"""Chunks cut a study without losing, repeating or mixing anything."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from groundglass.contract import MAX_BATCH
from groundglass.study import SliceSource
from groundglass_client.chunk import plan_chunks

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
