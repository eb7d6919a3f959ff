"""The study table answers as the fold does, whatever the traffic, within its bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundglass.contract import MAX_SCAN_SLICES, PROBE_STUDY
from groundglass.errors import AggregationError, SettingError
from groundglass.finding import ScanFinding, fold
from groundglass_ensemble.study_table import SliceRows, StudyTable, TableSettings

Row = tuple[bytes, int, int, bool]
"""Study, slice index, slice count, slice verdict."""

scans = st.dictionaries(
    st.sampled_from([b"a", b"b", b"c"]), st.lists(st.booleans(), min_size=1, max_size=40), min_size=1
)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def request(*rows: Row) -> SliceRows:
    """Rows as one request."""
    studies, indices, counts, positives = zip(*rows, strict=True)
    return SliceRows(list(studies), np.array(indices), np.array(counts), np.array(positives))


def rows_of(study: bytes, positives: list[bool]) -> list[Row]:
    """All rows of a scan, in order."""
    return [(study, index, len(positives), positive) for index, positive in enumerate(positives)]


def table(positive_run: int = 3, ttl_s: float = 10, capacity: int = 100, clock: Clock | None = None) -> StudyTable:
    """A table with small bounds."""
    return StudyTable(TableSettings(positive_run, ttl_s, capacity), clock or Clock())


@given(scans, st.data())
def test_any_traffic_gives_the_fold(scans: dict[bytes, list[bool]], data: st.DataObject) -> None:
    """Rows in any order, chunking, repetition and interleaving give each scan the verdict of the plain fold."""
    rows = [row for study, positives in scans.items() for row in rows_of(study, positives)]
    traffic = data.draw(st.permutations(rows + data.draw(st.lists(st.sampled_from(rows), max_size=20))))
    kept = table()
    seen: dict[bytes, list[tuple[int, bool]]] = {study: [] for study in scans}
    while traffic:
        size = data.draw(st.integers(1, 16))
        chunk, traffic = traffic[:size], traffic[size:]
        for study, index, _, positive in chunk:
            seen[study].append((index, positive))
        answers = kept.answer(request(*chunk))
        assert answers == [fold(seen[study], len(scans[study]), 3) for study, *_ in chunk]
    assert kept.open_studies == 0
    assert kept.finished.total() == len(scans)


@pytest.mark.parametrize(
    "bad",
    [
        (b"a", 4, 4, True),
        (b"a", -1, 4, True),
        (b"a", 0, 5, True),
        (b"a", 0, 4, False),
        (b"new", 0, 0, True),
        (b"new", 0, MAX_SCAN_SLICES + 1, True),
        (b"b", 0, 3, False),
    ],
    ids=["index beyond", "index below", "count", "verdict", "no slices", "too many slices", "verdict in the request"],
)
def test_one_bad_row_changes_nothing(bad: Row) -> None:
    """A request with one contradicting row is refused whole, and later answers are as if it had not come."""
    kept = table()
    kept.answer(request((b"a", 0, 4, True)))
    with pytest.raises(AggregationError):
        kept.answer(request((b"a", 1, 4, True), (b"b", 0, 3, True), bad))
    assert len(kept) == 1
    assert kept.answer(request((b"a", 2, 4, True))) == [ScanFinding(4, 2, 1, False)]
    assert kept.answer(request((b"b", 0, 3, False))) == [ScanFinding(3, 1, 0, False)]


def test_a_probe_is_folded_alone_and_kept_nowhere() -> None:
    """The empty study key answers for its own request only, leaves no entry, and counts as no scan."""
    kept = table()
    for _ in range(2):
        assert kept.answer(request((PROBE_STUDY, 0, 2, True))) == [ScanFinding(2, 1, 1, False)]
    kept.answer(request((PROBE_STUDY, 0, 1, True)))
    assert (len(kept), kept.open_studies, kept.finished.total()) == (0, 0, 0)


def test_an_idle_study_is_forgotten() -> None:
    """A study idle for the whole time to live starts anew; one that was used in time is kept."""
    clock = Clock()
    kept = table(ttl_s=10, clock=clock)
    kept.answer(request((b"idle", 0, 3, True), (b"used", 0, 3, True)))
    clock.now_s = 9
    kept.answer(request((b"used", 1, 3, True)))
    clock.now_s = 10
    assert kept.answer(request((b"used", 2, 3, True)))[0].slices_seen == 3
    assert kept.answer(request((b"idle", 1, 3, True)))[0].slices_seen == 1
    assert kept.dropped == {("idle", "incomplete"): 1}


@given(st.integers(1, 5), st.lists(st.integers(0, 9), max_size=60))
def test_the_number_of_studies_is_bounded(capacity: int, traffic: list[int]) -> None:
    """At most ``max_studies`` are kept, and the one idle for longest goes first."""
    kept = table(capacity=capacity)
    recent: list[int] = []  # the most recent last
    slices: dict[int, int] = {}
    for step, study in enumerate(traffic):
        slices[study] = slices[study] + 1 if study in recent[-capacity:] else 1
        recent = [other for other in recent if other != study] + [study]
        answer = kept.answer(request((b"%d" % study, step, 100, True)))[0]
        assert answer.slices_seen == slices[study]
        assert len(kept) == kept.open_studies == min(len(recent), capacity)


def test_a_request_may_hold_more_studies_than_the_table() -> None:
    """Every row is answered even when its study can't be kept."""
    kept = table(capacity=2)
    answers = kept.answer(request(*((b"%d" % study, 0, 1, True) for study in range(5))))
    assert [answer.complete for answer in answers] == [True] * 5
    assert len(kept) == 2
    assert kept.dropped == {("capacity", "complete"): 3}


def test_a_scan_is_counted_once() -> None:
    """Repeated rows of a complete scan don't count it again."""
    kept = table()
    for _ in range(3):
        kept.answer(request(*rows_of(b"a", [True] * 3)))
    assert kept.finished == {"positive": 1}


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1.5", "inf", "nan"])
@pytest.mark.parametrize("name", ["positive_run_slices", "max_studies"])
def test_an_unusable_parameter_is_named(name: str, text: str) -> None:
    """A parameter that is no positive whole number is an error that names it."""
    with pytest.raises(SettingError, match=name):
        TableSettings.from_parameters({name: text})


def test_parameters_replace_the_defaults() -> None:
    """Given parameters are taken, absent ones keep their default."""
    settings = TableSettings.from_parameters({"study_ttl_s": "0.5", "max_studies": "7"})
    assert settings == TableSettings(study_ttl_s=0.5, max_studies=7)
