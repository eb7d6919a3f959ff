"""Frames -> series: which frames belong together, and which series is the one to analyse."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from groundglass.errors import NoSeries
from groundglass.study import Series
from groundglass_client.intake.geometry import slice_normal, tilt_degrees
from groundglass_client.intake.pictures import natural_key
from groundglass_client.intake.slices import Frame

MAX_AXIAL_TILT_DEGREES: Final = 45.0
"""A series is axial if its slice normal is nearer to the patient's long axis. Tilted gantries reach 30 degrees."""


@dataclass(frozen=True, slots=True)
class FrameSeries:
    """Frames of one series UID, or pictures of one folder. Localizers are a series of their own."""

    frames: tuple[Frame, ...]

    @property
    def first(self) -> Frame:
        """The frame that speaks for the series in descriptions."""
        return self.frames[0]

    @property
    def axial(self) -> bool:
        """Whether its slices lie across the patient; without an orientation they are believed to."""
        if self.first.localizer:
            return False
        orientations = Counter(frame.orientation for frame in self.frames)
        ((orientation, _),) = orientations.most_common(1)
        normal = slice_normal(next(frame for frame in self.frames if frame.orientation == orientation))
        return normal is None or tilt_degrees(normal) <= MAX_AXIAL_TILT_DEGREES

    @property
    def label(self) -> str:
        """Its number, size and a file of it, for messages. Not its UID, by which a patient can be found."""
        number = "" if self.first.series_number is None else f" number {self.first.series_number}"
        return f"series{number} of {len(self.frames)} slices ({self.first.file.name} is one)"

    def is_called(self, name: str) -> bool:
        """Whether a person who says ``name`` means this series."""
        return name in (self.first.series_uid, str(self.first.series_number))

    def describe(self) -> Series:
        """The series as a value, without what only sorting tells (spacing, tilt)."""
        first = self.first
        return Series(
            modality=first.modality,
            series_instance_uid=first.series_uid,
            series_number=first.series_number,
            slice_count=len(self.frames),
            rows=first.rows,
            columns=first.columns,
            transfer_syntax=first.transfer_syntax,
            pixel_spacing_mm=first.pixel_spacing_mm,
            spacing_mm=None,
            tilt_degrees=None,
        )


def group(frames: Iterable[Frame]) -> list[FrameSeries]:
    """Frames by series, the best candidate for analysis first.

    The series UID is compared as it stands, valid or not; where it is empty the series number takes its place. The
    best is axial, then has most slices; ties go to the lower series number, then to the lower UID.
    """
    series: defaultdict[tuple[str, int | None, bool], list[Frame]] = defaultdict(list)
    for frame in frames:
        number = None if frame.series_uid else frame.series_number
        series[frame.series_uid or "", number, frame.localizer].append(frame)
    return sorted((FrameSeries(tuple(members)) for members in series.values()), key=_rank)


def _rank(series: FrameSeries) -> tuple[object, ...]:
    number = math.inf if series.first.series_number is None else series.first.series_number
    return not series.axial, -len(series.frames), number, natural_key(series.first.series_uid or "")


def choose(candidates: Sequence[FrameSeries], wanted: str | None, place: str) -> FrameSeries:
    """The series to analyse: the first one, or the one that ``wanted`` names by UID or number.

    Raises NoSeries if there is none, or if it does not lie across the patient.
    """
    named = [series for series in candidates if wanted is None or series.is_called(wanted)]
    if not named:
        known = "; ".join(series.label for series in candidates)
        asked = wanted if wanted and wanted.isdecimal() else "of that UID"
        raise NoSeries(f"{place}: holds no CT series {asked}; it holds {known}")
    if not named[0].axial:
        raise NoSeries(f"{place}: {named[0].label} is no axial series, and the network reads axial slices")
    return named[0]
