"""A CT study as the rest of Groundglass sees it: values that know no DICOM tag and hold no patient's name or ID."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SliceSource:
    """Where one slice's pixels lie, and where the slice lies in the patient.

    ``index`` counts from 0, head to feet. ``position_mm`` is the distance along the slice normal, which points to the
    head: it falls as ``index`` rises. It is None for images without geometry (PNG, JPEG). ``frame`` counts from 0.
    """

    index: int
    path: Path
    file: str
    frame: int
    rows: int
    columns: int
    position_mm: float | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A file that the study could not use, and why, in words for a person."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Gap:
    """A hole in the volume: the slice after ``after_index`` is ``distance_mm`` away instead of the usual spacing."""

    after_index: int
    from_mm: float
    to_mm: float
    distance_mm: float


@dataclass(frozen=True, slots=True)
class Series:
    """The description of one series: what it is, never whose."""

    modality: str
    series_instance_uid: str | None
    series_number: int | None
    slice_count: int
    rows: int
    columns: int
    transfer_syntax: str | None
    pixel_spacing_mm: tuple[float, float] | None
    spacing_mm: float | None
    tilt_degrees: float | None
    spacing_range_mm: tuple[float, float] | None = None
    """``pixel_spacing_mm`` is (row spacing, column spacing); ``spacing_mm`` the median distance between slices along
    the slice normal, ``spacing_range_mm`` the least and the largest; ``tilt_degrees`` the angle between that normal and
    the patient's long axis."""


@dataclass(frozen=True, slots=True)
class Study:
    """One axial CT series in anatomical order, and everything that was left out of it.

    ``slices`` run head to feet and carry their index. ``duplicates`` are second files for a position already taken.
    ``refused`` are files that could not be used (only with ``skip_bad``: without it the first one is raised).
    ``other_series`` were readable, and not chosen. ``ignored`` are files that are no part of any CT series by their
    nature (a DICOMDIR, a text file, a structured report).
    """

    root: Path
    series: Series
    slices: tuple[SliceSource, ...]
    gaps: tuple[Gap, ...] = ()
    duplicates: tuple[Refusal, ...] = ()
    refused: tuple[Refusal, ...] = ()
    ignored: tuple[Refusal, ...] = ()
    other_series: tuple[Series, ...] = ()

    @property
    def partial(self) -> bool:
        """Whether slices that belong to the study may be missing from the verdict."""
        return bool(self.refused)
