"""Soft-edged shapes on a slice's grid, in millimetres.

A shape is a field: its approximate signed distance from the border in mm, positive inside, float32 (rows, columns).
Unions and intersections are maxima and minima; a soft edge stands for the partial volume of a real slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]

FIELD_OF_VIEW_MM: Final = 380.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Pixel centres in mm: ``x`` float32 (1, columns) to the patient's left, ``y`` float32 (rows, 1) to the back."""

    x: Field
    y: Field
    pixel_mm: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.y.shape[0], self.x.shape[1]


def make_grid(rows: int, columns: int) -> Grid:
    """A grid around the middle of the body; the longer side of the image spans the field of view."""
    pixel_mm = FIELD_OF_VIEW_MM / max(rows, columns)
    x = (np.arange(columns, dtype=np.float32) - (columns - 1) / 2) * np.float32(pixel_mm)
    y = (np.arange(rows, dtype=np.float32) - (rows - 1) / 2) * np.float32(pixel_mm)
    return Grid(x[None, :], y[:, None], pixel_mm)


def oval(grid: Grid, centre_mm: tuple[float, float], radii_mm: tuple[float, float], power: float = 2.0) -> Field:
    """An ellipse; a ``power`` above 2 makes it squarer. Radii below half a millimetre make an empty shape."""
    (x, y), (a, b) = centre_mm, radii_mm
    if min(a, b) < 0.5:
        return np.full(grid.shape, -1e3, dtype=np.float32)
    across = exactly(lambda share: share**power, np.abs((grid.x - np.float32(x)) / np.float32(a)))
    along = exactly(lambda share: share**power, np.abs((grid.y - np.float32(y)) / np.float32(b)))
    inside: Field = (1 - across - along) * np.float32(min(a, b) / power)
    return inside


def exactly(function: Callable[[NDArray[np.float64]], NDArray[np.float64]], values: NDArray[np.floating[Any]]) -> Field:
    """A power, an exponential, a sine of ``values`` that is the same on every CPU: computed in double, kept in single.

    numpy's single-precision versions differ in the last digit with the CPU's vector instructions: measured, 83 of 6.3
    million pixels of a phantom then round to another Hounsfield unit.
    """
    single: Field = function(values.astype(np.float64)).astype(np.float32)
    return single


def paint_oval(
    image: Field,
    grid: Grid,
    oval_mm: tuple[float, float, float, float],
    hu: float | Field,
    *,
    edge_mm: float = 1.5,
    power: float = 2.0,
    strength: float = 1.0,
) -> None:
    """Blend an ellipse (middle x, y, radii a, b in mm) into ``image``, in place, touching only the pixels around it."""
    x, y, a, b = oval_mm
    rows, columns = _reach(grid.y.ravel(), y, b + edge_mm), _reach(grid.x.ravel(), x, a + edge_mm)
    window = Grid(grid.x[:, columns], grid.y[rows], grid.pixel_mm)
    coverage = cover(oval(window, (x, y), (a, b), power), edge_mm) * np.float32(strength)
    paint(image[rows, columns], coverage, hu[rows, columns] if isinstance(hu, np.ndarray) else hu)


def _reach(axis_mm: Field, middle_mm: float, reach_mm: float) -> slice:
    """The part of an axis within reach of a middle."""
    first, end = np.searchsorted(axis_mm, (middle_mm - reach_mm, middle_mm + reach_mm))
    return slice(int(first), int(end))


def cover(distance: Field, edge_mm: float) -> Field:
    """How much of each pixel a shape covers, 0 to 1, with an edge of that width."""
    return np.clip(distance * np.float32(1 / edge_mm) + np.float32(0.5), 0, 1)


def paint(image: Field, coverage: Field, hu: float | Field) -> None:
    """Blend ``hu`` into ``image``, in place, where ``coverage`` is above 0."""
    image += coverage * (hu - image)


def ramp(value: float, start: float, end: float) -> float:
    """0 before ``start``, 1 after ``end``, smooth between."""
    share = min(1.0, max(0.0, (value - start) / (end - start)))
    return share * share * (3 - 2 * share)


def grain(rng: np.random.Generator, shape: tuple[int, int], size_px: float, *, hollow: bool = False) -> Field:
    """Random texture of mean 0 and deviation 1, float32 in ``shape``, that repeats without a seam.

    ``size_px`` is the size of its grains. ``hollow`` takes the low frequencies away, as filtered back projection does:
    the noise of a CT is a texture of fine grains, not of clouds.
    """
    frequency_y = np.fft.fftfreq(shape[0])[:, None]
    frequency_x = np.fft.rfftfreq(shape[1])[None, :]
    frequency = np.hypot(frequency_y, frequency_x)
    gain = np.exp(-0.5 * (2 * np.pi * frequency * size_px / 2) ** 2) * (frequency if hollow else 1)
    gain[0, 0] = 0
    texture = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * gain, s=shape)
    normalised: Field = (texture / texture.std()).astype(np.float32)
    return normalised


class Drift:
    """A texture that changes smoothly from slice to slice: two textures, turned into one another along the body."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int], size_px: float, turns: float) -> None:
        self._textures = grain(rng, shape, size_px), grain(rng, shape, size_px)
        self._turns = turns
        self._phase = rng.uniform(0, 2 * np.pi)

    def at(self, height: float) -> Field:
        """The texture at ``height``, 0 at the head end to 1 at the feet end; mean 0, deviation 1."""
        angle = 2 * np.pi * self._turns * height + self._phase
        return self._textures[0] * np.float32(np.cos(angle)) + self._textures[1] * np.float32(np.sin(angle))
