"""What experts say of a slice: a mask of its lesions, or a label; and what they say of where images come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groundglass.contract import IMAGE_SIDE
from groundglass.errors import SettingError
from groundglass.study import SliceSource

LESION_FROM_GREY: Final = 128
"""Mask images hold 0 and 255; an image format with losses may blur them."""

_HALF: Final = 0.5


def read_mask(path: Path, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The lesion mask of a slice of ``shape``, bool in that shape.

    Raises SettingError when the file is missing, unreadable, of another size, or when none of its greys reaches 128
    though some are above 0: a mask of zeros and ones would else be read as one without lesions.
    """
    if not path.is_file():
        raise SettingError(f"{path}: no such mask; an image with masks has one of the same name for every slice")
    try:
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        raise SettingError(f"{path} is no readable mask ({type(error).__name__}: {error})") from error
    if grey.shape != shape:
        raise SettingError(
            f"{path}: a mask of {grey.shape[0]} x {grey.shape[1]} for an image of {shape[0]} x {shape[1]}; "
            "expected the same size"
        )
    if 0 < grey.max() < LESION_FROM_GREY:
        raise SettingError(
            f"{path}: a mask with greys up to {grey.max()}; lesion is 255 (from {LESION_FROM_GREY}) of 255"
        )
    return grey >= LESION_FROM_GREY


def served_size(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask on the grid of the served one: bool (rows, cols) -> bool (512, 512).

    That is where the mask, its pixel count and the thresholds are defined, so no decision of the model is resampled,
    and a slice that the model saw stretched is compared as stretched. The resampling is the one of training: linear
    between pixel centres, averaging where it shrinks, cut at one half. Of a 256x256 mask every pixel becomes exactly
    2x2; a 512x512 mask stays as it is; a much smaller one has its corners rounded.
    """
    if mask.shape == (IMAGE_SIDE, IMAGE_SIDE):
        return mask
    smooth = Image.fromarray(mask.astype(np.float32)).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(smooth) >= _HALF


def read_slice_labels(path: Path, key: str) -> dict[str, bool]:
    """File name -> positive. Raises SettingError for a file that is missing, empty, or no list of labels."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"{path}: no such file; expected the slice labels of a series") from None
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise SettingError(f"{path}: expected a JSON list of labels with at least one entry")
    labels: dict[str, bool] = {}
    for place, row in enumerate(rows):
        file, label = _label(path, place, row, key)
        if labels.setdefault(file, label) != label:
            raise SettingError(f"{path}: {file} is labelled twice, 0 and 1")
    return labels


def labels_in_order(labels: dict[str, bool], slices: Sequence[SliceSource], path: Path) -> tuple[bool, ...]:
    """The label of every slice, in the order of ``slices``. ``path`` is the file of labels, for messages.

    A label names a file by its path in the study, or by its name alone. Raises SettingError when a slice has no label,
    when a label has no slice, or when one file holds several slices.
    """
    places = {source.file: place for place, source in enumerate(slices)}
    if len(places) != len(slices):
        raise SettingError(f"{path}: a file of the series holds several slices; labels by file can't tell them apart")
    bare = {PurePosixPath(file).name: place for file, place in places.items()}
    if surplus := [file for file in labels if file not in places and file not in bare]:
        raise SettingError(
            f"{path}: {len(surplus)} of {len(labels)} labels name no slice of the series, which has {len(slices)}; the "
            f"first is {surplus[0]}"
        )
    by_place = {places.get(file, bare.get(file)): label for file, label in labels.items()}
    if missing := [source.file for place, source in enumerate(slices) if place not in by_place]:
        raise SettingError(f"{path}: {len(missing)} of {len(slices)} slices have no label; the first is {missing[0]}")
    return tuple(by_place[place] for place in range(len(slices)))


def _label(path: Path, place: int, row: Any, key: str) -> tuple[str, bool]:
    if not isinstance(row, dict) or not isinstance(row.get("file"), str):
        raise SettingError(f"{path}: entry {place} names no file; expected {{file, {key}}}")
    if row.get(key) not in (0, 1):
        found = repr(row[key]) if key in row else f"no {key}"
        raise SettingError(f"{path}: the label of {row['file']} has {found}; expected {key} to be 0 or 1")
    return row["file"], bool(row[key])
