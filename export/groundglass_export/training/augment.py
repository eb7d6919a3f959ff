"""From a training slice to the network's input, as varied as scanners, windows and publications make it.

Every function takes its randomness as an argument: the same generator gives the same image.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from groundglass.contract import LUNG_WINDOW_CENTRE_HU, LUNG_WINDOW_WIDTH_HU
from groundglass_export.training.opacity import add_opacity
from groundglass_export.training.slices import TrainingSlice

ROTATION_DEGREES = 12.0
EQUALISE_PROBABILITY = 0.4
PLAIN_PROBABILITY = 0.15
"""Share of samples whose grey values are left exactly as they are served."""

WHOLE_ZOOM = 1.15
"""Up to this scale a view shows nearly all of the slice."""

EQUALISE_TILES = 8
_LUNG_FLOOR_HU = LUNG_WINDOW_CENTRE_HU - LUNG_WINDOW_WIDTH_HU / 2


def plain(item: TrainingSlice, side: int) -> tuple[Tensor, Tensor]:
    """Image and mask as they are served: lung window, no augmentation. Both float32 (1, side, side), mask 0 or 1.

    The mask of a slice that nobody has outlined is empty.
    """
    grey = _window(item.pixels, _LUNG_FLOOR_HU, LUNG_WINDOW_WIDTH_HU) if item.hounsfield else _unit(item.pixels)
    image, mask = torch.from_numpy(grey)[None, None], torch.from_numpy(_outlined(item).astype(np.float32))[None, None]
    size = (side, side)
    image = functional.interpolate(image, size, mode="bilinear", antialias=True).clamp(0.0, 1.0)
    mask = functional.interpolate(mask, size, mode="bilinear", antialias=True) >= 0.5
    return image[0], mask[0].float()


def augmented(
    item: TrainingSlice, side: int, zoom: tuple[float, float], opacity_probability: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A random view of a slice. Image and mask are float32 (1, side, side), in 0..1; the mask is 0 or 1.

    A slice whose lesion nobody has outlined stays whole, or its label might no longer hold; its mask is empty.
    """
    pixels: NDArray[np.generic] = item.pixels
    mask = _outlined(item)
    if item.mask is None:
        zoom = (min(zoom[0], WHOLE_ZOOM), min(zoom[1], WHOLE_ZOOM))
    if item.hounsfield and not item.positive and rng.random() < opacity_probability:
        pixels, mask = add_opacity(pixels.astype(np.float32), rng)
    untouched = rng.random() < PLAIN_PROBABILITY
    grey = _grey_values(pixels, item.hounsfield, untouched, rng)
    stacked = torch.from_numpy(np.stack([grey, mask.astype(np.float32)]))[None]  # (1, 2, rows, cols)
    image, moved_mask = _move(stacked, side, zoom, rng)
    if not untouched:
        image = _degrade(_tone(image, rng), rng)
    return image, moved_mask


def _outlined(item: TrainingSlice) -> NDArray[np.bool_]:
    return np.zeros(item.pixels.shape, dtype=np.bool_) if item.mask is None else item.mask


def _grey_values(
    pixels: NDArray[np.generic], hounsfield: bool, untouched: bool, rng: np.random.Generator
) -> NDArray[np.float32]:
    if not hounsfield:
        return _unit(pixels) if untouched else _tone_window(_unit(pixels), rng)
    if untouched:
        return _window(pixels, _LUNG_FLOOR_HU, LUNG_WINDOW_WIDTH_HU)
    if (
        rng.random() < EQUALISE_PROBABILITY
    ):  # as the 8-bit lesion slices were made, or they would be told apart by their look
        wide = _window(pixels, -1024.0, rng.uniform(1400.0, 3000.0))
        return equalise(wide, clip=rng.uniform(1.5, 7.0))
    floor = _LUNG_FLOOR_HU + rng.uniform(-50.0, 150.0)
    return _window(pixels, floor, LUNG_WINDOW_WIDTH_HU * rng.uniform(0.75, 1.25))


def _window(hounsfield: NDArray[np.generic], floor: float, width: float) -> NDArray[np.float32]:
    return np.clip((hounsfield.astype(np.float32) - np.float32(floor)) / np.float32(width), 0.0, 1.0)


def _unit(grey: NDArray[np.generic]) -> NDArray[np.float32]:
    return grey.astype(np.float32) / np.float32(255.0)


