"""What is compared: two engines, the scans, and how slices are put to an engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from groundglass.errors import ModelError, ParityError
from groundglass_export.answers import Answers, Engine, Given
from groundglass_export.gate.figures import SliceKey


class Preprocess(Protocol):
    """What makes of a slice what the engines are given; ``engine.OnnxPreprocess`` makes the network's image."""

    def image(self, hu: NDArray[np.int16]) -> Given:
        """int16 (rows, cols), Hounsfield units -> one slice of :data:`Given`."""


@dataclass(frozen=True, slots=True)
class GateScan:
    """A scan to compare on: ``hu(index)`` gives slice ``index`` of ``count``, head to feet, int16 (rows, cols).

    Slices are asked for when they are needed, and some of them again later: for the batch check and the picture.
    """

    name: str
    count: int
    hu: Callable[[int], NDArray[np.int16]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared on which scans. Both engines are given what one ``preprocess`` makes of a slice."""

    reference: Engine
    candidate: Engine
    preprocess: Preprocess
    scans: Sequence[GateScan]

    def image(self, key: SliceKey) -> Given:
        """What the engines are given of one slice. Raises what the scan and ``preprocess`` raise."""
        scan = next(scan for scan in self.scans if scan.name == key[0])
        return self.preprocess.image(scan.hu(key[1]))


def slice_bytes(hu: NDArray[np.int16]) -> bytes:
    """A slice, int16 (rows, cols), as digests take it: its shape, then Hounsfield units, little-endian."""
    return f"slice of {hu.shape}\n".encode() + np.ascontiguousarray(hu, dtype="<i2").tobytes()


def slice_digest(hu: NDArray[np.int16]) -> str:
    """SHA-256 of a slice, int16 (rows, cols), in hexadecimal: the same for the same Hounsfield units."""
    return hashlib.sha256(slice_bytes(hu)).hexdigest()


def require_scans(scans: Sequence[GateScan]) -> None:
    """Raise ParityError for scans that can't be told apart, for a scan without slices, and for no scan at all."""
    names = [scan.name for scan in scans]
    if len(set(names)) != len(names):
        raise ParityError(f"scans of the same name given: {', '.join(sorted(names))}; name each scan once")
    if not names or min(scan.count for scan in scans) < 1:
        raise ParityError("there is a scan without slices, or no scan at all: nothing is proved by none")


def ask(engine: Engine, keys: Sequence[SliceKey], images: Given) -> Answers:
    """An engine's answers to the slices ``keys``. Raises ParityError, naming them, when it has none."""
    where = f"{engine.precision} {engine.name}, {len(keys)} slices from {keys[0][0]} slice {keys[0][1]}"
    try:
        answers = engine.answers(images)
    except ModelError as error:
        raise ParityError(f"{where}: no answer, so nothing is proved: {error}") from error
    shapes = {answers.mask.shape[0], answers.pixels.shape[0], answers.positive.shape[0]}
    if shapes != {len(images)}:
        raise ParityError(f"{where}: answers of {sorted(shapes)} rows came back")
    return answers
