"""Figures of an evaluation: counted by hand, held against published intervals, and kept inside their bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundglass_export.evaluation.intervals import Share, bootstrap, f1_estimate, wilson
from groundglass_export.evaluation.metrics import (
    ScanOutcome,
    SliceOutcome,
    dice_figures,
    scan_figures,
    slice_figures,
)

BLANK = SliceOutcome("set", "scan", "scan", 0, "0.png", label=True, positive=True, pixels=0)
counts = st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


def verdicts(label: bool, positives: str, group: str = "scan") -> list[SliceOutcome]:
    """Slices of one label; a plus is a slice that the model calls positive."""
    return [replace(BLANK, label=label, positive=sign == "+", group=group) for sign in positives]


def masked(pixels: int, expert: int, common: int, group: str = "scan") -> SliceOutcome:
    """A slice with an expert's mask."""
    return replace(BLANK, group=group, label=expert > 0, pixels=pixels, expert_pixels=expert, common_pixels=common)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(hits: int, total: int, low: float, high: float) -> None:
    """The four shares that Newcombe (Statistics in Medicine 17, 1998, table I) works out, to the digits printed."""
    assert wilson(hits, total) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(counts)
def test_wilson_holds_its_share_and_mirrors(pair: tuple[int, int]) -> None:
    """The interval holds the share, stays within 0..1, has a width, and that of the misses is its mirror image."""
    hits, total = pair
    low, high = wilson(hits, total)
    assert 0.0 <= low <= hits / total <= high <= 1.0
    assert high > low
    assert wilson(total - hits, total) == (pytest.approx(1 - high), pytest.approx(1 - low))


def test_a_share_of_nothing_has_no_value() -> None:
    """A source without negative slices has no specificity, rather than one of 0 or 1."""
    assert Share(0, 0).value is None
    assert Share(0, 0).interval is None


def test_f1_by_hand() -> None:
    """3 found, 1 false, 2 missed: F1 is 6/9, its interval that of 3 in 6 carried through 2x / (1 + x)."""
    estimate = f1_estimate(3, 1, 2)
    assert estimate is not None
    assert estimate.value == pytest.approx(6 / 9)
    assert estimate.interval == pytest.approx([2 * x / (1 + x) for x in wilson(3, 6)])


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_f1_lies_in_an_interval_of_some_width(found: int, false: int, missed: int) -> None:
    """Even where every scan is right or wrong; there is none where nothing is positive, nor called so."""
    estimate = f1_estimate(found, false, missed)
    if estimate is None:
        assert found == false == missed == 0
        return
    low, high = estimate.interval
    assert 0 <= low <= estimate.value <= high <= 1
    assert high > low
    assert math.isclose(estimate.value, 2 * found / (2 * found + false + missed))


def test_slice_figures_by_hand() -> None:
    """Of five slices with a lesion three are found, of four without three are spared."""
    figures = slice_figures([*verdicts(True, "+-++-", "a"), *verdicts(False, "--+-", "b")])
    assert (figures.slices, figures.groups) == (9, 2)
    assert (figures.sensitivity.hits, figures.sensitivity.total) == (3, 5)
    assert (figures.specificity.hits, figures.specificity.total) == (3, 4)


def test_groups_widen_the_interval_of_a_share() -> None:
    """Ten publications whose images are all right or all wrong tell less than a hundred single images do."""
    slices = [item for number in range(10) for item in verdicts(True, ("+" if number % 2 else "-") * 10, f"p{number}")]
    share = slice_figures(slices).sensitivity
    assert share.interval is not None
    assert share.by_group is not None
    assert share.by_group[1] - share.by_group[0] > 2 * (share.interval[1] - share.interval[0])
    assert slice_figures(verdicts(True, "+-+")).sensitivity.by_group is None, "one group can't be resampled"


def test_dice_by_hand() -> None:
    """Overlaps of 1, 1/2 and 0: mean 1/2, median 1/2, pooled 2 (40 + 10 + 0) / (80 + 40 + 160)."""
    figures = dice_figures([masked(40, 40, 40), masked(20, 20, 10), masked(60, 100, 0), masked(30, 0, 0)])
    assert figures is not None
    assert figures.slices == 3, "a slice without a lesion has no dice"
    assert [figures.mean.value, figures.median.value] == pytest.approx([0.5, 0.5])
    assert figures.pooled.value == pytest.approx(100 / 280)
    assert (figures.resampled, figures.units) == ("slices", 3)


def test_a_lesion_that_is_missed_altogether_counts_as_zero() -> None:
    """An empty mask against a lesion is a dice of 0, and is not left out."""
    figures = dice_figures([masked(0, 10, 0), masked(10, 10, 10)])
    assert figures is not None
    assert figures.mean.value == pytest.approx(0.5)


def test_dice_is_resampled_by_scan() -> None:
    """Two scans of many slices each, all alike within a scan: the interval spans both, as it must for two units."""
    slices = [masked(10, 10, 10, "good")] * 50 + [masked(10, 10, 2, "poor")] * 50
    figures = dice_figures(slices)
    assert figures is not None
    assert (figures.resampled, figures.units) == ("groups", 2)
    assert figures.mean.interval == pytest.approx((0.2, 1.0))


def test_no_masks_no_dice() -> None:
    """Slices with labels only have no dice."""
    assert dice_figures(verdicts(True, "++")) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.data())
def test_the_bootstrap_repeats_and_stays_among_its_rows(values: list[float], data: st.DataObject) -> None:
    """The same rows give the same interval, and a mean never leaves the range of its values."""
    rows = np.array(values)
    names = st.lists(st.sampled_from("abc"), min_size=len(values), max_size=len(values))
    groups = data.draw(names)
    first, second = (bootstrap(groups, lambda drawn: float(rows[drawn].mean())) for _ in range(2))
    assert first == second
    low, high = first.interval
    assert rows.min() - 1e-9 <= low <= high <= rows.max() + 1e-9


def test_the_bootstrap_of_a_mean_agrees_with_theory() -> None:
    """Over 400 independent values the interval is that of the normal approximation, to a tenth of its width."""
    rows = np.random.default_rng(4).normal(0.6, 0.2, 400)
    low, high = bootstrap([str(place) for place in range(400)], lambda drawn: float(rows[drawn].mean())).interval
    error = rows.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((rows.mean() - 1.96 * error, rows.mean() + 1.96 * error), abs=0.4 * error)


def test_scan_figures_by_hand() -> None:
    """Two positive scans of which one is found, three negative of which one is called positive."""
    outcomes = [(True, True), (True, False), (False, False), (False, True), (False, False)]
    figures = scan_figures([ScanOutcome("set", "s", 20, label, 15, positive) for label, positive in outcomes])
    assert (figures.scans, figures.sensitivity.hits, figures.sensitivity.total) == (5, 1, 2)
    assert (figures.specificity.hits, figures.specificity.total) == (2, 3)
    assert figures.f1 is not None
    assert figures.f1.value == pytest.approx(2 / 4)
