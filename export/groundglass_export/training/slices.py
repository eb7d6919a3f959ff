"""Training slices in memory, read from the sources of a recipe."""

from __future__ import annotations

import bisect
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydicom.errors import InvalidDicomError

from groundglass.errors import SettingError
from groundglass_export.training.recipe import Source

MASK_MIDPOINT = 128
"""Mask images hold 0 and 255; an image format with losses may blur them."""


@dataclass(frozen=True, slots=True)
class TrainingSlice:
    """One slice and its lesions.

    ``pixels``: (rows, cols), int16 Hounsfield units if ``hounsfield``, else uint8 grey values. ``mask``: bool (rows,
    cols).
    """

    name: str
    scan: str
    pixels: NDArray[np.int16] | NDArray[np.uint8]
    mask: NDArray[np.bool_]
    hounsfield: bool


@dataclass(frozen=True, slots=True)
class Split:
    """A source's slices, divided by scan."""

    source: Source
    training: tuple[TrainingSlice, ...]
    validation: tuple[TrainingSlice, ...]


def read_source(source: Source, data_root: Path) -> Split:
    """All slices of a source. Raises SettingError naming the file that is missing, unreadable, or of another size."""
    folder = data_root / source.folder
    if not folder.is_dir():
        raise SettingError(f"{folder}: no such folder; the recipe names it as a source of training data")
    read = {"masked_images": _masked_images, "healthy_series": _series, "labelled_series": _series}[source.kind]
    scans = read(source, data_root)
    if not any(scans):
        raise SettingError(f"{folder}: no slice found; expected {source.kind.replace('_', ' ')}")
    held_out = set(source.validation_scans)
    return Split(
        source,
        tuple(item for number, scan in enumerate(scans) if number not in held_out for item in scan),
        tuple(item for number, scan in enumerate(scans) if number in held_out for item in scan),
    )


def read_series_hu(folder: Path) -> dict[str, NDArray[np.int16]]:
    """A DICOM series as file name -> int16 (rows, cols) HU, head to feet. Raises SettingError naming an unreadable
    file.
    """
    found = [_read_slice(path) for path in sorted(folder.glob("*.dcm"))]
    return {name: pixels for _, name, pixels in sorted(found, key=lambda item: -item[0])}


def _read_slice(path: Path) -> tuple[float, str, NDArray[np.int16]]:
    try:
        dataset = pydicom.dcmread(path)
        stored = dataset.pixel_array.astype(np.float32)
        hounsfield = stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        height_mm = float(dataset.ImagePositionPatient[2])
    except (OSError, InvalidDicomError, AttributeError, ValueError, RuntimeError) as error:
        raise SettingError(f"{path} is no readable CT slice: {error}") from error
    return height_mm, path.name, np.rint(hounsfield).clip(-32768, 32767).astype(np.int16)


def _series(source: Source, data_root: Path) -> list[list[TrainingSlice]]:
    slices = read_series_hu(data_root / source.folder)
    wanted = set(slices)
    if source.kind == "labelled_series":
        wanted &= {name for name, infected in read_labels(data_root / source.labels).items() if not infected}
    scan = source.folder
    return [
        [
            TrainingSlice(n, scan, hu, np.zeros(hu.shape, dtype=np.bool_), True)
            for n, hu in slices.items()
            if n in wanted
        ]
    ]


def read_labels(path: Path) -> dict[str, bool]:
    """Slice labels: file name -> infected. Raises SettingError when the file is no such list, or is empty."""
    try:
        labels = {str(row["file"]): bool(row["infected"]) for row in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{path}: expected a JSON list of {{file, infected}}: {error!r}") from error
    if not labels:
        raise SettingError(f"{path}: the list of labels is empty")
    return labels


def _masked_images(source: Source, data_root: Path) -> list[list[TrainingSlice]]:
    scans: list[list[TrainingSlice]] = [[] for _ in source.scan_starts]
    for path in sorted((data_root / source.folder).glob("*.png")):
        number = int("".join(re.findall(r"\d+", path.stem)) or 0)
        scan = max(bisect.bisect_right(source.scan_starts, number) - 1, 0)
        image = _read_grey(path)
        mask = _read_grey(data_root / source.masks / path.name) >= MASK_MIDPOINT
        if mask.shape != image.shape:
            raise SettingError(f"{path}: image {image.shape}, but its mask is {mask.shape}; expected the same size")
        scans[scan].append(TrainingSlice(path.name, f"{source.folder}#{scan}", image, mask, False))
    return scans


def _read_grey(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"), dtype=np.uint8)
    except (OSError, UnidentifiedImageError) as error:
        raise SettingError(f"{path} is no readable image: {error}") from error
