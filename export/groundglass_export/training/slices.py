"""Training slices in memory, read from the sources of a recipe."""

from __future__ import annotations

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
from groundglass_export.evaluation.truth import read_mask, read_slice_labels
from groundglass_export.file_names import PICTURES, fold_of, publication, scan_of
from groundglass_export.training.recipe import Source


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
        labels = read_slice_labels(data_root / source.labels, source.label_key)
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
            if path.suffix.lower() not in PICTURES:
                continue
            item = _labelled(path.name, publication(path.name), _read_grey(path), positive, hounsfield=False)
            folds[fold_of(item.scan, source.folds)].append(item)
    return folds


def _masked_images(source: Source, data_root: Path) -> list[list[TrainingSlice]]:
    scans: list[list[TrainingSlice]] = [[] for _ in source.scan_starts]
    empty = True
    for path in sorted((data_root / source.folder).glob("*.png")):
        scan = scan_of(path, source.scan_starts)
        image = _read_grey(path)
        mask = read_mask(data_root / source.masks / path.name, (image.shape[0], image.shape[1]))
        empty = empty and not mask.any()
        scans[scan].append(TrainingSlice(path.name, f"{source.folder}#{scan}", image, mask, False))
    if any(scans) and empty:
        raise SettingError(f"{data_root / source.masks}: no mask holds a lesion pixel")
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
