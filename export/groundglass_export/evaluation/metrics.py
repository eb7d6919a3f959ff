"""From single slices and scans to the figures of a table. Counting only: nothing here knows a model or a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundglass_export.evaluation.intervals import Estimate, Interval, Share, bootstrap, f1_estimate


@dataclass(frozen=True, slots=True)
class SliceOutcome:
    """One slice: its truth and what the model said.

    ``label``: it shows a lesion; ``positive``: the model says so. ``pixels``: lesion pixels of the served 512x512 mask.
    ``expert_pixels`` and ``common_pixels`` (in both masks), on the same grid, are None without an expert's mask.
    """

    source: str
    scan: str
    group: str
    index: int
    file: str
    label: bool
    positive: bool
    pixels: int
    expert_pixels: int | None = None
    common_pixels: int | None = None

    @property
    def dice(self) -> float | None:
        """Overlap of both masks, 0 to 1; None without an expert's mask, and where it is empty."""
        if not self.expert_pixels or self.common_pixels is None:
            return None
        return 2 * self.common_pixels / (self.pixels + self.expert_pixels)


@dataclass(frozen=True, slots=True)
class ScanOutcome:
    """One scan: its truth, and the verdict over its slices."""

    source: str
    scan: str
    slices: int
    label: bool
    longest_run: int
    positive: bool


@dataclass(frozen=True, slots=True)
class SliceFigures:
    """Slice by slice. ``groups`` is the number of scans and publications that the slices are from."""

    slices: int
    groups: int
    sensitivity: Share
    specificity: Share


@dataclass(frozen=True, slots=True)
class DiceFigures:
    """Overlap with the experts' masks over slices that show a lesion.

    ``pooled`` takes the pixels of all slices together, so that large lesions weigh more. ``resampled`` says what the
    intervals draw, ``groups`` or ``slices``, and ``units`` how many of them there are.
    """

    slices: int
    mean: Estimate
    median: Estimate
    pooled: Estimate
    resampled: str
    units: int


@dataclass(frozen=True, slots=True)
class ScanFigures:
    """Scan by scan. ``f1`` is None when no scan is positive, nor called so."""

    scans: int
    sensitivity: Share
    specificity: Share
    f1: Estimate | None


def slice_figures(slices: Sequence[SliceOutcome]) -> SliceFigures:
    """Sensitivity over the slices with a lesion, specificity over those without."""
    with_lesion = [item for item in slices if item.label]
    without = [item for item in slices if not item.label]
    return SliceFigures(
        slices=len(slices),
        groups=len({item.group for item in slices}),
        sensitivity=_share(with_lesion, [item.positive for item in with_lesion]),
        specificity=_share(without, [not item.positive for item in without]),
    )


def dice_figures(slices: Sequence[SliceOutcome]) -> DiceFigures | None:
    """Over the slices whose expert mask holds a lesion; None when there are none."""
    masked = [item for item in slices if item.dice is not None]
    if not masked:
        return None
    groups = [item.group for item in masked]
    dice = np.array([item.dice for item in masked], dtype=np.float64)
    common = np.array([item.common_pixels for item in masked], dtype=np.int64)
    both = np.array([item.pixels + (item.expert_pixels or 0) for item in masked], dtype=np.int64)

    def mean(rows: NDArray[np.intp]) -> float:
        return math.fsum(dice[rows]) / len(rows)

    def median(rows: NDArray[np.intp]) -> float:
        return float(np.median(dice[rows]))

    def pooled(rows: NDArray[np.intp]) -> float:
        return 2 * int(common[rows].sum()) / int(both[rows].sum())

    drawn = [bootstrap(groups, statistic) for statistic in (mean, median, pooled)]
    every = np.arange(len(masked))
    return DiceFigures(
        slices=len(masked),
        mean=Estimate(mean(every), drawn[0].interval),
        median=Estimate(median(every), drawn[1].interval),
        pooled=Estimate(pooled(every), drawn[2].interval),
        resampled=drawn[0].resampled,
        units=drawn[0].units,
    )


def scan_figures(scans: Sequence[ScanOutcome]) -> ScanFigures:
    """Sensitivity, specificity and F1 of the scan verdict."""
    found = sum(scan.label and scan.positive for scan in scans)
    missed = sum(scan.label and not scan.positive for scan in scans)
    false = sum(not scan.label and scan.positive for scan in scans)
    spared = len(scans) - found - missed - false
    return ScanFigures(
        scans=len(scans),
        sensitivity=Share(found, found + missed),
        specificity=Share(spared, spared + false),
        f1=f1_estimate(found, false, missed),
    )


def _share(slices: Sequence[SliceOutcome], right: Sequence[bool]) -> Share:
    return Share(sum(right), len(right), _by_group([item.group for item in slices], np.array(right, dtype=np.bool_)))


def _by_group(groups: Sequence[str], right: NDArray[np.bool_]) -> Interval | None:
    """None where resampling can tell nothing: one group, or all slices alike."""
    if len(set(groups)) < 2 or right.all() or not right.any():
        return None
    return bootstrap(groups, lambda rows: float(right[rows].mean())).interval
