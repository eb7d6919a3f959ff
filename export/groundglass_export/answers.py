"""What an engine says of slices, and the face that every engine has: a graph, a plan, a record, a version on a server.

Nothing here needs more than numpy, so that versions can be compared where no runtime of theirs is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Given = NDArray[Any]
"""Slices as an engine takes them. One that runs ``unet`` alone takes images, float32 (n, 1, 512, 512) in 0..1; one that
runs the whole of ``ct_scan`` takes Hounsfield units, int16 (n, rows, columns)."""


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What an engine says of n slices.

    mask: bool (n, 512, 512); pixels: int32 (n,), the engine's own count; positive: bool (n,). probability: float32
    (n, 512, 512), NaN where the engine's logit is not finite, or None when the engine does not show it.
    """

    mask: NDArray[np.bool_]
    pixels: NDArray[np.int32]
    positive: NDArray[np.bool_]
    probability: NDArray[np.float32] | None

    def __len__(self) -> int:
        return len(self.mask)

    def row(self, row: int) -> Answers:
        """The answer to one of the slices, as n = 1."""
        one = slice(row, row + 1)
        shown = None if self.probability is None else self.probability[one]
        return Answers(self.mask[one], self.pixels[one], self.positive[one], shown)


class Engine(Protocol):
    """One version of ``unet``, ready to run."""

    @property
    def name(self) -> str:
        """What a person calls it: mostly its file's name."""

    @property
    def precision(self) -> str:
        """``fp32``, ``fp16`` or ``int8``: which limits it is held to."""

    @property
    def digest(self) -> str:
        """SHA-256 of the model file, in hexadecimal."""

    def answers(self, slices: Given, /) -> Answers:
        """Run the slices, in the form that this engine takes. Raises ModelError when the engine fails on them."""
