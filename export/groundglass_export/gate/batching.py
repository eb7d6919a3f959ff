"""Does the candidate say the same of a slice alone and in a batch? A server forms batches as requests come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import numpy as np

from groundglass_export.gate.coherence import Complaint
from groundglass_export.gate.comparison import Comparison, ask
from groundglass_export.gate.figures import SliceParity, compare_slice
from groundglass_export.gate.limits import BATCH_CHECKED, GateLimits


def batch_complaints(comparison: Comparison, slices: Sequence[SliceParity], limits: GateLimits) -> Iterator[Complaint]:
    """Over slices that the reference calls positive, spread over all of them; any slices where there are none."""
    chosen = [item for item in slices if item.reference_positive] or list(slices)
    spread = np.unique(np.linspace(0, len(chosen) - 1, BATCH_CHECKED).round().astype(int))
    picked = [(chosen[place].scan, chosen[place].index) for place in spread]
    images = np.stack([comparison.image(key) for key in picked])
    keys = list(islice(cycle(picked), BATCH_CHECKED))
    together = ask(comparison.candidate, keys, np.stack(list(islice(cycle(images), BATCH_CHECKED))))
    rows = [
        compare_slice(key, ask(comparison.candidate, [key], images[row : row + 1]), together.row(row))
        for row, key in enumerate(picked)
    ]
    differing = [item for item in rows if not item.same_verdict or item.dice < limits.min_dice]
    if differing:
        worst = min(differing, key=lambda item: item.dice)
        yield Complaint(
            f"candidate: slices answered otherwise in a batch of {BATCH_CHECKED} than alone",
            len(differing),
            "none",
            worst.key,
        )
