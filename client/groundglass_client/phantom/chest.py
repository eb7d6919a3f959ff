"""The chest: Hounsfield units of one slice at a time, from a handful of soft-edged shapes.

Heights run from 0 (above the apices of the lungs) to 1 (their bases). Sizes in mm and Hounsfield units are those of an
adult in a non-contrast scan, read off real scans and textbook ranges; every shape moves smoothly with the height.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groundglass_client.phantom.settings import CHEST_MM, PhantomSettings
from groundglass_client.phantom.shapes import (
    Drift,
    Field,
    cover,
    exactly,
    grain,
    make_grid,
    oval,
    paint,
    paint_oval,
    ramp,
)
from groundglass_client.phantom.vessels import cut_vessels, grow_vessels

AIR_HU: Final = -1000.0
FAT_HU: Final = -100.0
MUSCLE_HU: Final = 50.0
BLOOD_HU: Final = 42.0
MARROW_HU: Final = 180.0
CORTEX_HU: Final = 620.0
LUNG_HU: Final = -865.0
GROUND_GLASS_HU: Final = -560.0
TABLE_HU: Final = -550.0
STORED_LOWEST_HU: Final = -1024

_CAVITY_MM: Final = (122.0, 84.0)
_BODY_MM: Final = (166.0, 113.0)
_RIBS: Final = 7
_LESION_PLACES: Final = ((-0.66, 0.52), (0.70, 0.46), (-0.86, -0.08), (0.52, 0.72), (-0.42, 0.76))
"""Where ground glass settles: below the pleura, mostly at the back. In half widths and half depths of the chest."""


@dataclass(frozen=True, slots=True)
class _Patch:
    """One patch of ground glass: its middle as a share of the chest's half axes, its radius in mm."""

    place: tuple[float, float]
    radius_mm: float


@dataclass(frozen=True, slots=True)
class _Level:
    """What the parts of one slice share: textures, the rib cage's inside, and how much lung covers each pixel."""

    height: float
    outline: Field
    streaks: Field
    parenchyma: Field
    cavity: Field
    lungs: Field


