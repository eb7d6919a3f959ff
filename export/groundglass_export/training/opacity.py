"""Synthetic ground-glass opacities in healthy lungs.

The lesion masks at hand belong to equalised 8-bit images, and every DICOM slice that may be trained on is free of
lesions: left alone, a network would learn that slices in the lung window are healthy. An opacity raises the lung's
attenuation and leaves its vessels visible (Hansell et al., Radiology 2008), so it is added to the Hounsfield units,
with ragged borders and texture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

LUNG_CEILING_HU = -500.0
MIN_LUNG_SHARE = 0.02
"""Of the slice's pixels: below it (shoulders, abdomen) no opacity is added."""

RISE_HU = (120.0, 650.0)
SATURATION_HU = 40.0
"""Attenuation of consolidated lung: no opacity rises above it."""


def lungs(hu: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Air inside the body, its vessels filled in: bool (rows, cols) from float32 HU (rows, cols)."""
    regions, count = ndimage.label(hu < LUNG_CEILING_HU)
    if count == 0:
        return np.zeros(hu.shape, dtype=np.bool_)
    sizes = np.bincount(regions.ravel())
    outside = np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]))
    keep = sizes >= MIN_LUNG_SHARE / 4 * hu.size
    keep[0] = False
    keep[outside] = False
    return np.asarray(ndimage.binary_closing(keep[regions], iterations=4))


def add_opacity(hu: NDArray[np.float32], rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A copy of a slice, float32 (rows, cols) HU, with one to four opacities, and the mask (rows, cols) that they
    cover.

    Where there is too little lung the slice comes back as it was, with an empty mask.
    """
    lung = lungs(hu)
    if lung.mean() < MIN_LUNG_SHARE:
        return hu, np.zeros(hu.shape, dtype=np.bool_)
    density = np.zeros(hu.shape, dtype=np.float32)
    for _ in range(int(rng.integers(1, 5))):
        density = np.maximum(density, _patch(lung, rng))
    inside = np.asarray(ndimage.gaussian_filter(lung.astype(np.float32), 1.0)) * density
    texture = 1.0 + 0.25 * _clouds(hu.shape, 2.0, rng)
    raised = np.minimum(hu + rng.uniform(*RISE_HU) * inside * texture, np.maximum(hu, SATURATION_HU))
    return raised.astype(np.float32), (inside > 0.4) & lung


def _patch(lung: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float32]:
    rows, cols = np.nonzero(lung)
    centre = rng.integers(rows.size)
    side = lung.shape[0]
    radius = side * rng.uniform(0.02, 0.14)
    squash, angle = rng.uniform(0.5, 1.0), rng.uniform(0.0, np.pi)
    down, across = np.mgrid[: lung.shape[0], : lung.shape[1]].astype(np.float32)
    down, across = down - rows[centre], across - cols[centre]
    along = (down * np.cos(angle) + across * np.sin(angle)) / radius
    beside = (across * np.cos(angle) - down * np.sin(angle)) / (radius * squash)
    distance = np.hypot(along, beside) + 0.35 * _clouds(lung.shape, radius / 3, rng)
    steepness = rng.uniform(4.0, 14.0)
    density = 1.0 / (1.0 + np.exp(np.clip(steepness * (distance - 1.0), -30.0, 30.0)))
    return np.asarray(density, dtype=np.float32)


def _clouds(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> NDArray[np.float32]:
    noise: NDArray[np.float32] = np.asarray(
        ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma)
    )
    spread = np.float32(noise.std() + 1e-6)
    return np.asarray(noise / spread, dtype=np.float32)
