"""The rows of a scan: what the network found, slice by slice, gathered from chunks that come in any order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundglass.contract import IMAGE_SIDE, MASK_ROW_BYTES
from groundglass_client.requests import ChunkAnswer


@dataclass(frozen=True, slots=True)
class Rows:
    """Slice verdicts of a whole scan, head to feet: int32 (n,), bool (n,), uint8 (n, 512, 64) or None."""

    lesion_pixels: NDArray[np.int32]
    positive: NDArray[np.bool_]
    masks: NDArray[np.uint8] | None

    @classmethod
    def of(cls, slices: int, *, masks: bool) -> Rows:
        """Room for a scan. Memory of masks is only taken as they come."""
        return cls(
            np.zeros(slices, dtype=np.int32),
            np.zeros(slices, dtype=np.bool_),
            np.zeros((slices, IMAGE_SIDE, MASK_ROW_BYTES), dtype=np.uint8) if masks else None,
        )

    def put(self, answer: ChunkAnswer) -> None:
        """Put a chunk's rows in their places."""
        self.lesion_pixels[answer.indices] = answer.lesion_pixels
        self.positive[answer.indices] = answer.positive
        if self.masks is not None and answer.masks is not None:
            self.masks[answer.indices] = answer.masks

    def only(self, indices: list[int]) -> Rows:
        """The rows of these slices, in their order."""
        if len(indices) == len(self.positive):
            return self
        masks = None if self.masks is None else self.masks[indices]
        return Rows(self.lesion_pixels[indices], self.positive[indices], masks)