class Chest:
    """A chest of given settings. What all slices share is made once; memory does not grow with their number."""

    def __init__(self, settings: PhantomSettings) -> None:
        rng = np.random.default_rng(settings.seed)
        self._settings = settings
        self._grid = make_grid(settings.rows, settings.columns)
        pixel_mm, shape = self._grid.pixel_mm, self._grid.shape
        self._edge_mm = max(1.0, 1.3 * pixel_mm)
        self._outline = Drift(rng, shape, 42 / pixel_mm, turns=2.5)
        self._streaks = Drift(rng, shape, 14 / pixel_mm, turns=9)
        self._parenchyma = Drift(rng, shape, 7 / pixel_mm, turns=30)
        self._rough = Drift(rng, shape, 11 / pixel_mm, turns=10)
        self._noise = [grain(rng, shape, 1.4 / pixel_mm, hollow=True) for _ in range(3)]
        self._vessels = grow_vessels(rng, *_CAVITY_MM)
        self._patches = [
            _Patch((x + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.05, 0.05)), rng.uniform(30, 42))
            for x, y in _LESION_PLACES
        ]
        y_mm, x_mm = self._grid.y.astype(np.float64), np.abs(self._grid.x).astype(np.float64)
        waves = np.arctan2(y_mm, x_mm + 1e-3).astype(np.float64) * (2 * _RIBS)
        self._rib_waves = exactly(np.cos, waves), exactly(np.sin, waves)

    def hu(self, index: int) -> NDArray[np.int16]:
        """Slice ``index``, head to feet: int16 (rows, columns), -1024 to 3071 HU."""
        level = self._level(index)
        image = self._body(level)
        paint(image, level.lungs, LUNG_HU + np.float32(0.2) * self._grid.y + 6 * level.parenchyma)
        lesion = self._lesion_coverage(index, level)
        if lesion is not None:
            paint(image, lesion, GROUND_GLASS_HU + 45 * level.parenchyma)
        paint(image, cut_vessels(self._vessels, self._grid, level.height * CHEST_MM) * level.lungs, BLOOD_HU - 10)
        self._airways(image, level.height)
        image += self._noise_at(index)
        return np.rint(image).clip(STORED_LOWEST_HU, 3071).astype(np.int16)

    def lesion(self, index: int) -> NDArray[np.bool_]:
        """Where ground glass fills at least half of a pixel of slice ``index``: bool (rows, columns)."""
        coverage = self._lesion_coverage(index, self._level(index))
        return np.zeros(self._grid.shape, dtype=np.bool_) if coverage is None else coverage >= 0.5

    def _level(self, index: int) -> _Level:
        height = (index + 0.5) / self._settings.slices
        outline, streaks = self._outline.at(height), self._streaks.at(height)
        cavity = self._cavity(height) + np.float32(2.5) * outline
        lungs = cavity.copy()
        for other in (self._mediastinum(height, streaks), self._liver(height), self._left_dome(height)):
            if other is not None:
                np.minimum(lungs, -other, out=lungs)
        parenchyma = self._parenchyma.at(height)
        return _Level(height, outline, streaks, parenchyma, cavity, cover(lungs, self._edge_mm))

    def _cavity(self, height: float) -> Field:
        """The inside of the rib cage: narrow at the top, full from the hila on."""
        return oval(self._grid, (0, 2), _cavity_radii_mm(height), 2.4)

    def _mediastinum(self, height: float, streaks: Field) -> Field:
        middle = 30 + 12 * ramp(height, 0.2, 0.42)
        parts = (
            oval(self._grid, (0, 64), (25, 32)),
            oval(self._grid, (1, 2), (middle, 40)),
            oval(self._grid, (5, -52), (17, 38)),
            oval(self._grid, (20, -20), _heart_radii_mm(height), 2.2),
        )
        union: Field = np.maximum.reduce(parts) + np.float32(2) * streaks
        return union

    def _liver(self, height: float) -> Field | None:
        size = _dome(height, 0.64)
        return oval(self._grid, (-54, -14), (74 * size, 74 * size), 2.3) if size else None

    def _left_dome(self, height: float) -> Field | None:
        size = _dome(height, 0.70)
        return oval(self._grid, (60, -14), (62 * size, 70 * size), 2.3) if size else None

    def _body(self, level: _Level) -> Field:
        """Everything but the lungs: table, skin, fat, muscle, bone, mediastinum, upper abdomen."""
        image = np.full(self._grid.shape, AIR_HU, dtype=np.float32)
        self._table(image)
        width = _BODY_MM[0] + 6 * np.sin(2.6 * level.height)
        body = oval(self._grid, (0, 0), (width, _BODY_MM[1]), 2.5) + np.float32(3) * level.outline
        paint(image, cover(body, self._edge_mm), 20)
        paint(image, cover(body - np.float32(2.2), self._edge_mm), FAT_HU)
        muscle = np.minimum(level.cavity + 25 + 4 * level.streaks, body - 9)
        paint(image, cover(muscle, 2.5), MUSCLE_HU + 12 * level.streaks)
        self._ribs(image, level)
        paint(image, cover(level.cavity, self._edge_mm), FAT_HU + 25)
        self._organs(image, level)
        self._bones(image, level)
        return image

    def _organs(self, image: Field, level: _Level) -> None:
        """Great vessels, heart, liver and what lies below the left dome."""
        height = level.height
        arch = 1 - min(1.0, abs(height - 0.30) / 0.05)
        great_mm = (
            (19, 40, 12, 12) if height > 0.3 else (16, 10, 6, 6),  # descending aorta, left subclavian artery
            (8, 12, 15 * arch, 36 * arch),
            (-9, -13, 15, 15) if height > 0.3 else (-8, -8, 7, 7),  # ascending aorta, right brachiocephalic artery
            (-24, -6, 8, 9),  # superior vena cava
            (10, -4, 27 * _bell(height, 0.43, 0.06), 12),  # pulmonary trunk
            (0, 26, 7, 6),  # oesophagus
        )
        for oval_mm in great_mm:
            paint_oval(image, self._grid, oval_mm, BLOOD_HU)
        paint_oval(image, self._grid, (20, -20, *_heart_radii_mm(height)), BLOOD_HU, power=2.2)
        abdomen = BLOOD_HU + 12 + np.float32(7) * level.streaks
        for dome in (self._liver(height), self._left_dome(height)):
            if dome is not None:
                paint(image, cover(dome, 1.5), abdomen)

    def _ribs(self, image: Field, level: _Level) -> None:
        """Ribs run down to the front: in a slice they are short arcs that wander along the wall with the height."""
        angle = 2 * np.pi * 11 * level.height
        wave = self._rib_waves[0] * np.float32(np.cos(angle)) - self._rib_waves[1] * np.float32(np.sin(angle))
        rib = np.minimum(np.float32(5.5) - np.abs(level.cavity + 8), (wave - np.float32(0.15)) * 9)
        paint(image, cover(rib, 1.5), CORTEX_HU)
        paint(image, cover(rib - np.float32(2.2), 1.5), MARROW_HU)

    def _bones(self, image: Field, level: _Level) -> None:
        """Sternum, shoulder blades and a spine of bodies and discs in turn."""
        disc = _bell((level.height * 12) % 1, 0.5, 0.16)
        blade = ramp(0.62 - level.height, 0, 0.1)
        bones_mm = [
            (0, 82, 21, 9),
            (0, 95, 5.5, 14),
            *((side * 30, 78, 20 * (1 - disc), 5.5 * (1 - disc)) for side in (-1, 1)),
            (0, -93, 20, 6),
            *((side * 92, 78 - 20 * level.height, 34 * blade, 6.5 * blade) for side in (-1, 1)),
            (0, 60, 19, 15),
        ]
        marrow = MARROW_HU + np.float32(30) * level.streaks
        for x, y, a, b in bones_mm:
            paint_oval(image, self._grid, (x, y, a, b), CORTEX_HU - 150)
            paint_oval(image, self._grid, (x, y, a - 2, b - 2), marrow, edge_mm=2)
        paint_oval(image, self._grid, (0, 60, 17.5, 13.5), 90, edge_mm=2, strength=disc)
        paint_oval(image, self._grid, (0, 80, 8.5, 7), 30)

    def _table(self, image: Field) -> None:
        """Two shells of a curved couch behind the back."""
        depth = self._grid.y - (128 - np.float32(0.0009) * self._grid.x**2)
        for offset_mm in (0.0, 22.0):
            shell: Field = np.minimum(1.6 - np.abs(depth - offset_mm), 165 - np.abs(self._grid.x))
            paint(image, cover(shell, 1.2), TABLE_HU)

    def _airways(self, image: Field, height: float) -> None:
        """The trachea, and below the carina the two main bronchi."""
        apart = 34 * ramp(height, 0.37, 0.50)
        if height > 0.50:
            return
        tubes = [(0.0, 9.0)] if apart == 0 else [(-apart, 7.0), (apart, 6.5)]
        for x, radius in tubes:
            wide = radius * (1 + 0.5 * ramp(apart, 0, 20))
            paint_oval(image, self._grid, (x, 10, wide + 1.6, radius + 1.6), MUSCLE_HU - 20, edge_mm=1.2)
            paint_oval(image, self._grid, (x, 10, wide, radius), AIR_HU, edge_mm=1.2)

    def _lesion_coverage(self, index: int, level: _Level) -> Field | None:
        """How much of each pixel ground glass fills, 0 to 1; None in a slice without."""
        if self._settings.lesion is None or not self._settings.lesion[0] <= index < self._settings.lesion[1]:
            return None
        first, end = self._settings.lesion
        from_middle = (2 * index + 1 - first - end) / (end - first)  # -1 to 1
        size = (1 - 0.9 * from_middle**2) ** 0.25
        density = np.zeros(self._grid.shape, dtype=np.float32)
        for patch in self._patches:
            np.maximum(density, self._bump(patch, size, level.height), out=density)
        share = np.clip(3 * (density - 0.5) + 0.55 * self._rough.at(level.height), 0, 1)
        coverage: Field = share * level.lungs * (density > np.float32(0.12))
        return coverage

    def _bump(self, patch: _Patch, size: float, height: float) -> Field:
        width, depth = _cavity_radii_mm(height)
        radius = np.float32(patch.radius_mm * size)
        across = exactly(np.exp, -(((self._grid.x - patch.place[0] * width) / radius) ** 2))
        along = exactly(np.exp, -(((self._grid.y - patch.place[1] * depth) / radius) ** 2))
        bump: Field = across * along
        return bump

    def _noise_at(self, index: int) -> Field:
        """Noise of slice ``index``: two of a few textures, shifted at random, so that no two slices share it."""
        rng = np.random.default_rng((self._settings.seed, index))
        first, second = rng.choice(len(self._noise), 2, replace=False)
        rows, columns = rng.integers(0, self._grid.shape[0]), rng.integers(0, self._grid.shape[1])
        moved = np.roll(self._noise[second], (int(rows), int(columns)), axis=(0, 1))
        noise: Field = (self._noise[first] + moved) * np.float32(self._settings.noise_hu / np.sqrt(2))
        return noise


def _cavity_radii_mm(height: float) -> tuple[float, float]:
    share = 0.47 + 0.53 * ramp(height, -0.06, 0.42)
    return _CAVITY_MM[0] * share, _CAVITY_MM[1] * share


def _heart_radii_mm(height: float) -> tuple[float, float]:
    size = ramp(height, 0.42, 0.62)
    return 62 * size, 50 * size


def _dome(height: float, top: float) -> float:
    """The size of a dome's cut, 0 above ``top`` to 1 at the base."""
    below = (height - top) / (1 - top)
    return 0.0 if below <= 0 else float(np.sqrt(1 - (1 - min(1.0, below)) ** 2))


def _bell(value: float, middle: float, width: float) -> float:
    return float(np.exp(-(((value - middle) / width) ** 2)))
