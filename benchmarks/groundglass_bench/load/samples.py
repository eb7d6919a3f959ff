"""Samples: what became of every study, unrounded, and the file that holds them."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from groundglass.publish import published


@dataclass(frozen=True, slots=True)
class Sample:
    """One study.

    intended_s: when it was to start, in seconds since the epoch: an open loop's arrival.
    started_s: when it started; later than intended when the generator itself was late.
    seconds: from the intended start to the report, or to the failure.
    slices: of the study.
    error: one line, or None when the right report came.
    answers: (seconds since the epoch, slices) of each request's answer.
    sent: False for an arrival that the generator refused since too many studies were in flight.
    """

    intended_s: float
    started_s: float
    seconds: float
    slices: int
    error: str | None = None
    answers: tuple[tuple[float, int], ...] = ()
    sent: bool = True

    @property
    def ok(self) -> bool:
        """Whether the right report came."""
        return self.error is None

    @property
    def ended_s(self) -> float:
        """When the report or the failure came, in seconds since the epoch."""
        return self.intended_s + self.seconds


@dataclass(slots=True)
class Record:
    """The samples of one process, which sent from ``started_s`` to ``stopped_s`` (seconds since the epoch)."""

    started_s: float
    stopped_s: float
    samples: list[Sample] = field(default_factory=list)


class Clock:
    """Seconds since the epoch that never jump, so that differences are durations."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def now_s(self) -> float:
        """Seconds since the epoch."""
        return time.monotonic() + self._offset_s


def write_record(record: Record, path: Path) -> None:
    """Write as JSON; nothing half-written is seen under ``path``."""
    with published(path) as beside:
        beside.write_text(json.dumps(asdict(record)))


def read_record(path: Path) -> Record:
    """The inverse of :func:`write_record`."""
    found = json.loads(path.read_text())
    samples = [
        Sample(**{**sample, "answers": tuple((at_s, slices) for at_s, slices in sample["answers"])})
        for sample in found.pop("samples")
    ]
    return Record(**found, samples=samples)
