"""What a phantom is to look like, and how it is to be written."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from groundglass.errors import SettingError

SYNTAXES: Final = MappingProxyType(
    {
        "explicit": ExplicitVRLittleEndian,
        "implicit": ImplicitVRLittleEndian,
        "deflated": DeflatedExplicitVRLittleEndian,
        "rle": RLELossless,
        "jpeg-lossless": JPEGLosslessSV1,
        "jpeg-ls": JPEGLSLossless,
        "jpeg2000": JPEG2000Lossless,
    }
)
"""The transfer syntaxes that a phantom can be written in, all of them lossless, by the name that a person types."""

CHEST_MM: Final = 300.0
"""Length of the chest, from above the lungs' apices to their bases. All slices together sample it."""

MAX_SLICES: Final = 20_000
_SIDES: Final = range(64, 2049)


@dataclass(frozen=True, slots=True)
class PhantomSettings:
    """A phantom.

    slices: how many, head to feet.
    lesion: the slices that show ground glass, first and one past the last; None for healthy lungs.
    rows, columns: pixels of a slice. The field of view is 380 mm wide at any size.
    spacing_mm: distance between slices; None spreads them over a chest of 300 mm.
    syntax: a key of :data:`SYNTAXES`.
    noise_hu: standard deviation of the noise in soft tissue; 20 is a usual chest protocol's.
    seed: of everything random: vessels, outline, lesion, noise, file names, UIDs.
    """

    slices: int = 150
    lesion: tuple[int, int] | None = None
    rows: int = 512
    columns: int = 512
    spacing_mm: float | None = None
    syntax: str = "explicit"
    noise_hu: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise SettingError for what can't be written."""
        if not 1 <= self.slices <= MAX_SLICES:
            raise SettingError(f"{self.slices} slices asked for; a phantom has 1 to {MAX_SLICES}")
        if self.rows not in _SIDES or self.columns not in _SIDES:
            raise SettingError(
                f"{self.rows} x {self.columns} pixels asked for; a slice has 64 to 2048 rows and columns"
            )
        if self.lesion is not None and not 0 <= self.lesion[0] < self.lesion[1] <= self.slices:
            first, end = self.lesion
            raise SettingError(f"lesion {first}:{end} lies outside of the scan; its slices are 0:{self.slices}")
        if self.syntax not in SYNTAXES:
            raise SettingError(f"unknown syntax {self.syntax!r}; known are {', '.join(SYNTAXES)}")
        if self.spacing_mm is not None and not 0.05 <= self.spacing_mm <= 50:
            raise SettingError(f"spacing {self.spacing_mm} mm asked for; slices are 0.05 to 50 mm apart")
        if not 0 <= self.noise_hu <= 500:
            raise SettingError(f"noise of {self.noise_hu} HU asked for; it is 0 to 500")
        if self.seed < 0:
            raise SettingError(f"seed {self.seed} asked for; it is 0 or larger")

    @property
    def transfer_syntax(self) -> UID:
        """The UID of ``syntax``."""
        return SYNTAXES[self.syntax]

    @property
    def slice_distance_mm(self) -> float:
        """Millimetres between neighbouring slices."""
        return self.spacing_mm or CHEST_MM / self.slices


def parse_lesion(text: str) -> tuple[int, int] | None:
    """``"40:60"`` as (40, 60); ``"none"`` as None. Raises SettingError for anything else."""
    if text.strip().lower() == "none":
        return None
    first, colon, end = text.partition(":")
    if not (colon and first.strip().isdecimal() and end.strip().isdecimal()):
        raise SettingError(f"lesion {text!r} is not of the form FIRST:END, such as 40:60, or none")
    return int(first), int(end)
