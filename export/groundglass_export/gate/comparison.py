"""What is compared: two engines, the scans, and how slices are put to an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from groundglass.errors import ModelError, ParityError
from groundglass_export.engine import Answers, Engine
from groundglass_export.gate.figures import SliceKey


class Preprocess(Protocol):
    """What makes the network's image of a slice; ``engine.OnnxPreprocess`` is one."""

    def image(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
        """int16 (rows, cols), Hounsfield units -> float32 (1, 512, 512) in 0..1."""


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
    """What is compared on which scans. Both engines see the images of one ``preprocess``."""

    reference: Engine
    candidate: Engine
    preprocess: Preprocess
    scans: Sequence[GateScan]

    def image(self, key: SliceKey) -> NDArray[np.float32]:
        """The image of one slice, float32 (1, 512, 512). Raises what the scan and ``preprocess`` raise."""
        scan = next(scan for scan in self.scans if scan.name == key[0])
        return self.preprocess.image(scan.hu(key[1]))


def ask(engine: Engine, keys: Sequence[SliceKey], images: NDArray[np.float32]) -> Answers:
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
