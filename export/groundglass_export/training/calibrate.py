"""Choosing what turns probabilities into verdicts: the pixel threshold, then the lesion pixels of a positive slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from groundglass.contract import IMAGE_SIDE
from groundglass.errors import SettingError
from groundglass_export.calibration import Calibration
from groundglass_export.graphs import logit
from groundglass_export.network import LesionUnet
from groundglass_export.training.augment import plain
from groundglass_export.training.loss import dice
from groundglass_export.training.slices import TrainingSlice

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LESION_PIXELS = (20, 40, 80, 120, 160, 240, 320, 480, 640)


@dataclass(frozen=True, slots=True)
class Scores:
    """What a network finds in slices, for each of :data:`THRESHOLDS`: int64 and float64 (slices, thresholds)."""

    lesion_pixels: NDArray[np.int64]
    dice: NDArray[np.float64]


def score(network: LesionUnet, slices: Sequence[TrainingSlice]) -> Scores:
    """Lesion pixels and dice of each slice at the served size, under bf16 autocast."""
    network.eval()
    cuts = [logit(threshold) for threshold in THRESHOLDS]
    pixels, overlaps = [], []
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for item in slices:
            image, mask = plain(item, IMAGE_SIDE)
            logits = network(image[None].to(memory_format=torch.channels_last)).float().numpy()[0]
            expected = mask.numpy() >= 0.5
            pixels.append([int((logits >= cut).sum()) for cut in cuts])
            overlaps.append([dice(logits >= cut, expected) for cut in cuts])
    return Scores(np.array(pixels, dtype=np.int64), np.array(overlaps, dtype=np.float64))


def choose_calibration(
    positive: Scores, negative: Scores, sensitivity: float = 0.95, specificity: float = 0.95
) -> Calibration:
    """The pixel threshold with the best mean dice on ``positive`` slices, then the strictest slice rule that is fit.

    Fit is a rule that keeps both bounds. The strictest is taken since the negative slices may be easier than those to
    come (they are few, or were trained on), and a false slice costs a run. When no rule is fit, the one with the best
    sum of sensitivity and specificity is taken. Raises SettingError without slices of both kinds.
    """
    if not len(positive.lesion_pixels) or not len(negative.lesion_pixels):
        raise SettingError("calibration needs slices with and slices without lesions")
    column = int(positive.dice.mean(axis=0).argmax())
    rules = np.array(LESION_PIXELS)
    hit = (positive.lesion_pixels[:, column, None] >= rules).mean(axis=0)
    spared = (negative.lesion_pixels[:, column, None] < rules).mean(axis=0)
    fit = rules[(hit >= sensitivity) & (spared >= specificity)]
    best = fit.max() if fit.size else rules[(hit + spared).argmax()]
    return Calibration(THRESHOLDS[column], int(best))
