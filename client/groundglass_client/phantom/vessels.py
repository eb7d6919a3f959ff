"""Pulmonary vessels: a tree of tubes that branches from the hila to the pleura, and its cut with a slice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groundglass_client.phantom.settings import CHEST_MM
from groundglass_client.phantom.shapes import Field, Grid

PIECE_MM: Final = 5.0
"""Branches are cut into pieces of at most this length, so that a piece's cut fits a small window."""

_HILUM_MM: Final = (34.0, 4.0, 0.46 * CHEST_MM)
_STEMS: Final = 9
_STEM_RADIUS_MM: Final = 4.6
_STEM_LENGTH_MM: Final = 27.0
_SHORTEST_MM: Final = 12.0
_THINNEST_MM: Final = 0.42
_THICK_MM: Final = 2.0
_SPREAD: Final = 0.5
_OUTWARD: Final = 0.3
"""How much a branch turns away from the hilum: without it, twigs gather in clumps that look like a lesion."""

_EDGE_MM: Final = 1.1

Vector3 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tubes:
    """Pieces of vessels: ends float32 (n, 3) in mm (x, y, z from the head), radii float32 (n,) in mm."""

    starts: Field
    ends: Field
    radii_mm: Field

    def crossing(self, z_mm: float) -> Tubes:
        """The pieces that reach the plane at ``z_mm``."""
        low = np.minimum(self.starts[:, 2], self.ends[:, 2]) - self.radii_mm
        high = np.maximum(self.starts[:, 2], self.ends[:, 2]) + self.radii_mm
        return self._where((low <= z_mm) & (z_mm <= high))

    def by_thickness(self) -> tuple[Tubes, Tubes]:
        """The thin pieces and the thick ones."""
        thick = self.radii_mm > _THICK_MM
        return self._where(~thick), self._where(thick)

    def _where(self, chosen: NDArray[np.bool_]) -> Tubes:
        return Tubes(self.starts[chosen], self.ends[chosen], self.radii_mm[chosen])


@dataclass(frozen=True, slots=True)
class _Soil:
    """Where one lung's tree grows: from ``hilum``, within ``limits`` (half width, half depth, half length), in mm."""

    rng: np.random.Generator
    hilum: Vector3
    limits: Vector3


def grow_vessels(rng: np.random.Generator, half_width_mm: float, half_depth_mm: float) -> Tubes:
    """The vessels of both lungs within an oval chest of that size."""
    limits = np.array([half_width_mm, half_depth_mm, 0.5 * CHEST_MM])
    pieces = [piece for side in (-1, 1) for piece in _lung_tree(rng, side, limits)]
    starts, ends, radii = (np.array(values, dtype=np.float32) for values in zip(*pieces, strict=True))
    return Tubes(starts, ends, radii)


def _lung_tree(rng: np.random.Generator, side: int, limits: Vector3) -> Iterator[tuple[Vector3, Vector3, float]]:
    hilum = np.array(_HILUM_MM) * (float(side), 1.0, 1.0)
    soil = _Soil(rng, hilum, limits)
    for stem in range(_STEMS):
        around = 2 * np.pi * (stem + rng.uniform(-0.3, 0.3)) / _STEMS
        direction = np.array([side * 0.75, 0.8 * np.cos(around), 1.1 * np.sin(around)])
        start = hilum + rng.normal(0, 5, 3)
        yield from _branch(soil, start, direction, _STEM_LENGTH_MM, _STEM_RADIUS_MM * rng.uniform(0.7, 1.0))


def _branch(
    soil: _Soil, start: Vector3, direction: Vector3, length_mm: float, radius_mm: float
) -> Iterator[tuple[Vector3, Vector3, float]]:
    """A branch and all that grows from it; it ends where it gets too thin or meets the pleura."""
    rng, hilum = soil.rng, soil.hilum
    unit = direction / np.linalg.norm(direction)
    end = start + unit * length_mm
    if radius_mm < _THINNEST_MM or not _within(end, soil.limits):
        return
    yield from _pieces(start, end, radius_mm)
    for _ in range(2):
        outward = (end - hilum) / np.linalg.norm(end - hilum)
        turned = unit + _OUTWARD * outward + rng.normal(0, _SPREAD, 3)
        shrink = rng.uniform(0.66, 0.86)
        yield from _branch(
            soil, end, turned, max(_SHORTEST_MM, length_mm * rng.uniform(0.68, 0.88)), radius_mm * shrink
        )


