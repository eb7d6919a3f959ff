"""Slices of shadow traffic: what two versions say of the same slices, and how far they are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from groundglass import contract
from groundglass.contract import TensorSpec
from groundglass.errors import ServerRefused
from groundglass_client.requests import Tensors

_SET_BITS: Final = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
"""The number of set bits of every byte: eight times less memory than unpacking the masks."""


@dataclass(frozen=True, slots=True)
class SliceAnswers:
    """What one version says of the slices of a request: int32 (n,), bool (n,), uint8 (n, 512, 64) or None."""

    lesion_pixels: NDArray[np.int32]
    positive: NDArray[np.bool_]
    masks: NDArray[np.uint8] | None


@dataclass(frozen=True, slots=True)
class SliceDifference:
    """One slice under both versions.

    ``differing_pixels`` of the two 512x512 masks; without the live mask, the difference of their counts, which is the
    least that it can be. ``dice`` is None without the live mask, and where both masks are empty. ``index`` is the
    slice's place in its scan.
    """

    index: int
    live_pixels: int
    candidate_pixels: int
    live_positive: bool
    candidate_positive: bool
    differing_pixels: int
    dice: float | None

    @property
    def verdict_differs(self) -> bool:
        """Whether one version calls the slice positive, and the other does not."""
        return self.live_positive != self.candidate_positive

    def disagrees(self, mask_tolerance: int) -> bool:
        """Whether the verdict differs, or more than ``mask_tolerance`` pixels of the mask."""
        return self.verdict_differs or self.differing_pixels > mask_tolerance

    @property
    def gravity(self) -> tuple[bool, int, int]:
        """Sorts what matters more behind what matters less: another verdict, then the larger difference."""
        return self.verdict_differs, self.differing_pixels, -self.index


def read_slices(answer: Tensors, rows: int, *, masks: bool) -> SliceAnswers:
    """The slices in an answer of ``rows`` rows, ``masks`` where they were asked for. Raises ServerRefused when a tensor
    is missing or misshapen.
    """
    return SliceAnswers(
        _checked(answer, contract.LESION_PIXELS, rows)[:, 0],
        _checked(answer, contract.SLICE_POSITIVE, rows)[:, 0],
        _checked(answer, contract.MASK, rows) if masks else None,
    )


def compare_slices(
    indices: NDArray[np.int32], live: SliceAnswers, candidate: SliceAnswers
) -> tuple[SliceDifference, ...]:
    """Every slice of a request under both versions; ``indices`` int32 (n,) are their places in their scans."""
    counted = np.abs(live.lesion_pixels.astype(np.int64) - candidate.lesion_pixels)
    differing, dice = counted, np.full(len(indices), np.nan)
    if live.masks is not None and candidate.masks is not None:
        xor, both = _pixels(live.masks ^ candidate.masks), _pixels(live.masks) + _pixels(candidate.masks)
        # A version that miscounts its own mask does not agree either.
        differing = np.maximum(xor, counted)
        np.divide(both - xor, both, out=dice, where=both > 0)
    return tuple(
        SliceDifference(
            index=int(indices[row]),
            live_pixels=int(live.lesion_pixels[row]),
            candidate_pixels=int(candidate.lesion_pixels[row]),
            live_positive=bool(live.positive[row]),
            candidate_positive=bool(candidate.positive[row]),
            differing_pixels=int(differing[row]),
            dice=None if np.isnan(dice[row]) else float(dice[row]),
        )
        for row in range(len(indices))
    )


def _pixels(masks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Set pixels of bit-packed masks, uint8 (n, 512, 64): int64 (n,)."""
    pixels: NDArray[np.int64] = _SET_BITS[masks].sum(axis=(1, 2), dtype=np.int64)
    return pixels


def _checked(answer: Tensors, spec: TensorSpec, rows: int) -> NDArray[Any]:
    tensor = answer.get(spec.name)
    shape = (rows, *spec.dims)
    if tensor is None or tensor.shape != shape:
        found = "no such tensor" if tensor is None else f"shape {tensor.shape}"
        raise ServerRefused(f"the answer holds {found} for {spec.name}, expected {shape}: is it another ct_scan?")
    return tensor
