"""Training slices in memory, read from the sources of a recipe."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydicom.errors import InvalidDicomError

from groundglass.errors import SettingError
from groundglass_export.publications import fold_of, publication
from groundglass_export.training.recipe import Source

MASK_MIDPOINT = 128
"""Mask images hold 0 and 255; an image format with losses may blur them."""


_PICTURES: Final = frozenset({".png", ".jpg", ".jpeg"})


@dataclass(frozen=True, slots=True)
class TrainingSlice:
    """One slice and its lesions.

    ``pixels``: (rows, cols), int16 Hounsfield units if ``hounsfield``, else uint8 grey values. ``mask``: bool (rows,
    cols), or None for a slice that shows a lesion nobody has outlined. ``scan``: the scan or publication it is from.
    """

    name: str
    scan: str
    pixels: NDArray[np.int16] | NDArray[np.uint8]
    mask: NDArray[np.bool_] | None
    hounsfield: bool

    @property
    def positive(self) -> bool:
        """Whether the slice shows a lesion."""
        return self.mask is None or bool(self.mask.any())


@dataclass(frozen=True, slots=True)
class Split:
    """A source's slices, divided by scan."""

    source: Source
    training: tuple[TrainingSlice, ...]
    validation: tuple[TrainingSlice, ...]


def read_source(source: Source, data_root: Path) -> Split:
    """All slices of a source. Raises SettingError naming the file that is missing, unreadable, or of another size."""
    folder = data_root / source.name
    for name in (source.folder, source.masks, source.positive, source.negative):
        if name and not (data_root / name).is_dir():
            raise SettingError(f"{data_root / name}: no such folder; the recipe names it as a source of training data")
    scans = _READERS[source.kind](source, data_root)
    if not any(scans):
        raise SettingError(f"{folder}: no slice found; expected {source.kind.replace('_', ' ')}")
    validation = {*source.validation_scans, *source.validation_folds}
    held_out = validation | {*source.test_scans, *source.test_folds}
    return Split(
        source,
        tuple(item for number, scan in enumerate(scans) if number not in held_out for item in scan),
        tuple(item for number, scan in enumerate(scans) if number in validation for item in scan),
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
    labels = dict.fromkeys(slices, False)
    if source.kind == "labelled_series":
        labels = read_labels(data_root / source.labels)
        if unknown := sorted(slices.keys() - labels.keys()):
            raise SettingError(f"{data_root / source.labels}: no label for {unknown[0]} of {source.folder}")
    return [[_labelled(name, source.folder, hu, labels[name], hounsfield=True) for name, hu in slices.items()]]


def _labelled(
    name: str, scan: str, pixels: NDArray[np.int16] | NDArray[np.uint8], positive: bool, *, hounsfield: bool
) -> TrainingSlice:
    mask = None if positive else np.zeros(pixels.shape, dtype=np.bool_)
    return TrainingSlice(name, scan, pixels, mask, hounsfield)


def _labelled_images(source: Source, data_root: Path) -> list[list[TrainingSlice]]:
    folds: list[list[TrainingSlice]] = [[] for _ in range(source.folds)]
    for folder, positive in ((source.positive, True), (source.negative, False)):
        for path in sorted((data_root / folder).iterdir()):
            if path.suffix.lower() not in _PICTURES:
                continue
            item = _labelled(path.name, publication(path.name), _read_grey(path), positive, hounsfield=False)
            folds[fold_of(item.scan, source.folds)].append(item)
    return folds


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
    empty = True
    for path in sorted((data_root / source.folder).glob("*.png")):
        number = int("".join(re.findall(r"\d+", path.stem)) or 0)
        scan = max(bisect.bisect_right(source.scan_starts, number) - 1, 0)
        image = _read_grey(path)
        mask = _read_grey(data_root / source.masks / path.name) >= MASK_MIDPOINT
        if mask.shape != image.shape:
            raise SettingError(f"{path}: image {image.shape}, but its mask is {mask.shape}; expected the same size")
        empty = empty and not mask.any()
        scans[scan].append(TrainingSlice(path.name, f"{source.folder}#{scan}", image, mask, False))
    if any(scans) and empty:
        raise SettingError(
            f"{data_root / source.masks}: no mask holds a lesion pixel ({MASK_MIDPOINT} or more); expected 0 and 255"
        )
    return scans


def _read_grey(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"), dtype=np.uint8)
    except (OSError, UnidentifiedImageError) as error:
        raise SettingError(f"{path} is no readable image: {error}") from error


_READERS: Final[Mapping[str, Callable[[Source, Path], list[list[TrainingSlice]]]]] = MappingProxyType(
    {
        "masked_images": _masked_images,
        "healthy_series": _series,
        "labelled_series": _series,
        "labelled_images": _labelled_images,
    }
)
"""By kind of source: its slices, one list a scan (or a fold of publications)."""
