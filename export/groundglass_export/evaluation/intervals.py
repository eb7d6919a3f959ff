"""95 % confidence intervals, and what each of them takes for granted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 2000
SEED: Final = 17
_QUANTILE: Final = 1.959963984540054  # of the normal distribution, at 97.5 %
_BOUNDS: Final = (100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2)

METHODS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "sensitivity, specificity": "Wilson score; slices (or scans) count as independent, and neighbours in a scan "
        "are not: of slices it is too narrow",
        "sensitivity, specificity by group": f"percentile bootstrap, {RESAMPLES} resamples of whole scans or "
        f"publications, seed {SEED}; none for a single group, nor where no slice differs from the others",
        "dice": f"percentile bootstrap, {RESAMPLES} resamples of whole scans, of slices where there is one scan only, "
        f"seed {SEED}; rough for few scans",
        "F1": "Wilson score of TP / (TP + FP + FN), carried through F1 = 2x / (1 + x)",
    }
)
"""By figure: the method of its interval, for tables and JSON."""


@dataclass(frozen=True, slots=True)
class Share:
    """``hits`` of ``total``, with the Wilson interval; ``by_group`` is the interval that allows for groups."""

    hits: int
    total: int
    by_group: Interval | None = None

    @property
    def value(self) -> float | None:
        """The share; None of nothing."""
        return self.hits / self.total if self.total else None

    @property
    def interval(self) -> Interval | None:
        """Its 95 % interval; None of nothing."""
        return wilson(self.hits, self.total) if self.total else None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class Resampled:
    """A bootstrap interval, what was drawn for it (``groups`` or ``slices``), and how many of them there are."""

    interval: Interval
    resampled: str
    units: int


def wilson(hits: int, total: int) -> Interval:
    """The score interval of a binomial share (Wilson, J. Am. Stat. Assoc. 22, 1927): never outside of 0..1, and of a
    sensible width for 0 or ``total`` hits too. ``total`` is at least 1.
    """
    squared = _QUANTILE**2
    share = hits / total
    centre = (share + squared / (2 * total)) / (1 + squared / total)
    half = _QUANTILE / (1 + squared / total) * math.sqrt(share * (1 - share) / total + squared / (4 * total**2))
    # At the ends the bound is the share itself; rounding would leave it a hair off.
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == total else centre + half)


def f1_estimate(true_positive: int, false_positive: int, false_negative: int) -> Estimate | None:
    """F1 and its interval; None when nothing is positive, nor called so.

    F1 is a rising function of TP / (TP + FP + FN), which is a share (Hand, Christen and Kirielle, Machine Learning 110,
    2021): the interval of the share gives that of F1, and does not vanish where every scan is right.
    """
    total = true_positive + false_positive + false_negative
    if not total:
        return None
    low, high = wilson(true_positive, total)
    return Estimate(_f1(true_positive / total), (_f1(low), _f1(high)))


def bootstrap(groups: Sequence[str], statistic: Callable[[NDArray[np.intp]], float]) -> Resampled:
    """The percentile interval of ``statistic`` over resampled rows.

    ``groups`` names each row's group; ``statistic`` is given the places of the rows drawn, int (m,). Whole groups are
    drawn, so that rows which resemble each other stay together; rows where there is one group only. The seed is fixed:
    the same rows give the same interval.
    """
    rows = np.arange(len(groups))
    group_of = np.unique(np.asarray(groups), return_inverse=True)[1]
    grouped = bool(group_of.any())
    unit_of = group_of if grouped else rows
    units = [rows[unit_of == unit] for unit in range(int(unit_of.max()) + 1)]
    rng = np.random.default_rng(SEED)
    draws = rng.integers(0, len(units), size=(RESAMPLES, len(units)))
    found = [statistic(np.concatenate([units[unit] for unit in draw])) for draw in draws]
    low, high = np.percentile(found, _BOUNDS)
    return Resampled((float(low), float(high)), "groups" if grouped else "slices", len(units))


def _f1(share: float) -> float:
    return 2 * share / (1 + share)
