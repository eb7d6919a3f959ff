"""What the training makes small, and what it is judged by."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

DICE_SMOOTHING = 50.0
"""Pixels: keeps the dice of a batch with next to no lesion from dominating."""


POOLED_SHARE = 0.003
"""Of a slice's pixels: the strongest of them stand for the slice. Three times the least lesion that makes a slice
positive.
"""


LOGIT_PENALTY = 0.01


def bce(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy, the paper's loss; logits and mask float32 (n, 1, h, w)."""
    return functional.binary_cross_entropy_with_logits(logits, mask)


def slice_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Binary cross-entropy of slices: a slice's logit is the mean of its strongest :data:`POOLED_SHARE` of pixels.

    Logits float32 (n, 1, h, w), ``positive`` float32 (n,), 0 or 1.
    """
    strongest = max(1, round(POOLED_SHARE * logits[0].numel()))
    pooled = logits.flatten(1).topk(strongest, dim=1).values.mean(dim=1)
    return functional.binary_cross_entropy_with_logits(pooled, positive)


def bce_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy plus soft dice over the whole batch; logits and mask float32 (n, 1, h, w)."""
    probability = torch.sigmoid(logits)
    overlap = (probability * mask).sum()
    dice = (2 * overlap + DICE_SMOOTHING) / (probability.sum() + mask.sum() + DICE_SMOOTHING)
    return functional.binary_cross_entropy_with_logits(logits, mask) + 1.0 - dice


def logit_penalty(logits: Tensor, bound: float) -> Tensor:
    """The mean square by which logits float32 of any shape lie beyond ``bound``, times :data:`LOGIT_PENALTY`.

    A probability of 1 - 5e-5 is as good as one of 1 - 1e-38, and costs eight bits far less of their resolution.
    """
    return LOGIT_PENALTY * functional.relu(logits.abs() - bound).square().mean()


def dice(found: NDArray[np.bool_], expected: NDArray[np.bool_]) -> float:
    """Dice of two masks of the same shape; 1 when both are empty."""
    total = int(found.sum()) + int(expected.sum())
    return 1.0 if total == 0 else 2.0 * int((found & expected).sum()) / total
