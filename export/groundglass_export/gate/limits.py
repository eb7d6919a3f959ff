"""How far a version may be from the FP32 reference, for every precision. No other module holds such a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

BAND_PROBABILITY: Final = 0.01
"""A pixel counts to the lesion band when either engine gives it at least this. Elsewhere probabilities are all but 0,
and a mean over the whole image would say how large the lesion is and not how well the engines agree."""

BATCH_CHECKED: Final = 8
"""Slices that the candidate answers in one batch and one by one."""

CONFIDENCE: Final = 0.95
STANDARD_ERRORS: Final = 1.645
"""One-sided 95 % of a normal distribution. Measured: the first INT8 trial has a mean dice of 0.979 over the positive
slices of a scan, and 0.984 over ten of them."""


@dataclass(frozen=True, slots=True)
class GateLimits:
    """What a candidate must keep to. Scan verdicts must be identical at any precision, and all numbers finite.

    mean_dice, min_dice: at least this, of the mean and of the worst over the slices that the reference calls positive.
    verdict_agreement: share of slices with the same verdict, at least.
    band_difference: mean difference of probability over the lesion band, at most.
    probability_difference: the largest difference of any pixel, at most.
    lesion_difference: change of all lesion pixels together, as a share of the reference's, at most.
    threshold_tolerance: how far the threshold that an engine shows may be from the one that it should have.
    positive_slices: fewer slices positive under the reference prove nothing, and are refused.
    """

    mean_dice: float
    min_dice: float
    verdict_agreement: float
    band_difference: float
    probability_difference: float
    lesion_difference: float
    threshold_tolerance: float
    positive_slices: int = 1


LIMITS: Final[Mapping[str, GateLimits]] = MappingProxyType(
    {
        "fp32": GateLimits(
            mean_dice=0.999,
            min_dice=0.99,
            verdict_agreement=1.0,
            band_difference=1e-4,
            probability_difference=1e-2,
            lesion_difference=1e-3,
            threshold_tolerance=1e-6,
        ),
        "fp16": GateLimits(
            mean_dice=0.995,
            min_dice=0.98,
            verdict_agreement=1.0,
            band_difference=0.002,
            probability_difference=0.15,
            lesion_difference=0.003,
            threshold_tolerance=1e-4,
        ),
        "int8": GateLimits(
            mean_dice=0.98,
            min_dice=0.90,
            verdict_agreement=0.99,
            band_difference=0.04,
            probability_difference=1.0,
            lesion_difference=0.03,
            threshold_tolerance=1e-6,
        ),
    }
)
"""By :attr:`Engine.precision`. Dice and verdicts say what must hold; the other bounds are set by measurement on real
slices (onnxruntime 1.32 on a CPU, November 2026), to catch what dice does not.

- fp32: the same weights stored otherwise differ by exactly 0. With one of 728 channels of one layer zeroed, dice is
  still 0.9999, and probabilities in lesions differ by 2e-4 on average.
- fp16: with every layer's output rounded to FP16 and sums in FP32, 4e-4 in lesions, 0.027 at most, dice of the worst
  slice 0.9992. With noise of 30 % on the least sensitive of nine layers tried, 3.6e-3 in lesions, dice 0.998.
- int8: a first trial that just failed (mean dice 0.979) had 0.033 in lesions, 0.96 at most (so single pixels are no
  measure here), 0.916 as dice of its worst slice, and 1.8 % fewer lesion pixels. A damage that does less than that is
  not told from quantization.
"""
