"""Figures against limits: what to complain of, and what the slices at hand leave open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from groundglass.contract import POSITIVE_RUN
from groundglass_export.gate.coherence import Complaint
from groundglass_export.gate.figures import Figures, SliceParity, figures_of
from groundglass_export.gate.limits import STANDARD_ERRORS, GateLimits
from groundglass_export.gate.report import ScanParity


def judge(slices: Sequence[SliceParity], scans: Sequence[ScanParity], limits: GateLimits) -> Iterator[Complaint]:
    """A complaint for every limit that is broken, the one that matters most first."""
    yield from _scan_complaints(slices, scans)
    figures = figures_of(slices)
    if figures.positive_slices < limits.positive_slices:
        yield Complaint(
            "slices that the reference calls positive", figures.positive_slices, f"at least {limits.positive_slices}"
        )
    positive = [item for item in slices if item.reference_positive]
    others = [item for item in slices if not item.same_verdict]
    for figure, found, least, among, badness in (
        ("mean dice of positive slices", figures.mean_dice, limits.mean_dice, positive, _overlap_missed),
        ("dice of a positive slice", figures.min_dice, limits.min_dice, positive, _overlap_missed),
        ("share of slices with the same verdict", figures.verdict_agreement, limits.verdict_agreement, others, _pixels),
    ):
        if found is not None and found < least:
            yield Complaint(figure, found, f"at least {least:g}", max(among, key=badness).key)
    for figure, found, most, badness in (
        ("mean difference of probability in lesions", figures.band_mean, limits.band_difference, _band),
        ("largest difference of probability", figures.probability_max, limits.probability_difference, _peak),
        ("change of all lesion pixels", figures.lesion_difference, limits.lesion_difference, _pixels),
    ):
        if found is not None and found > most:
            yield Complaint(figure, found, f"at most {most:g}", max(slices, key=badness).key)


def notes_on(
    slices: Sequence[SliceParity], scans: Sequence[ScanParity], limits: GateLimits, *, same_file: bool
) -> Iterator[str]:
    """What was not proved, for lack of slices or of answers."""
    if same_file:
        yield "candidate and reference are the same file: that they agree shows only that it repeats itself"
    if any(item.probability_max is None for item in slices):
        yield "an engine does not show its probabilities: masks, counts and verdicts alone were compared"
    if all(item.reference_positive for item in slices):
        yield "no slice is negative under the reference: false alarms were not looked for"
    yield from _few_slices(figures_of(slices), limits)
    found = {scan.reference.positive for scan in scans}
    if found != {True, False}:
        missing = "positive" if found == {False} else "negative"
        yield f"no scan is {missing} under the reference (a run of {POSITIVE_RUN} slices): that verdict was not tried"


def _few_slices(figures: Figures, limits: GateLimits) -> Iterator[str]:
    if figures.mean_dice is None or figures.mean_dice < limits.mean_dice:
        return
    error = math.inf if figures.mean_dice_error is None else figures.mean_dice_error
    if figures.mean_dice - limits.mean_dice < STANDARD_ERRORS * error:
        yield (
            f"{figures.positive_slices} positive slices are few to tell a mean dice of {figures.mean_dice:.4f} from "
            f"{limits.mean_dice:g}: compare on more of them"
        )


def _scan_complaints(slices: Sequence[SliceParity], scans: Sequence[ScanParity]) -> Iterator[Complaint]:
    others = [scan for scan in scans if not scan.same_verdict]
    if others:
        inside = [item for item in slices if item.scan == others[0].name and not item.same_verdict]
        yield Complaint("scans with another verdict", len(others), "none", max(inside, key=_pixels).key)


def _overlap_missed(item: SliceParity) -> float:
    return 1 - item.dice


def _band(item: SliceParity) -> float:
    return (item.band_mean or 0.0) * item.band_pixels


def _peak(item: SliceParity) -> float:
    return item.probability_max or 0.0


def _pixels(item: SliceParity) -> float:
    return item.pixel_difference