def _pieces(start: Vector3, end: Vector3, radius_mm: float) -> Iterator[tuple[Vector3, Vector3, float]]:
    count = int(np.ceil(np.linalg.norm(end - start) / PIECE_MM))
    knots = np.linspace(start, end, count + 1)
    for first, second in pairwise(knots):
        yield first, second, radius_mm


def _within(point: Vector3, limits: Vector3) -> bool:
    x, y, z = (point - (0, 0, CHEST_MM / 2)) / limits
    return bool(x**2 + y**2 < 0.95 and abs(z) < 1 and abs(point[0]) > 14)


def cut_vessels(tubes: Tubes, grid: Grid, z_mm: float) -> Field:
    """How much of each pixel vessels cover, 0 to 1, in the slice at ``z_mm``: float32 (rows, columns)."""
    coverage = np.zeros(grid.shape, dtype=np.float32)
    for pieces in tubes.crossing(z_mm).by_thickness():
        if len(pieces.radii_mm):
            _stamp(coverage, pieces, grid, z_mm)
    return coverage


def _stamp(coverage: Field, tubes: Tubes, grid: Grid, z_mm: float) -> None:
    """Draw all pieces at once, each in a window of its own, and merge the windows into ``coverage``."""
    reach_mm = PIECE_MM / 2 + float(tubes.radii_mm.max()) + _EDGE_MM
    side = min(2 * int(np.ceil(reach_mm / grid.pixel_mm)) + 1, *grid.shape)
    columns = _corners(tubes.starts[:, 0] + tubes.ends[:, 0], grid.x.ravel(), grid.pixel_mm, side)
    rows = _corners(tubes.starts[:, 1] + tubes.ends[:, 1], grid.y.ravel(), grid.pixel_mm, side)
    steps = np.arange(side)
    x = grid.x.ravel()[columns[:, None] + steps][:, None, :]  # (n, 1, side)
    y = grid.y.ravel()[rows[:, None] + steps][:, :, None]  # (n, side, 1)
    windows = _capsules(tubes, x, y, z_mm)
    for row, column, window in zip(rows.tolist(), columns.tolist(), windows, strict=True):
        target = coverage[row : row + side, column : column + side]
        np.maximum(target, window, out=target)


def _corners(doubled_middle_mm: Field, axis_mm: Field, pixel_mm: float, side: int) -> NDArray[np.int64]:
    """The first index of a window around the middle, moved inside the image where it would stick out."""
    nearest = np.rint((doubled_middle_mm / 2 - axis_mm[0]) / pixel_mm).astype(np.int64)
    corners: NDArray[np.int64] = np.clip(nearest - side // 2, 0, len(axis_mm) - side)
    return corners


def _capsules(tubes: Tubes, x: Field, y: Field, z_mm: float) -> Field:
    """Coverage of every window by its piece, from the distance of pixels to its axis in space: (n, side, side)."""
    axis = (tubes.ends - tubes.starts).T[:, :, None, None]  # (3, n, 1, 1)
    start = tubes.starts.T[:, :, None, None]
    radius = tubes.radii_mm[:, None, None]
    dx, dy, dz = x - start[0], y - start[1], np.float32(z_mm) - start[2]
    along = np.clip((dx * axis[0] + dy * axis[1] + dz * axis[2]) / (axis**2).sum(axis=0), 0, 1)
    distance = np.sqrt((dx - along * axis[0]) ** 2 + (dy - along * axis[1]) ** 2 + (dz - along * axis[2]) ** 2)
    faint = np.minimum(1, radius / np.float32(0.9))  # a vessel thinner than a pixel never fills one
    windows: Field = np.clip((radius - distance) / np.float32(_EDGE_MM) + np.float32(0.5), 0, 1) * faint
    return windows
