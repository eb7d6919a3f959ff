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
from groundglass_client.phantom.shapes import Drift, Field, Grid, cover, grain, make_grid, oval, paint, ramp
from groundglass_client.phantom.vessels import cut_vessels, grow_vessels

AIR_HU: Final = -1000.0
FAT_HU: Final = -100.0
MUSCLE_HU: Final = 50.0
BLOOD_HU: Final = 42.0
LIVER_HU: Final = 58.0
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


class Chest:
    """A chest of given settings. What is the same in all slices is made once; memory does not grow with their number."""

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
        around = np.arctan2(self._grid.y, np.abs(self._grid.x) + np.float32(1e-3)).astype(np.float32)
        self._rib_waves = np.cos(2 * _RIBS * around), np.sin(2 * _RIBS * around)

    def hu(self, index: int) -> NDArray[np.int16]:
        """Slice ``index``, head to feet: int16 (rows, columns), -1024 to 3071 HU."""
        height = self._height(index)
        image = self._body(height)
        lungs = cover(self._lungs(height), self._edge_mm)
        paint(image, lungs, self._parenchyma_hu(height))
        lesion = self._lesion_coverage(index, lungs)
        if lesion is not None:
            paint(image, lesion, GROUND_GLASS_HU + 45 * self._parenchyma.at(height))
        paint(image, cut_vessels(self._vessels, self._grid, height * CHEST_MM) * lungs, BLOOD_HU - 10)
        self._airways(image, height)
        image += self._noise_at(index)
        return np.rint(image).clip(STORED_LOWEST_HU, 3071).astype(np.int16)

    def lesion(self, index: int) -> NDArray[np.bool_]:
        """Where ground glass fills at least half of a pixel of slice ``index``: bool (rows, columns)."""
        coverage = self._lesion_coverage(index, cover(self._lungs(self._height(index)), self._edge_mm))
        return np.zeros(self._grid.shape, dtype=np.bool_) if coverage is None else coverage >= 0.5

    def _height(self, index: int) -> float:
        return (index + 0.5) / self._settings.slices

    def _cavity(self, height: float) -> Field:
        """The inside of the rib cage: narrow at the top, full from the hila on."""
        width, depth = (side * (0.47 + 0.53 * ramp(height, -0.06, 0.42)) for side in _CAVITY_MM)
        cavity: Field = oval(self._grid, (0, 2), (width, depth), 2.4) + 2.5 * self._outline.at(height)
        return cavity

    def _lungs(self, height: float) -> Field:
        """What the mediastinum and the domes of the diaphragm leave of the cavity."""
        lungs = self._cavity(height)
        for other in (self._mediastinum(height), self._liver(height), self._left_dome(height)):
            np.minimum(lungs, -other, out=lungs)
        return lungs

    def _mediastinum(self, height: float) -> Field:
        middle = 30 + 12 * ramp(height, 0.2, 0.42)
        parts = (
            oval(self._grid, (0, 64), (25, 32)),
            oval(self._grid, (1, 2), (middle, 40)),
            oval(self._grid, (5, -52), (17, 38)),
            self._heart(height),
        )
        union: Field = np.maximum.reduce(parts) + 2.0 * self._streaks.at(height)
        return union

    def _heart(self, height: float) -> Field:
        size = ramp(height, 0.42, 0.62)
        return oval(self._grid, (20, -20), (62 * size, 50 * size), 2.2)

    def _liver(self, height: float) -> Field:
        size = _dome(height, 0.64)
        return oval(self._grid, (-54, -14), (74 * size, 74 * size), 2.3)

    def _left_dome(self, height: float) -> Field:
        size = _dome(height, 0.70)
        return oval(self._grid, (60, -14), (62 * size, 70 * size), 2.3)

    def _body(self, height: float) -> Field:
        """Everything but the lungs: table, skin, fat, muscle, bone, mediastinum, upper abdomen."""
        grid, edge = self._grid, self._edge_mm
        image = np.full(grid.shape, AIR_HU, dtype=np.float32)
        self._table(image)
        width = _BODY_MM[0] + 6 * np.sin(2.6 * height)
        body = oval(grid, (0, 0), (width, _BODY_MM[1]), 2.5) + 3 * self._outline.at(height)
        cavity, streaks = self._cavity(height), self._streaks.at(height)
        paint(image, cover(body, edge), 20)
        paint(image, cover(body - 2.2, edge), FAT_HU)
        muscle = np.minimum(cavity + 25 + 4 * streaks, body - 9)
        paint(image, cover(muscle, 2.5), MUSCLE_HU + 12 * streaks)
        self._ribs(image, cavity, height)
        paint(image, cover(cavity, edge), FAT_HU + 25)
        self._organs(image, height)
        self._bones(image, height)
        return image

    def _organs(self, image: Field, height: float) -> None:
        """Great vessels, heart, liver and what lies below the left dome."""
        arch = 1 - min(1.0, abs(height - 0.30) / 0.05)
        great = (
            oval(self._grid, (19, 40), (12.5, 12.5)) if height > 0.3 else oval(self._grid, (16, 10), (6, 6)),
            oval(self._grid, (8, 12), (15 * arch, 36 * arch)),
            oval(self._grid, (-9, -13), (16, 16)) if height > 0.3 else oval(self._grid, (-8, -8), (7, 7)),
            oval(self._grid, (-24, -6), (8.5, 9.5)),
            oval(self._grid, (10, -4), (27 * _bell(height, 0.43, 0.06), 12)),
            oval(self._grid, (0, 26), (7, 6)),
            self._heart(height),
        )
        for shape in great:
            paint(image, cover(shape - 1, 1.5), BLOOD_HU)
        paint(image, cover(self._liver(height), 1.5), LIVER_HU + 6 * self._streaks.at(height))
        paint(image, cover(self._left_dome(height), 1.5), BLOOD_HU + 8 * self._streaks.at(height))

    def _ribs(self, image: Field, cavity: Field, height: float) -> None:
        """Ribs run down to the front: in a slice they are short arcs that wander along the wall as the height changes."""
        angle = 2 * np.pi * 11 * height
        wave = self._rib_waves[0] * np.float32(np.cos(angle)) - self._rib_waves[1] * np.float32(np.sin(angle))
        rib = np.minimum(5.5 - np.abs(cavity + 8), (wave - np.float32(0.15)) * 9)
        paint(image, cover(rib, 1.5), CORTEX_HU)
        paint(image, cover(rib - 2.2, 1.5), MARROW_HU)

    def _bones(self, image: Field, height: float) -> None:
        grid = self._grid
        disc = _bell((height * 12) % 1, 0.5, 0.16)
        spine = oval(grid, (0, 60), (19, 15), 2.4)
        arch = np.maximum(oval(grid, (0, 82), (21, 9)), oval(grid, (0, 95), (5.5, 14)))
        wings = np.maximum(oval(grid, (-30, 78), (20, 5.5)), oval(grid, (30, 78), (20, 5.5)))
        sternum = oval(grid, (0, -93), (20, 6))
        blade = ramp(0.62 - height, 0, 0.1)
        scapulae = [oval(grid, (side * 92, 78 - 20 * height), (34 * blade, 6.5 * blade)) for side in (-1, 1)]
        for bone in (arch, wings * (1 - np.float32(disc)), sternum, *scapulae, spine):
            paint(image, cover(bone, 1.5), CORTEX_HU - 150)
            paint(image, cover(bone - 2, 2), MARROW_HU + 30 * self._streaks.at(height))
        paint(image, cover(spine - 1.5, 2) * np.float32(disc), 90)
        paint(image, cover(oval(grid, (0, 80), (8.5, 7)), 1.5), 30)

    def _table(self, image: Field) -> None:
        """Two shells of a curved couch behind the back."""
        depth = self._grid.y - (128 - 0.0009 * self._grid.x**2)
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
            lumen = oval(self._grid, (x, 10), (wide, radius))
            paint(image, cover(lumen + 1.6, 1.2), MUSCLE_HU - 20)
            paint(image, cover(lumen, 1.2), AIR_HU)

    def _parenchyma_hu(self, height: float) -> Field:
        """Aerated lung: denser towards the back, where a lying patient's blood settles."""
        lung: Field = LUNG_HU + np.float32(0.35) * self._grid.y + 14 * self._parenchyma.at(height)
        return lung

    def _lesion_coverage(self, index: int, lungs: Field) -> Field | None:
        """How much of each pixel ground glass fills, 0 to 1; None in a slice without."""
        if self._settings.lesion is None or not self._settings.lesion[0] <= index < self._settings.lesion[1]:
            return None
        first, end = self._settings.lesion
        from_middle = (2 * index + 1 - first - end) / (end - first)  # -1 to 1
        size = (1 - 0.9 * from_middle**2) ** 0.25
        height = self._height(index)
        density = np.zeros(self._grid.shape, dtype=np.float32)
        for patch in self._patches:
            np.maximum(density, self._bump(patch, size, height), out=density)
        share = np.clip(3 * (density - 0.5) + 0.55 * self._rough.at(height), 0, 1)
        coverage: Field = share * np.minimum(lungs, density > 0.12)
        return coverage

    def _bump(self, patch: _Patch, size: float, height: float) -> Field:
        width, depth = (side * (0.47 + 0.53 * ramp(height, -0.06, 0.42)) for side in _CAVITY_MM)
        radius = np.float32(patch.radius_mm * size)
        across = np.exp(-(((self._grid.x - patch.place[0] * width) / radius) ** 2))
        along = np.exp(-(((self._grid.y - patch.place[1] * depth) / radius) ** 2))
        bump: Field = across * along
        return bump

    def _noise_at(self, index: int) -> Field:
        """Noise of slice ``index``: two of a few textures, shifted at random, so that no two slices share it."""
        rng = np.random.default_rng((self._settings.seed, index))
        first, second = rng.choice(len(self._noise), 2, replace=False)
        rows, columns = rng.integers(0, self._grid.shape[0]), rng.integers(0, self._grid.shape[1])
        moved = np.roll(self._noise[second], (int(rows), int(columns)), axis=(0, 1))
        return (self._noise[first] + moved) * np.float32(self._settings.noise_hu / np.sqrt(2))


def _dome(height: float, top: float) -> float:
    """The size of a dome's cut, 0 above ``top`` to 1 at the base."""
    below = (height - top) / (1 - top)
    return 0.0 if below <= 0 else float(np.sqrt(1 - (1 - min(1.0, below)) ** 2))


def _bell(value: float, middle: float, width: float) -> float:
    return float(np.exp(-(((value - middle) / width) ** 2)))
