"""What the training makes small, and what it is judged by."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

DICE_SMOOTHING = 50.0
"""Pixels: keeps the dice of a batch with next to no lesion from dominating."""


def bce_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy plus soft dice over the whole batch; logits and mask float32 (n, 1, h, w)."""
    probability = torch.sigmoid(logits)
    overlap = (probability * mask).sum()
    dice = (2 * overlap + DICE_SMOOTHING) / (probability.sum() + mask.sum() + DICE_SMOOTHING)
    return functional.binary_cross_entropy_with_logits(logits, mask) + 1.0 - dice


def dice(found: NDArray[np.bool_], expected: NDArray[np.bool_]) -> float:
    """Dice of two masks of the same shape; 1 when both are empty."""
    total = int(found.sum()) + int(expected.sum())
    return 1.0 if total == 0 else 2.0 * int((found & expected).sum()) / total
