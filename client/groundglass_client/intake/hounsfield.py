"""Stored pixel values -> Hounsfield units: pure numbers, no DICOM."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU

AIR_HU: Final = -1024
"""The lowest value that a slice keeps. Scanners mark what lies outside their field of view by lower ones (GE: -2000):
to the
network that is air."""

_INT16: Final = np.iinfo(np.int16)
_GREY_MAX: Final = 255


def rescale(
    stored: NDArray[Any], slope: float, intercept_hu: float, padding: tuple[int, int] | None
) -> NDArray[np.int16]:
    """Hounsfield units, int16 in the shape of ``stored``, clipped to what int16 holds and to :data:`AIR_HU` from below.

    ``padding`` is the inclusive range of stored values that mark pixels outside the field of view; they become air.
    """
    if slope == 1 and intercept_hu == int(intercept_hu) and abs(intercept_hu) <= _INT16.max:
        hu = _shift(stored, int(intercept_hu))
    else:
        line = np.multiply(stored, slope, dtype=np.float64)
        line += intercept_hu
        hu = np.rint(line, out=line).clip(AIR_HU, _INT16.max, out=line).astype(np.int16)
    if padding is not None and max(slope * limit + intercept_hu for limit in padding) > AIR_HU:
        hu[(stored >= padding[0]) & (stored <= padding[1])] = AIR_HU
    return hu


def _shift(stored: NDArray[Any], intercept_hu: int) -> NDArray[np.int16]:
    """Whole units added without a wider type: the values are clipped first, so that their sum modulo 2^16 is exact."""
    if stored.dtype.itemsize == 1:
        stored = stored.astype(np.int16)
    held = np.iinfo(stored.dtype)
    low, high = max(AIR_HU - intercept_hu, int(held.min)), min(int(_INT16.max) - intercept_hu, int(held.max))
    shifted: NDArray[np.uint16] = stored.clip(low, high).astype(np.uint16, copy=False)
    shifted += np.uint16(intercept_hu % (1 << 16))
    return shifted.view(np.int16)


def unwindow(grey: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Hounsfield units that the lung window shows as ``grey``: int16 in its shape; windowed, they give ``grey`` /
    255."""
    lowest_hu = LUNG_WINDOW_CENTRE_HU - LUNG_WINDOW_WIDTH_HU / 2
    shades = np.arange(_GREY_MAX + 1) * (LUNG_WINDOW_WIDTH_HU / _GREY_MAX) + lowest_hu
    hu: NDArray[np.int16] = np.rint(shades).astype(np.int16)[grey]
    return hu
