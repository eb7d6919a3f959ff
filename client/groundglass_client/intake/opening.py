"""A path -> a study: find the files, read their headers, choose a series, put its slices in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from groundglass.errors import GeometryError, NoSeries, NotACtSlice, StudyError, UnreadableFile
from groundglass.study import Refusal, Series, SliceSource, Study
from groundglass_client.intake.files import study_files
from groundglass_client.intake.geometry import (
    Placed,
    Spacing,
    measure_spacing,
    odd_frames,
    part_doubles,
    place,
    slice_normal,
    tilt_degrees,
)
from groundglass_client.intake.header import read_frames
from groundglass_client.intake.kind import Kind, kind_of
from groundglass_client.intake.pictures import read_picture
from groundglass_client.intake.series import FrameSeries, choose, group
from groundglass_client.intake.slices import DicomSlice, FoundFile, Frame, PictureSlice


@contextmanager
def open_study(path: Path, *, skip_bad: bool = False, series: str | None = None) -> Iterator[Study]:
    """The study at ``path``, as long as the context lasts: what was unpacked from a zip file is removed afterwards.

    ``series`` names one by its UID or number; else the axial CT series with most slices is taken. A file that is broken
    or does not fit its series raises; with ``skip_bad`` it is counted in ``refused``, and the rest is opened.

    Raises UnreadableFile, NotACtSlice (for a single file), NoSeries, GeometryError; each names the file.
    """
    with study_files(path) as files:
        intake = _Intake(path, skip_bad)
        intake.read(files)
        yield intake.study(series)


class _Intake:
    """The files of one study, on their way into it: read, left out with a reason, or raised."""

    def __init__(self, root: Path, skip_bad: bool) -> None:
        self._root = root
        self._skip_bad = skip_bad
        self._frames: list[Frame] = []
        self._pictures: list[FoundFile] = []
        self._refused: list[Refusal] = []
        self._ignored: list[Refusal] = []

    def read(self, files: Sequence[FoundFile]) -> None:
        """Read every file's header. Pictures count only where there is no DICOM: beside it they are screenshots."""
        for file in files:
            try:
                self._read_file(file)
            except NotACtSlice as error:
                if self._single:
                    raise
                self._ignored.append(_refusal(file, error))
            except (UnreadableFile, GeometryError) as error:
                self._refuse(file, error)
        self._read_pictures()

    def _read_file(self, file: FoundFile) -> None:
        if kind_of(file) is Kind.DICOM:
            self._frames.extend(read_frames(file))
        else:
            self._pictures.append(file)

    def _read_pictures(self) -> None:
        beside_dicom = bool(self._frames)
        for file in self._pictures:
            if beside_dicom:
                self._ignored.append(Refusal(file.name, "is a picture beside DICOM files"))
                continue
            try:
                self._frames.append(read_picture(file))
            except UnreadableFile as error:
                self._refuse(file, error)

    @property
    def _single(self) -> bool:
        return self._root.is_file() and self._root.suffix.lower() != ".zip" and self._root.name.upper() != "DICOMDIR"

    def _refuse(self, file: FoundFile, error: StudyError) -> None:
        """Count a file that can't be used, or raise: a single file is never skipped, since nothing would be left."""
        if not self._skip_bad or self._single:
            raise error
        self._refused.append(_refusal(file, error))

    def study(self, wanted: str | None) -> Study:
        """The chosen series in order. Raises NoSeries and GeometryError."""
        candidates = group(self._frames)
        if not candidates:
            raise NoSeries(f"{self._root}: {self._nothing_found()}")
        chosen = choose(candidates, wanted, str(self._root))
        frames = self._without_odd(chosen.frames)
        placed, doubles = part_doubles(place(frames))
        spacing = measure_spacing(placed)
        return Study(
            root=self._root,
            series=_described(FrameSeries(tuple(item.frame for item in placed)), spacing),
            slices=tuple(_source(item, index) for index, item in enumerate(placed)),
            gaps=spacing.gaps,
            duplicates=tuple(_double(item, taken_by) for item, taken_by in doubles),
            refused=tuple(self._refused),
            ignored=tuple(self._ignored),
            other_series=tuple(series.describe() for series in candidates if series is not chosen),
        )

    def _without_odd(self, frames: Sequence[Frame]) -> list[Frame]:
        odd = odd_frames(frames)
        for index, reason in odd.items():
            file = frames[index].file
            self._refuse(file, GeometryError(f"{file.name}: {reason}"))
        return [frame for index, frame in enumerate(frames) if index not in odd]

    def _nothing_found(self) -> str:
        left_out = [*self._refused, *self._ignored]
        if not left_out:
            return "holds no file"
        example = left_out[0]
        return f"holds no CT slice; {len(left_out)} files were left out, the first is {example.file}: {example.reason}"


def _refusal(file: FoundFile, error: StudyError) -> Refusal:
    return Refusal(file.name, str(error).removeprefix(f"{file.name}: "))


def _double(item: Placed, taken_by: Placed) -> Refusal:
    return Refusal(item.frame.label, f"lies at {item.position_mm:.2f} mm, as {taken_by.frame.label} does")


def _described(series: FrameSeries, spacing: Spacing) -> Series:
    normal = slice_normal(series.first)
    return dataclasses.replace(
        series.describe(),
        spacing_mm=spacing.median_mm,
        spacing_range_mm=spacing.range_mm,
        tilt_degrees=None if normal is None else tilt_degrees(normal),
    )


def _source(item: Placed, index: int) -> SliceSource:
    frame = item.frame
    place_in_study = (index, frame.file.path, frame.file.name, frame.frame, frame.rows, frame.columns, item.position_mm)
    return PictureSlice(*place_in_study) if frame.pixels is None else DicomSlice(*place_in_study, frame.pixels)
