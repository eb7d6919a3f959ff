"""What intake knows of one slice: the values that its stages hand to one another. No DICOM tag is named here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from groundglass.study import SliceSource

MAX_PIXELS_PER_SLICE: Final = 1 << 24
"""Rows times columns of the largest slice that is believed, 4096 x 4096. A broken header claims up to 65535 x 65535."""

Vector = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A regular file to look at. ``name`` is its path inside the study, for people."""

    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class StoredPixels:
    """How the numbers of one slice lie in its file, and how they become Hounsfield units.

    ``spans`` are the (offset, length) pairs, in bytes, whose contents joined are the encoded slice; in a deflated file
    they count from the start of the inflated dataset. ``padding`` is the inclusive range of stored values that mark
    pixels outside the field of view.
    """

    transfer_syntax_uid: str
    deflated: bool
    spans: tuple[tuple[int, int], ...]
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    value_representation: str
    slope: float
    intercept_hu: float
    padding: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class DicomSlice(SliceSource):
    """A slice that lies in a DICOM file. It pickles, so that a process pool can decode it."""

    pixels: StoredPixels


@dataclass(frozen=True, slots=True)
class PictureSlice(SliceSource):
    """A slice that is an 8-bit PNG or JPEG picture of a lung window."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One slice as its file describes it, before it has a place in a volume.

    ``orientation`` holds the direction of a row and of a column, ``position_mm`` the centre of the first pixel, both
    in the patient's coordinates: x to the left, y to the back, z to the head (DICOM PS3.3 C.7.6.2.1.1).
    """

    file: FoundFile
    frame: int
    modality: str
    series_uid: str | None
    series_number: int | None
    instance_number: int | None
    instance_uid: str
    transfer_syntax: str | None
    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float] | None
    orientation: tuple[Vector, Vector] | None
    position_mm: Vector | None
    table_position_mm: float | None
    localizer: bool
    pixels: StoredPixels | None

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return f"{self.file.name}, frame {self.frame + 1}" if self.frame else self.file.name
