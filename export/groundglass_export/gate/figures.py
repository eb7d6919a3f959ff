"""The figures of parity: of one slice, and of many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from groundglass_export.answers import Answers
from groundglass_export.gate.limits import BAND_PROBABILITY, CONFIDENCE

SliceKey = tuple[str, int]
"""Name of a scan, and index of a slice in it, counted from 0 at the head."""


@dataclass(frozen=True, slots=True)
class SliceParity:
    """One slice, ``index`` counted from 0 at the head, under reference and candidate.

    ``pixels`` are the set bits of the masks; ``differing_pixels`` are set in one of them only. The probability figures
    are None when an engine does not show its probabilities: the largest difference of any pixel, the mean over all
    pixels, and the mean over the ``band_pixels`` that either engine gives at least 1 %.
    """

    scan: str
    index: int
    reference_pixels: int
    candidate_pixels: int
    reference_positive: bool
    candidate_positive: bool
    dice: float
    differing_pixels: int
    probability_max: float | None = None
    probability_mean: float | None = None
    band_mean: float | None = None
    band_pixels: int = 0

    @property
    def key(self) -> SliceKey:
        """Which slice it is."""
        return self.scan, self.index

    @property
    def pixel_difference(self) -> int:
        """Lesion pixels that the candidate has more or fewer."""
        return abs(self.candidate_pixels - self.reference_pixels)

    @property
    def same_verdict(self) -> bool:
        """Whether both call the slice positive, or both negative."""
        return self.reference_positive == self.candidate_positive


@dataclass(frozen=True, slots=True)
class Figures:
    """Parity over several slices. Dice is taken over those that the reference calls positive; None without any.

    ``mean_dice_error`` is the standard error of the mean: how far the mean of other such slices may well be.
    ``verdict_risk`` is the share of slices with another verdict that these slices can't exclude (upper end, 95 %
    confidence): 3 of 1000 when none of 1000 differs. It takes slices as drawn on their own; neighbours in a scan
    resemble each other, so it is a lower bound of what is not known.
    """

    slices: int
    positive_slices: int
    mean_dice: float | None
    mean_dice_error: float | None
    min_dice: float | None
    probability_max: float | None
    probability_mean: float | None
    band_mean: float | None
    pixel_difference_max: int
    pixel_difference_mean: float
    reference_pixels: int
    candidate_pixels: int
    lesion_difference: float
    verdicts_differing: int
    verdict_agreement: float
    verdict_risk: float


def dice(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Twice the common pixels of two masks of one shape over the pixels of both; 1 for two empty masks."""
    both = int(mask.sum()) + int(other.sum())
    return 2 * int((mask & other).sum()) / both if both else 1.0


def compare_slice(key: SliceKey, expected: Answers, found: Answers) -> SliceParity:
    """Two answers to the one slice ``key``."""
    mask, other = expected.mask[0], found.mask[0]
    plain = SliceParity(
        scan=key[0],
        index=key[1],
        reference_pixels=int(mask.sum()),
        candidate_pixels=int(other.sum()),
        reference_positive=bool(expected.positive[0]),
        candidate_positive=bool(found.positive[0]),
        dice=dice(mask, other),
        differing_pixels=int((mask ^ other).sum()),
    )
    if expected.probability is None or found.probability is None:
        return plain
    return _with_probability(plain, expected.probability[0], found.probability[0])


def figures_of(slices: Sequence[SliceParity]) -> Figures:
    """The figures over at least one slice."""
    count = len(slices)
    positive = [item.dice for item in slices if item.reference_positive]
    differing = sum(not item.same_verdict for item in slices)
    reference = sum(item.reference_pixels for item in slices)
    candidate = sum(item.candidate_pixels for item in slices)
    return Figures(
        slices=count,
        positive_slices=len(positive),
        mean_dice=math.fsum(positive) / len(positive) if positive else None,
        mean_dice_error=float(np.std(positive, ddof=1)) / math.sqrt(len(positive)) if len(positive) > 1 else None,
        min_dice=min(positive, default=None),
        probability_max=_over([item.probability_max for item in slices], max),
        probability_mean=_over([item.probability_mean for item in slices], _mean),
        band_mean=_band_mean(slices),
        pixel_difference_max=max(item.pixel_difference for item in slices),
        pixel_difference_mean=math.fsum(item.pixel_difference for item in slices) / count,
        reference_pixels=reference,
        candidate_pixels=candidate,
        lesion_difference=abs(candidate - reference) / max(reference, 1),
        verdicts_differing=differing,
        verdict_agreement=1 - differing / count,
        verdict_risk=upper_share(differing, count),
    )


def upper_share(events: int, trials: int) -> float:
    """The largest share at which no more than ``events`` of ``trials`` still happen in 5 % of the cases.

    This is the upper end of the exact one-sided 95 % interval of a binomial share (Clopper and Pearson, 1934), found
    by halving.
    """
    if events >= trials:
        return 1.0
    low, high = events / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(events, trials, middle) > 1 - CONFIDENCE else (low, middle)
    return high


def _at_most(events: int, trials: int, share: float) -> float:
    """Probability of at most ``events`` in ``trials`` of probability ``share``, between 0 and 1, both excluded."""
    return math.fsum(
        math.exp(
            math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
            + count * math.log(share) + (trials - count) * math.log1p(-share)
        )
        for count in range(events + 1)
    )  # fmt: skip


def _with_probability(plain: SliceParity, expected: NDArray[np.float32], found: NDArray[np.float32]) -> SliceParity:
    difference = np.nan_to_num(np.abs(expected.astype(np.float64) - found), nan=1.0)  # no answer is a wrong answer
    band = ~((expected < BAND_PROBABILITY) & (found < BAND_PROBABILITY))  # what is not a number included
    band_pixels = int(band.sum())
    return replace(
        plain,
        probability_max=float(difference.max()),
        probability_mean=float(difference.mean()),
        band_mean=float(difference[band].mean()) if band_pixels else 0.0,
        band_pixels=band_pixels,
    )


def _band_mean(slices: Sequence[SliceParity]) -> float | None:
    """The mean over all band pixels of all slices, not the mean of the slices' means."""
    if any(item.band_mean is None for item in slices):
        return None
    pixels = sum(item.band_pixels for item in slices)
    return math.fsum((item.band_mean or 0.0) * item.band_pixels for item in slices) / pixels if pixels else 0.0


def _over(values: Sequence[float | None], fold: Callable[[Sequence[float]], float]) -> float | None:
    known = [value for value in values if value is not None]
    return fold(known) if known else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
