"""The scan verdict is a pure fold: order, chunking and repetition don't matter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundglass.contract import POSITIVE_RUN
from groundglass.errors import AggregationError
from groundglass.finding import fold, longest_run, longest_run_span

verdicts = st.lists(st.booleans(), min_size=1, max_size=80)


def counted_run(positives: list[bool]) -> int:
    """The plain oracle: count along the scan."""
    longest = current = 0
    for positive in positives:
        current = current + 1 if positive else 0
        longest = max(longest, current)
    return longest


@given(verdicts)
def test_longest_run_counts_along_the_scan(positives: list[bool]) -> None:
    """The longest run is what counting along the scan gives."""
    assert longest_run(np.array(positives)) == counted_run(positives)


@given(verdicts)
def test_span_of_the_longest_run_is_all_positive(positives: list[bool]) -> None:
    """The span of the longest run holds positive slices only, and can't be extended."""
    start, end = longest_run_span(np.array(positives))
    assert all(positives[start:end])
    assert end == start or not any(positives[max(start - 1, 0) : start] + positives[end : end + 1])


@given(verdicts, st.data())
def test_order_and_repetition_do_not_matter(positives: list[bool], data: st.DataObject) -> None:
    """Shuffled rows, some of them repeated, give the finding of the rows in order."""
    rows = list(enumerate(positives))
    again = data.draw(st.lists(st.sampled_from(rows)))
    shuffled = data.draw(st.permutations(rows + again))
    finding = fold(shuffled, len(positives))
    assert finding == fold(rows, len(positives))
    assert finding.complete
    assert finding.longest_run == counted_run(positives)
    assert finding.positive == (counted_run(positives) >= POSITIVE_RUN)


@pytest.mark.parametrize(("run", "positive"), [(POSITIVE_RUN - 1, False), (POSITIVE_RUN, True)])
def test_fifteen_consecutive_slices_make_a_scan_positive(run: int, positive: bool) -> None:
    """A scan turns positive at the fifteenth consecutive positive slice, not before."""
    rows = [(index, 3 <= index < 3 + run) for index in range(40)]
    assert fold(rows, 40).positive is positive


def test_missing_slices_leave_the_scan_incomplete() -> None:
    """A scan that lacks slices is incomplete, and a missing slice interrupts a run."""
    finding = fold([(0, True), (1, True), (3, True)], 4)
    assert (finding.slices_seen, finding.longest_run, finding.complete) == (3, 2, False)


@pytest.mark.parametrize(
    ("rows", "slice_count"),
    [([(4, True)], 4), ([(-1, True)], 4), ([], 0), ([(2, True), (2, False)], 4)],
    ids=["index beyond the scan", "negative index", "no slices", "two verdicts"],
)
def test_rows_that_contradict_the_scan_are_refused(rows: list[tuple[int, bool]], slice_count: int) -> None:
    """Rows outside the scan, and one slice with two verdicts, are errors."""
    with pytest.raises(AggregationError):
        fold(rows, slice_count)
