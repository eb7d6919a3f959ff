"""The studies that are sent: DICOM on disk, repeated to any length, or slices that lie decoded in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import IMAGE_SIDE
from groundglass.study import Series, SliceSource, Study
from groundglass_client.chunk import DecodeHu
from groundglass_client.intake import decode_hu, open_study
from groundglass_client.phantom import PhantomSettings, write_phantom

POOL_SLICES: Final = 32
"""Distinct slices of a study in memory, 16 MiB: more than a processor's cache, and little beside a client's buffers."""

_LESION_SHARE: Final = (0.4, 0.6)


def repeated_study(study: Study, slices: int) -> Study:
    """``study`` brought to ``slices`` slices: its files over and over under new indices, or its first ones.

    Reading and decoding stay real work for every slice; positions repeat, and mean nothing.
    """
    sources = study.slices
    repeated = tuple(replace(sources[index % len(sources)], index=index) for index in range(slices))
    return replace(study, series=replace(study.series, slice_count=slices), slices=repeated, gaps=(), duplicates=())


@contextmanager
def opened_repeated(folder: Path, slices: int) -> Iterator[Study]:
    """The study at ``folder``, opened as often as its files must be repeated: a header is read for every slice."""
    with ExitStack() as stack:
        study = stack.enter_context(open_study(folder))
        for _ in range(len(study.slices), slices, len(study.slices)):
            stack.enter_context(open_study(folder))
        yield repeated_study(study, slices)


def study_folder(given: Path | None, scratch: Path, files: int, syntax: str) -> Path:
    """The user's study, or a phantom of ``files`` slices with a lesion in its middle, written once into ``scratch``."""
    if given is not None:
        return given
    folder = scratch / f"phantom-{syntax}-{files}"
    if not folder.exists():
        first, end = (round(files * share) for share in _LESION_SHARE)
        lesion = (first, end) if end > first else None
        write_phantom(PhantomSettings(slices=files, lesion=lesion, syntax=syntax), folder)
    return folder


def decoded(study: Study) -> DecodeHu:
    """A decoder that has every distinct slice of ``study`` already: int16 (rows, columns), HU."""
    distinct = {(source.path, source.frame): source for source in study.slices}
    pixels = {place: decode_hu(source) for place, source in distinct.items()}
    return lambda source: pixels[source.path, source.frame]


def memory_study(slices: int, side: int = IMAGE_SIDE) -> tuple[Study, DecodeHu]:
    """A study of noise that was never on disk, and its decoder, which only points at a pool of slices."""
    noise = np.random.default_rng(0)
    pool = noise.integers(-1000, 400, (min(slices, POOL_SLICES), side, side), dtype=np.int16)
    sources = tuple(
        SliceSource(index, Path("memory"), f"slice {index}", index % len(pool), side, side, float(-index))
        for index in range(slices)
    )
    return _described(sources, side), lambda source: pool[source.frame]


def pool_slices(count: int) -> NDArray[np.int16]:
    """``count`` slices of :func:`memory_study`, int16 (count, 512, 512), HU."""
    study, decode = memory_study(count)
    return np.stack([decode(source) for source in study.slices])


def _described(sources: Sequence[SliceSource], side: int) -> Study:
    series = Series(
        modality="CT",
        series_instance_uid=None,
        series_number=None,
        slice_count=len(sources),
        rows=side,
        columns=side,
        transfer_syntax=None,
        pixel_spacing_mm=None,
        spacing_mm=1.0,
        tilt_degrees=None,
    )
    return Study(Path("memory"), series, tuple(sources))
