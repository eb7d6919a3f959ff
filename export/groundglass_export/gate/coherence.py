"""Do an engine's own answers belong together, and do they show the thresholds that they should?

Mask, count, verdict and probability of one engine say the same thing four times. Where they don't, a graph was damaged
in a way that agreement with the reference may not show: a changed constant, swapped bits, a count of something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from groundglass_export.answers import Answers
from groundglass_export.calibration import Calibration
from groundglass_export.gate.figures import SliceKey

_WHOLE_NUMBERS: Final = -0.5
"""Tolerance between counts: a count that was no must be less than one that was yes, by 1 at least."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """One thing that is not as it must be: the figure found, what is allowed, and the slice that shows it best."""

    figure: str
    found: float | None
    allowed: str
    worst: SliceKey | None = None

    @property
    def text(self) -> str:
        """For a person: ``mean dice 0.91, allowed at least 0.98, worst in P001 slice 80``."""
        found = "unknown" if self.found is None else f"{self.found:.6g}"
        where = "" if self.worst is None else f", worst in {self.worst[0]} slice {self.worst[1]}"
        return f"{self.figure} {found}, allowed {self.allowed}{where}"


@dataclass(slots=True)
class Bracket:
    """Where a threshold must lie, as an engine's decisions show: above ``below``, and not above ``at``."""

    below: float = -math.inf
    at: float = math.inf
    below_slice: SliceKey | None = None
    at_slice: SliceKey | None = None

    def take(self, key: SliceKey, highest_no: float, lowest_yes: float) -> None:
        """The highest value of a slice that was decided no, and the lowest that was decided yes."""
        if highest_no > self.below:
            self.below, self.below_slice = highest_no, key
        if lowest_yes < self.at:
            self.at, self.at_slice = lowest_yes, key

    def complaint(self, figure: str, expected: Bracket, tolerance: float, allowed: str) -> Complaint | None:
        """What is wrong if one threshold, with ``tolerance``, is to fit this bracket and the ``expected`` one."""
        over, under = self.below - expected.at, expected.below - self.at
        if max(over, under) <= tolerance:
            return None
        found, worst = (self.below, self.below_slice) if over > under else (self.at, self.at_slice)
        return Complaint(figure, found, allowed, worst)


@dataclass(slots=True)
class Coherence:
    """What an engine's answers show of themselves, gathered batch by batch."""

    pixel_threshold: Bracket = field(default_factory=Bracket)
    verdict_threshold: Bracket = field(default_factory=Bracket)
    miscounted: list[SliceKey] = field(default_factory=list)
    not_finite: list[SliceKey] = field(default_factory=list)
    unseen: bool = False

    def take(self, keys: list[SliceKey], answers: Answers) -> None:
        """The engine's answers to the slices ``keys``."""
        for row, key in enumerate(keys):
            pixels, positive = int(answers.pixels[row]), bool(answers.positive[row])
            if pixels != int(answers.mask[row].sum()):
                self.miscounted.append(key)
            self.verdict_threshold.take(key, -math.inf if positive else pixels, pixels if positive else math.inf)
            if answers.probability is None:
                self.unseen = True
                continue
            mask, probability = answers.mask[row], answers.probability[row]
            finite = np.isfinite(probability)
            if not finite.all():
                self.not_finite.append(key)
            highest_no = probability.max(initial=-np.inf, where=finite & ~mask)
            self.pixel_threshold.take(
                key, float(highest_no), float(probability.min(initial=np.inf, where=finite & mask))
            )

    def complaints(
        self, who: str, reference: Coherence, calibration: Calibration | None, tolerance: float
    ) -> Iterator[Complaint]:
        """Of the engine called ``who``; thresholds are held to ``calibration`` or, without one, to the reference's."""
        if self.not_finite:
            yield Complaint(
                f"{who}: slices with logits that are not finite", len(self.not_finite), "none", self.not_finite[0]
            )
        if self.miscounted:
            yield Complaint(
                f"{who}: slices whose LESION_PIXELS are not those of MASK", len(self.miscounted), "none",
                self.miscounted[0],
            )  # fmt: skip
        pixel, verdict = reference.pixel_threshold, reference.verdict_threshold
        if calibration is not None:
            threshold, least = calibration.probability_threshold, calibration.min_lesion_pixels
            pixel, verdict = Bracket(threshold, threshold), Bracket(least - 1, least)
        for complaint in (
            self.pixel_threshold.complaint(
                f"{who}: probability threshold of MASK", pixel, tolerance, _span(pixel.below, pixel.at)
            ),
            self.verdict_threshold.complaint(
                f"{who}: lesion pixels that turn SLICE_POSITIVE",
                verdict,
                _WHOLE_NUMBERS,
                _span(verdict.below + 1, verdict.at),
            ),
        ):
            if complaint is not None:
                yield complaint


def _span(low: float, high: float) -> str:
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
