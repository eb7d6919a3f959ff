"""The geometry of a series: slice normals, positions along them, holes and doubles (DICOM PS3.3 C.7.6.2)."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from groundglass.errors import GeometryError
from groundglass.study import Gap
from groundglass_client.intake.pictures import natural_key
from groundglass_client.intake.slices import Frame, Vector

GAP_FACTOR: Final = 1.5
"""Neighbours further apart than this many median spacings have a hole between them."""

SAME_POSITION_MM: Final = 0.01
"""Slices nearer than this lie at one position: files round positions to micrometres, and no CT samples as finely."""

_DIRECTION_TOLERANCE: Final = 1e-3
_SPACING_TOLERANCE_MM: Final = 1e-3
_LONG_AXIS: Final = 2


@dataclass(frozen=True, slots=True)
class Placed:
    """A frame and its place on the slice normal; None if the file has no geometry."""

    frame: Frame
    position_mm: float | None


def slice_normal(frame: Frame) -> Vector | None:
    """The unit normal of a slice, on the side of the head; None if the file gives no orientation.

    Raises GeometryError if the two directions do not span a plane.
    """
    if frame.orientation is None:
        return None
    (ax, ay, az), (bx, by, bz) = frame.orientation
    normal = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx  # numpy takes 0.1 ms a slice for this
    length = math.hypot(*normal)
    if abs(length - 1) > 0.1:  # both directions are unit vectors at a right angle; files round them to a few digits
        raise GeometryError(f"{frame.file.name}: its image orientation is no pair of perpendicular unit vectors")
    signed_length = math.copysign(length, normal[_LONG_AXIS])
    x, y, z = (part / signed_length for part in normal)
    return x, y, z


def tilt_degrees(normal: Vector) -> float:
    """The angle between a slice normal and the patient's long axis: 0 without gantry tilt."""
    return math.degrees(math.acos(min(1.0, abs(normal[_LONG_AXIS]))))


def odd_frames(frames: Sequence[Frame]) -> dict[int, str]:
    """The frames that do not belong to the volume that most frames make: their place in ``frames``, and the reason.

    Of two equally frequent geometries the one met first counts.
    """
    ((common, _),) = Counter(map(_rounded_geometry, frames)).most_common(1)
    reference = next(frame for frame in frames if _rounded_geometry(frame) == common)
    reasons = ((index, _difference(frame, reference)) for index, frame in enumerate(frames))
    return {index: reason for index, reason in reasons if reason}


def _rounded_geometry(frame: Frame) -> tuple[object, ...]:
    directions = [round(part, 3) for part in _flat(frame.orientation)]
    spacing = [round(part, 3) for part in frame.pixel_spacing_mm or ()]
    return frame.rows, frame.columns, *spacing, *directions, frame.position_mm is None


def _difference(frame: Frame, reference: Frame) -> str | None:
    """How a frame differs from the series' reference, in words; None if it fits."""
    if (frame.rows, frame.columns) != (reference.rows, reference.columns):
        return f"has {frame.rows} x {frame.columns} pixels, the series {reference.rows} x {reference.columns}"
    if (frame.position_mm is None) != (reference.position_mm is None):
        return "has no position in the patient" if frame.position_mm is None else "alone has a position in the patient"
    if not _close(frame.pixel_spacing_mm or (), reference.pixel_spacing_mm or (), _SPACING_TOLERANCE_MM):
        return f"has pixels of {frame.pixel_spacing_mm} mm, the series of {reference.pixel_spacing_mm} mm"
    if not _close(_flat(frame.orientation), _flat(reference.orientation), _DIRECTION_TOLERANCE):
        return "is oriented otherwise than the series"
    return None


def _flat(orientation: tuple[Vector, Vector] | None) -> tuple[float, ...]:
    return () if orientation is None else (*orientation[0], *orientation[1])


def _close(these: Sequence[float], those: Sequence[float], tolerance: float) -> bool:
    return len(these) == len(those) and all(abs(a - b) <= tolerance for a, b in zip(these, those, strict=True))


def place(frames: Sequence[Frame]) -> list[Placed]:
    """Frames of one geometry, head to feet.

    They are sorted by their position along the slice normal. Files without a position are sorted by their slice
    location, which rises to the head as the position does; without that by their instance number, as scanners count
    from the head. Raises GeometryError if none of the three orders them. Pictures follow their names.
    """
    if frames[0].pixels is None:
        return [Placed(frame, None) for frame in sorted(frames, key=lambda frame: natural_key(frame.file.name))]
    positions = _positions_mm(frames)
    if positions is None:
        return [Placed(frame, None) for frame in sorted(frames, key=_file_order)]
    placed = [Placed(frame, position) for frame, position in zip(frames, positions, strict=True)]
    return sorted(placed, key=lambda item: (-_known(item.position_mm), *_file_order(item.frame)))


def _positions_mm(frames: Sequence[Frame]) -> list[float] | None:
    """Millimetres along the slice normal, rising to the head; None if only the instance number orders the frames."""
    normal = slice_normal(frames[0])
    located = [frame.position_mm for frame in frames if frame.position_mm is not None]
    if normal is not None and len(located) == len(frames):
        return [float(np.dot(normal, position)) for position in located]
    table = [frame.table_position_mm for frame in frames if frame.table_position_mm is not None]
    if len(table) == len(frames) and (len(frames) == 1 or len({*table}) > 1):
        return table
    numbers = {frame.instance_number for frame in frames}
    if len(frames) == 1 or (None not in numbers and len(numbers) == len(frames)):
        return None
    raise GeometryError(
        f"{frames[0].file.name}: neither position, slice location nor instance number orders its series"
    )


def _known(position_mm: float | None) -> float:
    assert position_mm is not None  # noqa: S101 - an invariant: the frames of a list have positions, or none has
    return position_mm


def _file_order(frame: Frame) -> tuple[float, str, str, int]:
    """Tells frames at one position apart, the same way on every machine."""
    number = math.inf if frame.instance_number is None else frame.instance_number
    return number, frame.instance_uid, frame.file.name, frame.frame


def part_doubles(placed: Sequence[Placed]) -> tuple[list[Placed], list[tuple[Placed, Placed]]]:
    """The first frame of every position, and the others, each with the frame that took its place."""
    kept: list[Placed] = []
    doubles: list[tuple[Placed, Placed]] = []
    for item in placed:
        if kept and item.position_mm is not None and _known(kept[-1].position_mm) - item.position_mm < SAME_POSITION_MM:
            doubles.append((item, kept[-1]))
        else:
            kept.append(item)
    return kept, doubles


@dataclass(frozen=True, slots=True)
class Spacing:
    """Distances between neighbours along the slice normal, in mm, and the holes among them."""

    median_mm: float | None
    range_mm: tuple[float, float] | None
    gaps: tuple[Gap, ...]


def measure_spacing(kept: Sequence[Placed]) -> Spacing:
    """Median, least and largest distance, and the gaps, of frames sorted head to feet."""
    positions = [item.position_mm for item in kept if item.position_mm is not None]
    distances = [upper - lower for upper, lower in pairwise(positions)]
    if not distances:
        return Spacing(None, None, ())
    median = statistics.median(distances)
    gaps = (
        Gap(index, positions[index], positions[index + 1], distance)
        for index, distance in enumerate(distances)
        if distance > GAP_FACTOR * median
    )
    return Spacing(median, (min(distances), max(distances)), tuple(gaps))
