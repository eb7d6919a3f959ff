"""Choosing what turns probabilities into verdicts: the pixel threshold, then the lesion pixels of a positive slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundglass.contract import IMAGE_SIDE
from groundglass.errors import SettingError
from groundglass_export.calibration import Calibration
from groundglass_export.graphs import logit
from groundglass_export.network import LesionUnet
from groundglass_export.training.augment import plain
from groundglass_export.training.loss import dice
from groundglass_export.training.precision import mixed_precision
from groundglass_export.training.slices import Split, TrainingSlice

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LESION_PIXELS = (20, 40, 80, 120, 160, 240, 320, 400, 480, 560, 640, 800, 1000, 1200, 1500)


@dataclass(frozen=True, slots=True)
class Scores:
    """What a network finds in slices, for each of :data:`THRESHOLDS`: int64 and float64 (slices, thresholds)."""

    lesion_pixels: NDArray[np.int64]
    dice: NDArray[np.float64]


def logits_of(network: LesionUnet, image: Tensor) -> NDArray[np.float32]:
    """Logits float32 (1, rows, cols) of an image float32 (1, rows, cols), where the network is."""
    network.eval()
    device = next(network.parameters()).device
    with torch.inference_mode(), mixed_precision(device):
        logits = network(image[None].to(device=device, memory_format=torch.channels_last))
    return np.asarray(logits[0].float().cpu().numpy())


def validation_dice(network: LesionUnet, slices: Sequence[TrainingSlice]) -> float:
    """Mean dice over slices at the served size, pixel threshold 0.5; 0 when there is no slice."""
    found = []
    for item in slices:
        image, mask = plain(item, IMAGE_SIDE)
        found.append(dice(logits_of(network, image) >= 0.0, mask.numpy() >= 0.5))
    return float(np.mean(found)) if found else 0.0


def score(network: LesionUnet, slices: Sequence[TrainingSlice]) -> Scores:
    """Lesion pixels and dice of each slice at the served size."""
    cuts = [logit(threshold) for threshold in THRESHOLDS]
    pixels, overlaps = [], []
    for item in slices:
        image, mask = plain(item, IMAGE_SIDE)
        logits = logits_of(network, image)
        expected = mask.numpy() >= 0.5
        pixels.append([int((logits >= cut).sum()) for cut in cuts])
        overlaps.append([dice(logits >= cut, expected) for cut in cuts])
    return Scores(np.array(pixels, dtype=np.int64), np.array(overlaps, dtype=np.float64))


def calibration_slices(splits: Sequence[Split]) -> tuple[Sequence[TrainingSlice], ...]:
    """What to calibrate on, source by source: slices held out for validation, and a series' slices without a lesion,
    trained on or not.

    Without these, single images alone would say what a slice without lesion looks like, and series are what is served.
    """
    held_out = [split.validation for split in splits if split.validation]
    series = [split.training for split in splits if split.source.kind in ("healthy_series", "labelled_series")]
    healthy = [tuple(item for item in training if not item.positive) for training in series]
    return (*held_out, *(slices for slices in healthy if slices))


def calibrated(network: LesionUnet, sources: Sequence[Sequence[TrainingSlice]]) -> Calibration | None:
    """:func:`choose_calibration` of a network on slices, source by source; None without slices of both kinds."""
    if len({item.positive for source in sources for item in source}) < 2:
        return None
    outlined = [[item for item in source if item.positive and item.mask is not None] for source in sources]
    labelled = [[item for item in source if item.mask is None] for source in sources]
    healthy = [[item for item in source if not item.positive] for source in sources]
    positive = [score(network, items) for group in (outlined, labelled) for items in group if items]
    negative = [score(network, items) for items in healthy if items]
    return choose_calibration(positive, negative, len([items for items in outlined if items]))


def choose_calibration(
    positive: Sequence[Scores],
    negative: Sequence[Scores],
    outlined: int,
    sensitivity: float = 0.95,
    specificity: float = 0.95,
) -> Calibration:
    """The pixel threshold with the best mean dice on outlined slices, then the strictest slice rule that is fit.

    ``positive`` and ``negative`` hold scores by source, and a source counts as much as another, however many its
    slices are; the first ``outlined`` of ``positive`` have a dice that means something. Fit is a rule that keeps both
    bounds. The strictest is taken since the negative slices may be easier than those to come, and a false slice costs a
    run. When no rule is fit, the one is taken under which the lower of sensitivity and specificity is highest. Raises
    SettingError without slices of both kinds.
    """
    if not positive or not negative:
        raise SettingError("calibration needs slices with and slices without lesions")
    dices = [scores.dice.mean(axis=0) for scores in positive[:outlined]]
    column = int(np.mean(dices, axis=0).argmax()) if dices else THRESHOLDS.index(0.5)
    rules = np.array(LESION_PIXELS)
    hit = np.mean([(scores.lesion_pixels[:, column, None] >= rules).mean(axis=0) for scores in positive], axis=0)
    spared = np.mean([(scores.lesion_pixels[:, column, None] < rules).mean(axis=0) for scores in negative], axis=0)
    fit = rules[(hit >= sensitivity) & (spared >= specificity)]
    best = fit.max() if fit.size else rules[np.minimum(hit, spared).argmax()]
    return Calibration(THRESHOLDS[column], int(best))