def _tone_window(grey: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Stretch the dark end, as a lung window does: soft tissue of an equalised slice is mid-grey, in the lung window
    white.
    """
    floor, width = rng.uniform(0.0, 0.08), rng.uniform(0.5, 1.0)
    return np.clip((grey - np.float32(floor)) / np.float32(width), 0.0, 1.0)


def equalise(grey: NDArray[np.float32], clip: float) -> NDArray[np.float32]:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994) of float32 (rows, cols) in 0..1, 8x8 tiles."""
    levels = np.rint(grey * 255.0).astype(np.intp)
    rows, cols = levels.shape
    tile_row, tile_col = (np.arange(size) * EQUALISE_TILES // size for size in (rows, cols))
    tile = tile_row[:, None] * EQUALISE_TILES + tile_col[None, :]
    tiles = EQUALISE_TILES**2
    counts = np.bincount((tile * 256 + levels).ravel(), minlength=tiles * 256).reshape(tiles, 256).astype(np.float32)
    limit = clip * counts.sum(axis=1, keepdims=True) / 256.0
    excess = np.maximum(counts - limit, 0.0).sum(axis=1, keepdims=True)
    curves = np.cumsum(np.minimum(counts, limit) + excess / 256.0, axis=1)
    curves = (curves / curves[:, -1:]).reshape(EQUALISE_TILES, EQUALISE_TILES, 256)
    return _between_tiles(curves, levels)


def _between_tiles(curves: NDArray[np.float32], levels: NDArray[np.intp]) -> NDArray[np.float32]:
    def neighbours(size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
        position = ((np.arange(size) + 0.5) * EQUALISE_TILES / size - 0.5).clip(0.0, EQUALISE_TILES - 1.0)
        low = np.floor(position).astype(np.intp)
        return low, np.minimum(low + 1, EQUALISE_TILES - 1), (position - low).astype(np.float32)

    top, bottom, down = neighbours(levels.shape[0])
    left, right, across = neighbours(levels.shape[1])
    down, across = down[:, None], across[None, :]
    upper = curves[top[:, None], left[None], levels] * (1 - across) + curves[top[:, None], right[None], levels] * across
    lower = (
        curves[bottom[:, None], left[None], levels] * (1 - across)
        + curves[bottom[:, None], right[None], levels] * across
    )
    return np.asarray(upper * (1 - down) + lower * down, dtype=np.float32)


def _move(stacked: Tensor, side: int, zoom: tuple[float, float], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Flip, rotate, scale, shift both planes of (1, 2, rows, cols) alike; the image is resampled bicubic, the mask
    bilinear.
    """
    scale = math.exp(rng.uniform(math.log(zoom[0]), math.log(zoom[1])))
    if stacked.shape[-1] / scale / side > 1.6:  # more than 1.6 pixels to one: average first, or fine texture aliases
        stacked = functional.avg_pool2d(stacked, 2)
    angle = math.radians(rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES))
    stretch = math.exp(rng.uniform(-0.1, 0.1))
    slack = max(0.0, 1.0 - 1.0 / scale) + 0.05
    flips = rng.choice([-1.0, 1.0], size=2, p=[0.4, 0.6])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = turn @ np.diag([flips[0] * stretch / scale, flips[1] / stretch / scale])
    shift = rng.uniform(-slack, slack, size=(2, 1))
    theta = torch.from_numpy(np.hstack([linear, shift]).astype(np.float32))[None]
    grid = functional.affine_grid(theta, [1, 1, side, side], align_corners=False)
    image = functional.grid_sample(stacked[:, :1], grid, mode="bicubic", align_corners=False).clamp(0.0, 1.0)
    mask = functional.grid_sample(stacked[:, 1:], grid, mode="bilinear", align_corners=False) >= 0.5
    return image[0], mask[0].float()


def _tone(image: Tensor, rng: np.random.Generator) -> Tensor:
    gamma = math.exp(rng.normal(0.0, 0.25))
    contrast, brightness = rng.uniform(0.8, 1.2), rng.uniform(-0.08, 0.08)
    return ((image.pow(gamma) - 0.5) * contrast + 0.5 + brightness).clamp(0.0, 1.0)


def _degrade(image: Tensor, rng: np.random.Generator) -> Tensor:
    if rng.random() < 0.3:
        image = _soften(image, rng.uniform(0.4, 1.5))
    if rng.random() < 0.4:
        noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
        if rng.random() < 0.5:  # reconstruction noise of CT is correlated between neighbours
            noise = 2.0 * _soften(noise, 0.8)
        image = (image + float(rng.uniform(0.01, 0.06)) * noise).clamp(0.0, 1.0)
    if rng.random() < 0.15:
        image = _through_jpeg(image, quality=int(rng.integers(25, 85)))
    return image


def _soften(image: Tensor, sigma: float) -> Tensor:
    offsets = torch.arange(-3, 4, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = functional.pad(image[None], (3, 3, 3, 3), mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel.view(1, 1, 1, 7)), kernel.view(1, 1, 7, 1))[0]


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray((image[0].numpy() * 255.0).round().astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as decoded:
        return torch.from_numpy(_unit(np.asarray(decoded)))[None]
