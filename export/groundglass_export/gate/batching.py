"""Does the candidate say the same of a slice alone and in a batch? A server forms batches as requests come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice

import numpy as np

from groundglass_export.answers import Engine, Given
from groundglass_export.gate.coherence import Complaint
from groundglass_export.gate.comparison import Comparison, ask
from groundglass_export.gate.figures import SliceKey, SliceParity, compare_slice
from groundglass_export.gate.limits import BATCH_CHECKED, GateLimits


def batch_complaints(comparison: Comparison, slices: Sequence[SliceParity], limits: GateLimits) -> Iterator[Complaint]:
    """Over slices that the reference calls positive, spread over all of them; any slices where there are none."""
    chosen = [item for item in slices if item.reference_positive] or list(slices)
    spread = np.unique(np.linspace(0, len(chosen) - 1, BATCH_CHECKED).round().astype(int))
    images = {chosen[place].key: comparison.image(chosen[place].key) for place in spread}
    rows: list[SliceParity] = []
    for shape in sorted({image.shape for image in images.values()}):  # a batch holds slices of one size
        alike = {key: image for key, image in images.items() if image.shape == shape}
        rows += _alone_and_together(comparison.candidate, alike)
    differing = [item for item in rows if not item.same_verdict or item.dice < limits.min_dice]
    if differing:
        worst = min(differing, key=lambda item: item.dice)
        yield Complaint(
            f"candidate: slices answered otherwise in a batch of {BATCH_CHECKED} than alone",
            len(differing),
            "none",
            worst.key,
        )


def _alone_and_together(candidate: Engine, images: Mapping[SliceKey, Given]) -> list[SliceParity]:
    """Each slice by itself against the same slice in a full batch of them all, again and again."""
    picked = list(images)
    keys = list(islice(cycle(picked), BATCH_CHECKED))
    together = ask(candidate, keys, np.stack([images[key] for key in keys]))
    return [
        compare_slice(key, ask(candidate, [key], images[key][None]), together.row(row))
        for row, key in enumerate(picked)
    ]
