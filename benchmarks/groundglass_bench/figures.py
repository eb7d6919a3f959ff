"""Figures: values of repetitions with their median and spread, and ratios of repetitions that ran side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Work = Callable[[], float]
"""Does one repetition and returns its value: a rate, seconds, bytes."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What one thing came to, repetition by repetition; ``unit`` is empty for a ratio."""

    name: str
    unit: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"figure {self.name} has no repetition")

    @property
    def median(self) -> float:
        """The value that is judged and reported."""
        return statistics.median(self.values)

    @property
    def smallest(self) -> float:
        """Of all repetitions."""
        return min(self.values)

    @property
    def largest(self) -> float:
        """Of all repetitions."""
        return max(self.values)

    def to_json(self) -> dict[str, Any]:
        """Every repetition, and what is read most."""
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "smallest": self.smallest,
            "largest": self.largest,
            "values": list(self.values),
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Figure:
        """The inverse of :meth:`to_json`."""
        return Figure(content["name"], content["unit"], tuple(content["values"]))


def take_turns(works: Mapping[str, Work], repetitions: int, warm_up: int = 0) -> dict[str, tuple[float, ...]]:
    """Values of all ``works`` from rounds of A, B, C, A, B, C, so that a machine's moods fall on all of them alike.

    The values of the first ``warm_up`` rounds are dropped.
    """
    values: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(warm_up + repetitions):
        for name, work in works.items():
            values[name].append(work())
    return {name: tuple(found[warm_up:]) for name, found in values.items()}


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, ...]:
    """Ratios of the repetitions that ran in the same round."""
    return tuple(above / below for above, below in zip(numerators, denominators, strict=True))


def bracketed_ratios(values: Sequence[float], around: Sequence[float]) -> tuple[float, ...]:
    """Each value over the mean of the two that ran just before and just after it: n values, n + 1 ``around`` them.

    A slow drift of the machine's speed cancels.
    """
    if len(around) != len(values) + 1:
        raise ValueError(f"{len(values)} values need {len(values) + 1} around them, not {len(around)}")
    return tuple(value / ((around[i] + around[i + 1]) / 2) for i, value in enumerate(values))
