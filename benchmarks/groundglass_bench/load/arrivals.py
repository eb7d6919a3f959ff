"""Arrivals: when studies come in an open loop, told beforehand and whatever becomes of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class Arrivals:
    """A Poisson process: times between arrivals are independent and exponential, ``rate_per_s`` a second on average."""

    def __init__(self, rate_per_s: float, start_s: float, rng: np.random.Generator) -> None:
        """The first arrival is one such time after ``start_s``."""
        self._mean_s = 1 / rate_per_s
        self._rng = rng
        self.next_s = start_s + rng.exponential(self._mean_s)

    def due(self, now_s: float) -> Iterator[float]:
        """Every arrival up to ``now_s`` that was not given yet: a late caller misses none."""
        while self.next_s <= now_s:
            yield self.next_s
            self.next_s += self._rng.exponential(self._mean_s)
