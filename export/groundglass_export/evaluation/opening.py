"""The slices of a labelled set, opened and paired with their truth before any network runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from groundglass.errors import SettingError
from groundglass.study import SliceSource, Study
from groundglass_export.evaluation.labelled_set import (
    HealthySeries,
    LabelledImages,
    LabelledSeries,
    LabelledSet,
    MaskedImages,
    SetSource,
)
from groundglass_export.evaluation.truth import labels_in_order, read_mask, read_slice_labels, served_size
from groundglass_export.file_names import PICTURES, fold_of, publication, running_number, scan_of


class Intake(Protocol):
    """What reads studies: the client's ``intake``, so that all are given the slices that it would send."""

    def open_study(self, path: Path) -> AbstractContextManager[Study]:
        """The study at ``path``, as long as the context lasts. Raises StudyError, naming the file."""

    def decode_hu(self, source: SliceSource) -> NDArray[np.int16]:
        """int16 (rows, columns), Hounsfield units; of an 8-bit picture, those that the lung window shows as its
        greys. Raises StudyError, naming the file.
        """


@dataclass(frozen=True, slots=True, eq=False)
class LabelledScan:
    """Slices that travel as one study, and their truth, slice by slice.

    ``labels`` say whether a slice shows a lesion. ``masks``: uint8 (n, 512, 64), the expert's masks on the served grid,
    1 bit a pixel as in ``contract.MASK``, or None. ``groups`` name what slices have in common, their scan or their
    publication: slices of one group are not independent. ``is_scan`` is false for single images;
    ``scan_positive`` is the truth of a scan where it is known otherwise than by its slices.
    """

    name: str
    study: Study
    labels: tuple[bool, ...]
    groups: tuple[str, ...]
    masks: NDArray[np.uint8] | None = None
    is_scan: bool = True
    scan_positive: bool | None = None


@dataclass(frozen=True, slots=True)
class LabelledSource:
    """A source of the set, opened."""

    source: SetSource
    scans: tuple[LabelledScan, ...]


@contextmanager
def opened_set(labelled: LabelledSet, root: Path, intake: Intake) -> Iterator[tuple[LabelledSource, ...]]:
    """Every source with its truth, as long as the context lasts; pixels are decoded later. Paths start from ``root``.

    Raises SettingError for truth that is missing or does not fit, and StudyError for slices that can't be read.
    """
    if not root.is_dir():
        raise SettingError(f"{root}: no such folder; the paths of {labelled.file} start from the data folder, --data")
    with ExitStack() as stack:
        yield tuple(LabelledSource(source, _scans(source, root, intake, stack)) for source in labelled.sources)


def slice_total(sources: Sequence[LabelledSource]) -> int:
    """How many slices will be asked for."""
    return sum(len(scan.labels) for source in sources for scan in source.scans)


def _scans(source: SetSource, root: Path, intake: Intake, stack: ExitStack) -> tuple[LabelledScan, ...]:
    if isinstance(source, MaskedImages):
        return tuple(_masked_scans(source, root, intake))
    if isinstance(source, LabelledSeries):
        study = stack.enter_context(intake.open_study(root / source.folder))
        path = root / source.labels
        labels = labels_in_order(read_slice_labels(path, source.label_key), study.slices, path)
        return (
            LabelledScan(source.name, study, labels, _one_group(source, study), scan_positive=source.scan_positive),
        )
    if isinstance(source, HealthySeries):
        study = stack.enter_context(intake.open_study(root / source.folder))
        labels = (False,) * len(study.slices)
        return (LabelledScan(source.name, study, labels, _one_group(source, study), scan_positive=False),)
    if isinstance(source, LabelledImages):
        return (_labelled_images(source, root, intake),)
    raise TypeError(f"no way to open {type(source).__name__}")


def _one_group(source: SetSource, study: Study) -> tuple[str, ...]:
    return (source.name,) * len(study.slices)


def _masked_scans(source: MaskedImages, root: Path, intake: Intake) -> Iterator[LabelledScan]:
    files: dict[int, list[Path]] = {}
    for path in _pictures(root / source.folder):
        files.setdefault(scan_of(path, source.scan_starts), []).append(path)
    for scan in source.scans or range(len(source.scan_starts)):
        if scan not in files:
            raise SettingError(
                f"{root / source.folder}: no image of scan {scan}, which starts at {source.scan_starts[scan]}"
            )
        study = _picture_study(root / source.folder, sorted(files[scan], key=running_number), intake)
        masks = [_served_mask(root / source.masks / item.file, item) for item in study.slices]
        name = f"{source.name} scan {scan}"
        yield LabelledScan(
            name=name,
            study=study,
            labels=tuple(bool(mask.any()) for mask in masks),
            groups=(name,) * len(masks),
            masks=np.stack([np.packbits(served_size(mask), axis=1) for mask in masks]),
            scan_positive=source.scan_positive,
        )


def _served_mask(path: Path, item: SliceSource) -> NDArray[np.bool_]:
    mask = read_mask(path, (item.rows, item.columns))
    if mask.any() and not served_size(mask).any():
        raise SettingError(f"{path}: its lesion is too small to be seen at 512 x 512; leave the slice out of the set")
    return mask


def _labelled_images(source: LabelledImages, root: Path, intake: Intake) -> LabelledScan:
    positive, negative = (_of_folds(source, root / folder) for folder in (source.positive, source.negative))
    files = [*positive, *negative]
    return LabelledScan(
        name=source.name,
        study=_picture_study(root, files, intake),
        labels=(True,) * len(positive) + (False,) * len(negative),
        groups=tuple(f"{source.name} {publication(path.name)}" for path in files),
        is_scan=False,
    )


def _of_folds(source: LabelledImages, folder: Path) -> list[Path]:
    files = _pictures(folder)
    wanted = source.fold_numbers or range(source.folds)
    return [path for path in files if fold_of(publication(path.name), source.folds) in wanted]


def _pictures(folder: Path) -> list[Path]:
    """PNG and JPEG files, by the numbers in their names. Raises SettingError without any, or beside anything else."""
    if not folder.is_dir():
        raise SettingError(f"{folder}: no such folder; the labelled set names it as a folder of images")
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    if others := sorted(path.name for path in files if path.suffix.lower() not in PICTURES):
        raise SettingError(f"{folder}: {others[0]} is neither PNG nor JPEG; a folder of the set holds images only")
    if not files:
        raise SettingError(f"{folder}: no PNG or JPEG image found")
    return sorted(files, key=lambda path: (_natural(path.name), path.name))


def _picture_study(root: Path, files: Sequence[Path], intake: Intake) -> Study:
    """Images of any sizes as one study, in the order given; each is opened on its own, as intake would alone."""
    with ExitStack() as stack:
        studies = [stack.enter_context(intake.open_study(path)) for path in files]
    slices = (replace(study.slices[0], index=index, file=files[index].name) for index, study in enumerate(studies))
    series = replace(studies[0].series, slice_count=len(files))
    return replace(studies[0], root=root, slices=tuple(slices), series=series)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name.lower())]
