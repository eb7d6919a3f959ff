"""The studies that the aggregator keeps: a bounded cache of folds.

Losing an entry costs a client some bytes, never a verdict: it sends the slice verdicts that it holds again.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import CAPACITY_PARAMETER, POSITIVE_RUN, PROBE_STUDY, RUN_PARAMETER, TTL_PARAMETER
from groundglass.errors import AggregationError, SettingError
from groundglass.finding import ScanFinding, ScanRows

VERDICTS: Final = ("negative", "positive")
REASONS: Final = ("idle", "capacity")
STATES: Final = ("incomplete", "complete")
"""What the table counts: scans completed, by verdict; studies dropped, by reason and by the state that they were in."""


@dataclass(frozen=True, slots=True)
class TableSettings:
    """The parameters of the model's config: the run that makes a scan positive, and the bounds of the table.

    A study idle for ``study_ttl_s`` seconds is forgotten. At most ``max_studies`` are kept: the one idle for longest
    goes.
    """

    positive_run_slices: int = POSITIVE_RUN
    study_ttl_s: float = 900.0
    max_studies: int = 1000

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> TableSettings:
        """Read config parameters; an absent one keeps its default. Raises SettingError naming an unusable one."""
        default = cls()
        return cls(
            int(_positive(parameters, RUN_PARAMETER, default.positive_run_slices, whole=True)),
            _positive(parameters, TTL_PARAMETER, default.study_ttl_s, whole=False),
            int(_positive(parameters, CAPACITY_PARAMETER, default.max_studies, whole=True)),
        )


@dataclass(frozen=True, slots=True)
class SliceRows:
    """The rows of one request, n slices of one or several studies: keys, indices, slice counts, verdicts (n,)."""

    studies: Sequence[bytes]
    indices: NDArray[np.integer[Any]]
    counts: NDArray[np.integer[Any]]
    positives: NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class _Entry:
    rows: ScanRows
    used_s: float = -math.inf

    @property
    def complete(self) -> bool:
        return self.rows.slices_seen == self.rows.slice_count


class StudyTable:
    """Folds requests into scan findings, and remembers the studies between requests.

    Not safe for threads: Triton calls one instance from one thread. ``clock`` returns seconds and never runs backwards.
    """

    def __init__(self, settings: TableSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the one idle for longest comes first
        self.open_studies = 0
        self.finished: Counter[str] = Counter()
        self.dropped: Counter[tuple[str, str]] = Counter()
        """Studies kept and incomplete; scans completed, by verdict; studies dropped, by (reason, state)."""

    def __len__(self) -> int:
        return len(self._entries)

    def answer(self, rows: SliceRows) -> list[ScanFinding]:
        """Take in the rows of one request, and tell each row the finding of its own study after all of them.

        All rows are taken or none: raises AggregationError when any contradicts its study; no study has changed then.
        """
        now = self._clock()
        self._forget_idle(now)
        groups = _by_study(rows.studies)
        entries = {study: self._check(study, rows, positions) for study, positions in groups.items()}
        findings = {}
        for study, positions in groups.items():
            findings[study] = self._take_in(study, entries[study], rows.indices[positions], rows.positives[positions])
            entries[study].used_s = now
        self._make_room()
        return [findings[study] for study in rows.studies]

    def _check(self, study: bytes, rows: SliceRows, positions: list[int]) -> _Entry:
        """The study's entry, or a new one, once the rows at ``positions`` are known to fit it. Changes nothing."""
        counts = np.unique(rows.counts[positions])
        if counts.size > 1:
            raise AggregationError(f"slice counts {counts[0]} and {counts[1]} given for one study in one request")
        entry = self._entries.get(study) or _Entry(ScanRows(int(counts[0])))
        if entry.rows.slice_count != counts[0]:
            raise AggregationError(f"slice count {counts[0]} given for a study of {entry.rows.slice_count} slices")
        entry.rows.check(rows.indices[positions], rows.positives[positions])
        return entry

    def _take_in(
        self, study: bytes, entry: _Entry, indices: NDArray[np.integer[Any]], positives: NDArray[np.bool_]
    ) -> ScanFinding:
        was_complete = entry.complete
        entry.rows.add(indices, positives)
        finding = entry.rows.finding(self._settings.positive_run_slices)
        if study == PROBE_STUDY:
            return finding
        if study not in self._entries:
            self._entries[study] = entry
            self.open_studies += 1
        self._entries.move_to_end(study)
        if entry.complete and not was_complete:
            self.open_studies -= 1
            self.finished[VERDICTS[finding.positive]] += 1
        return finding

    def _forget_idle(self, now: float) -> None:
        while self._entries and next(iter(self._entries.values())).used_s + self._settings.study_ttl_s <= now:
            self._drop_oldest("idle")

    def _make_room(self) -> None:
        while len(self._entries) > self._settings.max_studies:
            self._drop_oldest("capacity")

    def _drop_oldest(self, reason: str) -> None:
        _, entry = self._entries.popitem(last=False)
        self.open_studies -= not entry.complete
        self.dropped[reason, STATES[entry.complete]] += 1


def _by_study(studies: Sequence[bytes]) -> dict[bytes, list[int]]:
    """Positions of every study's rows."""
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    for position, study in enumerate(studies):
        groups[study].append(position)
    return groups


def _positive(parameters: Mapping[str, str], name: str, default: float, whole: bool) -> float:
    text = parameters.get(name, str(default))
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise SettingError(f"parameter {name} is {text!r}: a positive {'whole ' if whole else ''}number was expected")
    return value
